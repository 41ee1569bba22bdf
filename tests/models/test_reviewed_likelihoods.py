"""What a second look at the likelihoods found."""

from __future__ import annotations

import math

import deepinv as dinv
import pytest
import torch
from deepinv.optim import L1, PoissonLikelihood
from deepinv.physics.functional.blur import gaussian_blur
from problems import DOUBLE, generator, images

from deepinv_deal import DEAL, MMR, SAFI, SmoothPlusSparse, tune
from deepinv_deal.optim import CorrelatedL2, WeightedL2
from deepinv_deal.problems.likelihood_term import LikelihoodTerm

QUIET = {"warn": False, "max_iter": 2}


def blur(noise=None) -> dinv.physics.Blur:
    kernel = gaussian_blur(sigma=(1.2, 1.2))
    return dinv.physics.Blur(kernel, padding="circular", noise_model=noise)


def counts(photons: float, size: int = 16):
    """Counts of a blurred image in units of the image, and their physics."""
    u = blur().A(images(1, 1, size, size).float())
    y = torch.poisson(photons * u, generator=generator(1)) / photons
    return y, blur(dinv.physics.PoissonNoise(1 / photons))


def white(shape, seed=1):
    return torch.randn(shape, generator=generator(seed))


# -- weights and levels that nobody gave -----------------------------------------------


@pytest.mark.parametrize("photons", [3, 300])
@pytest.mark.parametrize("model", [SAFI, MMR])
def test_the_default_weight_of_counts_knows_that_the_model_was_rescaled(model, photons):
    """Where the noise level is bounded, the weight was up to a hundred times too low"""
    y, physics = counts(photons)
    model = model(4, scale=None, **QUIET)
    model.prior.sigma.fill_(5 / 255)
    data = model.pose(y, physics).equation.data
    expected = float(model.prior.sigma) ** -2
    assert float(data.typical * data.gain) == pytest.approx(expected, rel=1e-4)


def test_the_level_of_a_noise_map_is_that_of_all_measurements():
    """A constant image reaches the centre of k-space only."""
    level = torch.full((1, 2, 8, 8), 0.1)
    level[:, :, 4, 4] = 0.5
    scan = dinv.physics.MRI(
        mask=torch.ones(8, 8),
        img_size=(8, 8),
        noise_model=dinv.physics.GaussianNoise(level),
    )
    model = DEAL(pretrained=None, num_filters=2, scale=None, **QUIET)
    data = model.pose(white((1, 2, 8, 8)), scan, lambda_reg=1.0).data
    assert float(data.typical) == pytest.approx(float(level.pow(-2).mean()), rel=1e-4)


def test_what_is_excluded_by_a_weight_of_zero_does_not_matter():
    """Not for the unit, not for the level, not for the image."""
    x = images(1, 1, 12, 12).float()
    weights = torch.full_like(x, 100.0)
    weights[..., :4, :] = 0
    results = []
    model = DEAL(
        pretrained=None, num_filters=2, data_fidelity=WeightedL2(weights), **QUIET
    )
    for value in (0.5, 1000.0):
        y = x + 0.1 * white(x.shape)
        y[weights == 0] = value
        problem = model.pose(y)
        assert float(problem.sigma) == pytest.approx(0.1, rel=1e-4)
        results.append(model(y))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_read_noise_alone_is_not_the_noise_of_counts():
    noise = dinv.physics.PoissonGaussianNoise(gain=0.1, sigma=0.01)
    physics = dinv.physics.Denoising(noise)
    model = DEAL(pretrained=None, num_filters=2, data_fidelity=dinv.optim.L2(), **QUIET)
    with pytest.raises(ValueError, match="PoissonGaussianNoise"):
        model(images(1, 1, 8, 8).float(), physics)


@pytest.mark.parametrize("model", [SAFI, SmoothPlusSparse])
def test_noise_of_another_kind_is_not_that_of_the_training(model):
    both = dinv.physics.GaussianNoise(0.1) * dinv.physics.PoissonNoise(0.1)
    with pytest.raises(ValueError, match="sigma is missing"):
        model(pretrained=None, **QUIET)(
            images(1, 1, 16, 16).float(), dinv.physics.Denoising(both)
        )


def test_a_stack_has_the_noise_of_its_parts():
    parts = [blur(dinv.physics.PoissonNoise(g)) for g in (0.1, 0.01)]
    physics = dinv.physics.stack(*parts)
    y = physics(images(1, 1, 16, 16).float())
    model = DEAL(pretrained=None, num_filters=2, **QUIET)
    data = model.pose(y, physics).data
    assert isinstance(data, LikelihoodTerm)
    one = model.pose(y[1], parts[1]).data
    x = images(1, 1, 16, 16, seed=2).float()
    other = model.pose(y[0], parts[0]).data
    torch.testing.assert_close(data.force(x), one.force(x) + other.force(x))


def test_complex_measurements_have_noise_maps_too():
    """deepinv's own draw has another shape; here y is what a scanner gives."""

    class Phase(dinv.physics.LinearPhysics):
        def A(self, x, **_):
            return torch.view_as_complex(x.movedim(1, -1).contiguous())[:, None]

        def A_adjoint(self, y, **_):
            return torch.view_as_real(y[:, 0]).movedim(-1, 1)

    level = torch.full((1, 1, 8, 8), 0.1)
    physics = Phase(noise_model=dinv.physics.GaussianNoise(level))
    y = torch.complex(white((1, 1, 8, 8)), white((1, 1, 8, 8), 2))
    model = DEAL(pretrained=None, num_filters=2, scale=None, **QUIET)
    data = model.pose(y, physics, lambda_reg=1.0).data
    assert isinstance(data, LikelihoodTerm)
    assert float(data.typical) == pytest.approx(100, rel=1e-4)


# -- what is reported, and where a search starts ---------------------------------------


def test_the_reported_weight_given_back_is_the_same_problem():
    """SAFI and MMR reported it in the unit that they work in."""
    y, physics = counts(30)
    found = SAFI(4, scale=None, **QUIET)
    found.prior.sigma.fill_(5 / 255)
    x, info = found(y, physics, return_info=True)
    given = SAFI(
        prior=found.prior, scale=None, data_fidelity=PoissonLikelihood(1 / 30), **QUIET
    )
    again, report = given(
        y, physics, sigma=info.sigma, lambda_reg=info.lambda_reg, return_info=True
    )
    torch.testing.assert_close(report.lambda_reg, info.lambda_reg)
    torch.testing.assert_close(again, x)
    y = images(1, 1, 12, 12).float()
    x, info = found(y, sigma=0.1, return_info=True)
    again = found(y, sigma=0.1, lambda_reg=info.lambda_reg)
    torch.testing.assert_close(again, x)


def test_a_coupling_that_is_given_is_relative_to_the_typical_curvature():
    """As a weight is; the gain belongs to the default only."""
    y, physics = counts(30)
    model = SmoothPlusSparse(pretrained=None, **QUIET)
    typical = model.pose(y, physics).data
    factor = model.pose(y, physics, beta=2.0).equation.data.factor
    term = model._data(y, physics, "auto")
    torch.testing.assert_close(factor * term.typical, torch.ones(1))
    torch.testing.assert_close(typical.factor * term.typical * term.gain, torch.ones(1))


def test_the_pseudo_inverse_is_that_of_what_counts_say():
    physics = dinv.physics.Inpainting(
        (1, 16, 16),
        mask=images(1, 1, 16, 16)[0].float() > 0.5,
        noise_model=dinv.physics.PoissonNoise(1 / 30),
    )
    y = counts(30)[0] * physics.mask
    settings = {"init": "pseudo_inverse", **QUIET}
    fidelity = PoissonLikelihood(1 / 30, denormalize=False)
    raw = DEAL(pretrained=None, num_filters=2, data_fidelity=fidelity, **settings)
    found = DEAL(pretrained=None, num_filters=2, **settings)
    a = raw.pose(30 * y, physics, lambda_reg=1.0).start()
    b = found.pose(y, physics, lambda_reg=1.0).start()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- errors ----------------------------------------------------------------------------


def test_raw_counts_are_no_transmission():
    physics = dinv.physics.Denoising(dinv.physics.LogPoissonNoise(N0=1e3, mu=1.0))
    y = torch.poisson(500 * torch.ones(1, 1, 8, 8), generator=generator(0))
    with pytest.raises(ValueError, match="line integrals"):
        DEAL(pretrained=None, num_filters=2, **QUIET)(y, physics)
    with pytest.raises(ValueError, match="line integrals"):
        DEAL(pretrained=None, num_filters=2, **QUIET)(
            torch.full_like(y, math.inf), physics
        )


@pytest.mark.parametrize("dim", [2, -3])
def test_the_dimension_of_channels_may_be_counted_from_the_end(dim):
    matrix = torch.tensor([[2, 1j, 0], [-1j, 2, 0], [0, 0, 1]], dtype=torch.complex128)
    first = CorrelatedL2(matrix, 2)
    u, y = images(3, 2, 3, 4, seed=1), images(3, 2, 3, 4, seed=2)
    u, y = (t[..., None].movedim(-1, 3) for t in (u, y))  # (B, 2, coils, 1, W)
    expected = first.d(u, y)
    torch.testing.assert_close(CorrelatedL2(matrix, dim).d(u, y), expected)


def test_a_covariance_may_hold_whole_numbers():
    matrix = torch.tensor([[2, 1], [1, 2]])
    u = images(1, 2, 3, 3)
    plain = CorrelatedL2(matrix.double()).d(u, 0 * u)
    torch.testing.assert_close(
        CorrelatedL2(matrix).d(u, 0 * u), plain, rtol=1e-5, atol=0
    )


def test_weights_per_sample_mean_the_same_alone_and_in_a_model():
    weights = torch.tensor([1.0, 9.0], dtype=DOUBLE)
    u = torch.ones(2, 1, 2, 2, dtype=DOUBLE)
    value = WeightedL2(weights).d(u, 0 * u)
    torch.testing.assert_close(value, torch.tensor([2.0, 18.0], dtype=DOUBLE))


def test_a_noise_map_has_no_zeros():
    level = torch.ones(1, 1, 8, 8)
    level[..., 0] = 0
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(level))
    with pytest.raises(ValueError, match="noise_model"):
        DEAL(pretrained=None, num_filters=2)(images(1, 1, 8, 8).float(), physics)


def test_sure_refuses_a_noise_map():
    level = torch.full((1, 1, 8, 8), 0.1)
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(level))
    y = images(1, 1, 8, 8).float()
    with pytest.raises(ValueError, match="one noise level"):
        tune(DEAL(pretrained=None, num_filters=2), physics, [{"y": y}], metric="sure")


def test_derivatives_of_moduli_are_refused_by_name():
    class Phase(dinv.physics.LinearPhysics):
        def A(self, x, **_):
            return x.to(torch.complex64)

        def A_adjoint(self, y, **_):
            return y.real

    y = images(1, 1, 16, 16).float().to(torch.complex64)
    model = SmoothPlusSparse(pretrained=None, data_fidelity=L1(), beta=1.0, **QUIET)
    x = model(y, Phase())
    with pytest.raises(RuntimeError, match="complex"):
        x.sum().backward()
