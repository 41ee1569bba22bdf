"""Likelihoods as functions of predictions and measurements."""

import deepinv as dinv
import pytest
import torch
from deepinv.optim import L1, L2, LogPoissonLikelihood, PoissonLikelihood
from deepinv.utils import TensorList
from hypothesis import given
from hypothesis import strategies as st
from problems import DOUBLE, generator, images

from deepinv_deal.optim import SmoothedL1, WeightedL2
from deepinv_deal.problems.likelihood import LEAST_VARIANCE, Poisson
from deepinv_deal.problems.noise import likelihood_of, likelihood_of_noise


def counts(mean):
    return torch.poisson(mean, generator=generator(4))


def prediction(batch=2):
    return images(batch, 1, 6, 5, seed=1)


def transmitted(u, N0=200.0, mu=0.7):
    return -(counts(N0 * torch.exp(-mu * u)) / N0).log() / mu


#: Data fidelity, and measurements of a prediction that it suits.
CASES = {
    "L2": (lambda: L2(0.3), lambda u: u + 0.1),
    "WeightedL2": (lambda: WeightedL2(images(2, 1, 6, 5, seed=9)), lambda u: u + 0.1),
    "SmoothedL1": (lambda: SmoothedL1(0.05), lambda u: u + 0.4 * (u - 0.5)),
    "Poisson": (lambda: PoissonLikelihood(0.1, 0.5), lambda u: 0.1 * counts(10 * u)),
    "raw counts": (
        lambda: PoissonLikelihood(0.1, denormalize=False),
        lambda u: counts(10 * u),
    ),
    "LogPoisson": (lambda: LogPoissonLikelihood(200.0, 0.7), transmitted),
}


def own_fn(fidelity, u, y):
    """deepinv's data fidelity, sample by sample: its Poisson sums over a batch."""
    return torch.stack(
        [
            fidelity.d(u[i : i + 1], y[i : i + 1])[0]
            if not isinstance(fidelity, WeightedL2)
            else fidelity.d(u, y)[i]
            for i in range(len(u))
        ]
    )


@pytest.mark.parametrize("name", CASES)
def test_value_and_derivative_are_those_of_the_data_fidelity(name):
    make, measure = CASES[name]
    y, fidelity = measure(prediction()), make()
    u = (prediction() * 1.1).requires_grad_()
    likelihood = likelihood_of(fidelity)
    expected = torch.autograd.grad(own_fn(fidelity, u, y).sum(), u)[0]
    torch.testing.assert_close(likelihood.derivative(u, y), expected)
    # Values may differ by a constant.
    difference = likelihood.value(u, y) - own_fn(fidelity, u, y)
    other = 0.9 * u
    constant = likelihood.value(other, y) - own_fn(fidelity, other, y)
    torch.testing.assert_close(difference, constant, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_derivative_is_that_of_the_value_also_far_away(name):
    make, measure = CASES[name]
    y, likelihood = measure(prediction()), likelihood_of(make())
    for shift in (-3.0, -0.5, 0.0, 3.0):
        u = (prediction() + shift).requires_grad_()
        slope = torch.autograd.grad(likelihood.value(u, y).sum(), u)[0]
        torch.testing.assert_close(likelihood.derivative(u, y), slope)


@pytest.mark.parametrize("name", CASES)
def test_repeated_systems_contract(name):
    """The curvature is at least half the second derivative, everywhere."""
    make, measure = CASES[name]
    y, likelihood = measure(prediction()), likelihood_of(make())
    for shift in (-3.0, -0.5, 0.0, 0.5, 3.0):
        u = (prediction() + shift).requires_grad_()
        second = torch.autograd.grad(likelihood.derivative(u, y).sum(), u)[0]
        curvature = likelihood.curvature(u, y)
        assert (second >= -1e-9).all()
        assert (2 * curvature >= second * (1 - 1e-12)).all()


@given(
    start=st.floats(-5, 5),
    k=st.integers(0, 50),
    gain=st.floats(0.02, 3),
    bkg=st.sampled_from([0.0, 0.3, 4.0]),
)
def test_single_counts_are_fitted_from_anywhere(start, k, gain, bkg):
    likelihood = Poisson(gain, bkg)
    y = torch.full((1, 1), gain * k, dtype=DOUBLE)
    u = torch.full_like(y, start)
    for _ in range(60):
        u = u - likelihood.derivative(u, y) / likelihood.curvature(u, y)
    torch.testing.assert_close(u, y - gain * bkg, rtol=1e-6, atol=1e-6 * gain)


@given(start=st.floats(-5, 20), y=st.floats(0, 8))
def test_single_transmissions_are_fitted_from_anywhere(start, y):
    likelihood = likelihood_of(LogPoissonLikelihood(500.0, 0.5))
    y = torch.full((1, 1), y, dtype=DOUBLE)
    u = torch.full_like(y, start)
    for _ in range(100):
        u = u - likelihood.derivative(u, y) / likelihood.curvature(u, y)
    torch.testing.assert_close(u, y, rtol=1e-6, atol=1e-6)


def test_no_transmission_at_all_is_a_measurement():
    likelihood = likelihood_of(LogPoissonLikelihood(100.0, 1.0))
    y = torch.tensor([[torch.inf, 1.0]], dtype=DOUBLE)
    u = torch.tensor([[3.0, 2.0]], dtype=DOUBLE)
    for values in (
        likelihood.value(u, y),
        likelihood.derivative(u, y),
        likelihood.curvature(u, y),
        likelihood.linear(y),
        likelihood.level(y, y == y),
    ):
        assert values.isfinite().all()
    assert (likelihood.derivative(u, y) < 0)[0, 0]


def test_several_measurements():
    likelihood = likelihood_of(PoissonLikelihood(0.5))
    u = TensorList([prediction(), prediction()[:, :, :3]])
    y = TensorList([0.5 * counts(2 * part) for part in u])
    parts = [likelihood.value(a, b) for a, b in zip(u, y, strict=True)]
    torch.testing.assert_close(likelihood.value(u, y), sum(parts))
    for a, b, c in zip(u, y, likelihood.curvature(u, y), strict=True):
        assert torch.equal(c, likelihood.curvature(a, b))
    weights = TensorList([torch.ones(1), torch.full((1, 1, 3, 5), 2.0)])
    weighted = likelihood_of(WeightedL2(weights)).derivative(u, y)
    torch.testing.assert_close(weighted[1], 2 * (u[1] - y[1]))


def test_parameters_may_differ_between_samples():
    gain, bkg = torch.tensor([0.1, 0.4]).double(), torch.tensor([0.0, 2.0]).double()
    u = prediction()
    y = gain[:, None, None, None] * counts(u / gain[:, None, None, None])
    together = likelihood_of(PoissonLikelihood(gain, bkg))
    for i in range(2):
        alone = likelihood_of(PoissonLikelihood(float(gain[i]), float(bkg[i])))
        part = slice(i, i + 1)
        for function in ("value", "derivative", "curvature"):
            expected = getattr(alone, function)(u[part], y[part])
            found = getattr(together, function)(u, y)[part]
            torch.testing.assert_close(found, expected)


def test_level_is_one_over_the_variance():
    u = torch.full((1, 1, 100, 100), 0.5, dtype=DOUBLE)
    noise = dinv.physics.PoissonNoise(0.04, rng=generator(1))
    y = noise(u)
    level = likelihood_of_noise(dinv.physics.Denoising(noise), y)[0].level(y, y == y)
    assert float(level * (y - u).var()) == pytest.approx(1, rel=0.05)
    noise = dinv.physics.PoissonGaussianNoise(0.04, 0.2, rng=generator(1))
    y = noise(u)
    level = likelihood_of_noise(dinv.physics.Denoising(noise), y)[0].level(y, y == y)
    assert float(level * (y - u).var()) == pytest.approx(1, rel=0.05)
    noise = dinv.physics.LogPoissonNoise(400.0, 0.5, rng=generator(1))
    y = noise(u)
    level = likelihood_of_noise(dinv.physics.Denoising(noise), y)[0].level(y, y == y)
    assert float(level * (y - u).var()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("fidelity", "y", "words"),
    [
        (PoissonLikelihood(0.5), -torch.ones(1, 3), "negative"),
        (PoissonLikelihood(0.5), torch.tensor([[1.0, 0.2]]) * 1j, "complex"),
        (PoissonLikelihood(0.5, denormalize=False), 0.5 * torch.ones(1, 2), "=True"),
        (PoissonLikelihood(0.3), torch.tensor([[1.0, 2.0]]), "=False"),
        (PoissonLikelihood(None), torch.ones(1, 2), "gain .*is missing"),
        (PoissonLikelihood(0.0), torch.ones(1, 2), "gain .*positive"),
        (PoissonLikelihood(float("nan")), torch.ones(1, 2), "gain .*finite"),
        (PoissonLikelihood(1.0, -1.0), torch.ones(1, 2), "bkg .*negative"),
        (LogPoissonLikelihood(None), torch.ones(1, 2), "N0 .*is missing"),
        (LogPoissonLikelihood(100.0, 0.0), torch.ones(1, 2), "mu .*positive"),
        (WeightedL2(torch.tensor([1.0, -1.0])), torch.ones(1, 2), "weights"),
        (WeightedL2(torch.ones(3)), torch.ones(1, 2), "weights must expand"),
    ],
)
def test_what_cannot_be_is_named(fidelity, y, words):
    with pytest.raises(ValueError, match=words):
        likelihood = likelihood_of(fidelity)
        likelihood.check(y)
        likelihood.derivative(y, y)


@pytest.mark.parametrize(
    "fidelity",
    [dinv.optim.AmplitudeLoss(), dinv.optim.ItohFidelity(), "poisson", None],
)
def test_what_cannot_be_frozen_is_named(fidelity):
    with pytest.raises(TypeError, match="cannot be frozen") as error:
        likelihood_of(fidelity)
    assert "PoissonLikelihood" in str(error.value) and "L1" in str(error.value)


def test_fractional_and_zero_counts_are_remarked():
    likelihood = Poisson(1.0)
    assert likelihood.check(torch.tensor([[1.0, 3.0]])) == []
    assert "whole" in likelihood.check(torch.tensor([[1.5, 3.0]]))[0]
    (note,) = likelihood.check(torch.tensor([[0.0, 3.0]]))
    assert "1 of 2" in note and str(LEAST_VARIANCE) in note
    assert Poisson(1.0, 1.0).check(torch.tensor([[0.0, 3.0]])) == []


def test_smoothed_l1_tends_to_l1():
    u, y = prediction(), torch.zeros(2, 1, 6, 5, dtype=DOUBLE)
    torch.testing.assert_close(SmoothedL1(1e-9).d(u, y), L1().d(u, y))
    with pytest.raises(ValueError, match="delta"):
        SmoothedL1(0.0)


def test_noise_that_the_measurements_cannot_have_is_least_squares():
    physics = dinv.physics.Denoising(dinv.physics.PoissonNoise(0.25))
    for y in (torch.tensor([[-0.25, 0.5]]), torch.tensor([[0.1, 0.5]])):
        likelihood, note = likelihood_of_noise(physics, y)
        assert likelihood is None and "least squares" in note
    assert likelihood_of_noise(dinv.physics.Denoising(), y) == (None, None)
    assert likelihood_of_noise(None, y) == (None, None)
