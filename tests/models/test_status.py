"""No model returns an unfinished or damaged image without saying so."""

from __future__ import annotations

import warnings

import deepinv as dinv
import pytest
import torch
from helpers import random
from problems import EACH_MODEL, MODELS, generator, images, random_model

from deepinv_deal import ConvergenceError, ConvergenceWarning
from deepinv_deal.solvers import (
    AdjointOptions,
    SolverResult,
    Status,
    proximal_gradient,
    soft_threshold,
)

SHAPE = (2, 1, 5, 6)


class Faulty(dinv.physics.LinearPhysics):
    """A dense map whose adjoint fails for the last sample after some calls."""

    def __init__(self, calls: float):
        super().__init__()
        self.calls, self.largest = 0, calls
        self.matrix = torch.eye(30).double() + 0.05 * random(generator(), 30, 30)

    def A(self, x, **kwargs):
        return (x.flatten(1) @ self.matrix).view_as(x)

    def A_adjoint(self, y, **kwargs):
        self.calls += 1
        x = (y.flatten(1) @ self.matrix.T).view_as(y)
        if self.calls > self.largest:
            x[-1, 0, 2, 3] = torch.nan
        return x


#: As many iterations as to fail midway, and not more.
SETTINGS = {"NCPR": {"rtol": 1e-3}, "PatchSynthesis": {"rtol": 1e-4}}


@pytest.mark.parametrize("name", EACH_MODEL)
def test_a_physics_that_fails_midway_is_told_for_its_sample(name):
    model, y = MODELS[name](lambda_reg=0.02, **SETTINGS.get(name, {})), images(*SHAPE)
    with torch.no_grad():
        sound = Faulty(torch.inf)
        expected, info = model(y, sound, return_info=True)
        assert info.converged.all()
        faulty = Faulty(sound.calls // 2)
        with pytest.warns(ConvergenceWarning, match=r"1 of 2 samples \(index 1\)"):
            x_hat, info = model(y, faulty, return_info=True)
    assert info.status.tolist() == [Status.CONVERGED, Status.NON_FINITE]
    assert x_hat.isfinite().all()
    torch.testing.assert_close(x_hat[0], expected[0], rtol=0, atol=1e-9)


ITERATIVE = [name for name in MODELS if name != "two-step"]


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_strict_model_raises_and_hands_over_what_it_has(name):
    y, settings = images(*SHAPE), {"rtol": 1e-9, "max_iter": 1}
    x_hat, info = MODELS[name](**settings, warn=False)(y, sigma=0.1, return_info=True)
    assert (info.status == Status.MAX_ITER).all()
    strict = MODELS[name](**settings, warn=False, strict=True)
    with pytest.raises(ConvergenceError, match="2 of 2 samples.*MAX_ITER") as caught:
        strict(y, sigma=0.1)
    assert torch.equal(caught.value.result.status, info.status)
    assert torch.equal(caught.value.result.residual, info.residual)
    if name == "DEAL":
        assert torch.equal(caught.value.result.x, x_hat)


@pytest.mark.parametrize("name", EACH_MODEL)
def test_a_strict_model_that_converges_is_no_other_model(name):
    y = images(*SHAPE)
    strict = MODELS[name](strict=True)
    assert torch.equal(strict(y, sigma=0.1), MODELS[name]()(y, sigma=0.1))


def rough_adjoint(name, **settings):
    return MODELS[name](adjoint=AdjointOptions(rtol=1e-12, max_iter=1), **settings)


@pytest.mark.parametrize("name", ["DEAL", "SAFI", "NCPR"])
def test_an_adjoint_that_fails_is_told_or_raised(name):
    y = images(*SHAPE).requires_grad_()
    with pytest.warns(ConvergenceWarning, match="adjoint system"):
        rough_adjoint(name)(y, sigma=0.1).sum().backward()
    loss = rough_adjoint(name, strict=True)(y, sigma=0.1).sum()
    with pytest.raises(ConvergenceError, match="adjoint system"):
        loss.backward()


def test_all_iterations_are_no_failure_if_asked_for_but_nan_is():
    y = images(*SHAPE)
    model = random_model(rtol=0.0, max_iter=2, strict=True)
    _, info = model(y, sigma=0.1, return_info=True)
    assert (info.status == Status.MAX_ITER).all()
    with pytest.raises(ConvergenceError, match="NON_FINITE"), torch.no_grad():
        model(y, Faulty(6))


@pytest.mark.parametrize("check_every", [1, 4])
def test_failures_between_two_checks_are_seen_at_the_next(check_every, rng):
    b, calls = random(rng, 2, 10), []

    def step(v, _):
        calls.append(1)
        v = soft_threshold(v - 0.1 * (v - b), 0.01)
        if len(calls) > 5:
            v[1, 3] = torch.nan
        return v

    init = torch.zeros_like(b)
    result = proximal_gradient([step], [init], rtol=1e-6, check_every=check_every)
    assert result.status.tolist() == [Status.CONVERGED, Status.NON_FINITE]
    assert result.n_iter[1] == {1: 6, 4: 8}[check_every]
    assert result.x.isfinite().all()


def test_the_error_of_a_report_names_the_worst_sample():
    status = torch.tensor([Status.CONVERGED, Status.BREAKDOWN], dtype=torch.int8)
    values = torch.tensor([1e-6, 0.5])
    result = SolverResult(torch.ones(2, 3), status, torch.tensor([3, 7]), values)
    with pytest.raises(ConvergenceError, match="BREAKDOWN after 7 iter") as caught:
        result.report("It", 1e-5, "", strict=True)
    assert caught.value.result is result
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result.report("It", 0.0, "")
    assert len(heard) == 1
