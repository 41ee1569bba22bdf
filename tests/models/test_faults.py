"""Faults that were mended: none of them may come back."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from helpers import Counted, central_difference, random
from problems import DOUBLE, MODELS, TIGHT, generator, images, random_prior

from deepinv_deal import DEAL, AdjointOptions, SolverOptions
from deepinv_deal.solvers import Status

SHAPE = (2, 1, 6, 8)


def inpainting():
    mask = 0.4 + 0.6 * images(1, *SHAPE[1:])[0].round()
    return dinv.physics.Inpainting(SHAPE[1:], mask=mask)


def test_a_prior_stays_where_it_is():
    prior = random_prior().to("meta")
    assert next(DEAL(prior=prior, pretrained=None).parameters()).is_meta
    assert next(prior.parameters()).is_meta
    with pytest.raises(ValueError, match="y is on cpu, the model on meta"):
        DEAL(prior=prior, pretrained=None)(images(*SHAPE), sigma=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_options_are_not_shared_and_cannot_be_changed(name):
    one, other = MODELS[name](), MODELS[name]()
    with pytest.raises(AttributeError):  # frozen
        one.adjoint.jacobian_free = True
    one.adjoint = AdjointOptions(strict=True)
    assert not other.adjoint.strict and not type(other).default_adjoint.strict


class Full(dinv.physics.LinearPhysics):
    def A(self, x, **kwargs):
        return x

    def A_adjoint(self, y, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 GB")


@pytest.mark.parametrize("name", MODELS)
def test_a_lack_of_memory_is_told_as_such(name):
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        MODELS[name](lambda_reg=0.1)(images(*SHAPE), Full())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits_say_what_to_do(name, dtype):
    with pytest.raises(TypeError, match=r"model.float\(\).*inner_dtype=torch.bfloat16"):
        MODELS[name]().to(dtype)(images(*SHAPE).to(dtype), sigma=0.1)


@pytest.mark.parametrize("name", ["DEAL", "CPR"])
def test_another_default_device_does_not_matter(name):
    y, physics = images(*SHAPE), inpainting()
    model = MODELS[name](lambda_reg=0.02)
    expected = model(y, physics, sigma=0.1)
    torch.set_default_device("meta")
    try:
        actual = model(y, physics, sigma=0.1)
    finally:
        torch.set_default_device(None)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", MODELS)
def test_hyperparameters_are_in_the_state_once(name):
    trained = MODELS[name](lambda_reg=0.02, trainable_params=["lambda_reg"])
    fixed = MODELS[name](lambda_reg=torch.tensor(0.02, dtype=DOUBLE))
    for model in (trained, fixed):
        keys = [k for k in model.state_dict() if k == "lambda_reg"]
        others = [k for k in model.state_dict() if "params_algo" in k]
        assert keys == ["lambda_reg"] and not others
    assert "lambda_reg" not in dict(fixed.named_parameters())
    fixed.load_state_dict(MODELS[name](lambda_reg=torch.tensor(0.3)).state_dict())
    assert float(fixed.lambda_reg) == pytest.approx(0.3)


def test_what_is_known_of_a_physics_is_not_asked_again():
    matrix = torch.eye(48).double() + 0.05 * random(generator(), 48, 48)
    A = Counted(lambda x: (x.flatten(1) @ matrix).view_as(x))
    At = Counted(lambda y: (y.flatten(1) @ matrix.T).view_as(y))
    physics = dinv.physics.LinearPhysics(A=A, A_adjoint=At)
    model = MODELS["DEAL"](lambda_reg=0.5, solver=SolverOptions(preconditioner="none"))
    y = physics.A(images(*SHAPE))

    def calls(given):
        A.calls = At.calls = 0
        return model(y, given), A.calls, At.calls

    plain, *first = calls(physics)
    A.calls = At.calls = 0
    known = model.examine(y, physics)
    examined = (A.calls, At.calls)
    again, *further = calls(known)
    assert torch.equal(plain, again) and torch.equal(calls(known)[0], plain)
    # A on two random images and the product; A_adjoint of y is of every call.
    assert [a - b for a, b in zip(first, further, strict=True)] == [
        examined[0],
        examined[1] - 1,
    ]
    assert examined[0] >= 2


def test_the_status_of_sparse_coding_is_told():
    model = MODELS["two-step"](warn=False)
    y = images(*SHAPE)
    _, info = model(y, return_info=True)
    assert (info.status == Status.FINISHED).all() and not info.converged.any()
    assert (info.inner_iter > info.n_iter).all()


@pytest.mark.parametrize("name", ["DEAL", "SAFI", "CPR"])
def test_the_equation_is_that_of_the_call(name):
    y, physics = images(*SHAPE), inpainting()
    model = MODELS[name](bounds=(0.3, 0.7), lambda_reg=0.02, solver="admm", rtol=0.1)
    equation = model.equation(y, physics, sigma=0.1)
    assert equation.bounds is not None
    options = getattr(equation, "options", None)
    assert (equation.method if options is None else options.method) == "admm"
    found, result = equation.solve(equation.start(None), rtol=0.1, max_iter=2000)
    assert result.converged.all()
    x = equation.data.image(equation.image(found))
    torch.testing.assert_close(x, model(y, physics, sigma=0.1), rtol=0, atol=1e-9)
    assert x.min() >= 0.3 - 1e-9 and x.max() <= 0.7 + 1e-9


@pytest.mark.parametrize("name", ["DEAL", "SAFI", "CPR"])
def test_gradients_with_bounds_are_central_differences(name, rng):
    adjoint = AdjointOptions(True, 1e-10) if name == "CPR" else TIGHT
    rtol = {"DEAL": 1e-11, "SAFI": 1e-9, "CPR": 1e-9}[name]
    model = MODELS[name](
        bounds=(0.45, 0.75), rtol=rtol, adjoint=adjoint, warn=False, max_iter=20000
    )
    y = images(1, 1, 5, 6).requires_grad_()
    target, direction = random(rng, 1, 1, 5, 6), random(rng, 1, 1, 5, 6)

    def loss(y):
        return (model(y, sigma=0.1) * target).sum()

    x = model(y, sigma=0.1)
    at_bound = (x - x.clamp(0.45 + 1e-6, 0.75 - 1e-6)).abs() > 0
    assert 0 < at_bound.sum() < x.numel()
    (gradient,) = torch.autograd.grad(loss(y), y)
    expected = central_difference(loss, y.detach(), direction, 1e-5)
    torch.testing.assert_close(
        (gradient * direction).sum(), expected, rtol=1e-3, atol=1e-4
    )
