"""SAFI's and MMR's priors: their formulas, energy and proximal map."""

from __future__ import annotations

import pytest
import torch
from problems import generator, noisy_images, random_l1_prior
from torch.nn import functional as F

from deepinv_deal._batch import inner
from deepinv_deal.priors import MMRPrior, SAFIPrior
from deepinv_deal.problems import operator_term
from deepinv_deal.solvers import ConvergenceWarning

KINDS = [pytest.param(SAFIPrior, id="safi"), pytest.param(MMRPrior, id="mmr")]


def plain_filters(prior):
    kernels = [w.detach() for w in prior.W.weight]
    return [k - k.mean((2, 3), keepdim=True) for k in kernels]


def plain_analysis(prior, x):
    for kernel in plain_filters(prior):
        x = F.conv2d(x, kernel, padding=3)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_rescaled_weights_denoise_rescaled_images(kind):
    prior, y = random_l1_prior(kind), noisy_images()
    expected = prior.prox(y, gamma=prior.lambda_reg.item(), rtol=1e-8)
    mask = prior.mask(y)
    prior.rescale(0.4)
    assert float(prior.sigma) == pytest.approx(10 / 255)
    torch.testing.assert_close(prior.mask(0.4 * y), mask)
    actual = prior.prox(0.4 * y, gamma=prior.lambda_reg.item(), rtol=1e-8)
    torch.testing.assert_close(actual, 0.4 * expected, rtol=1e-6, atol=1e-7)
    assert (expected - y).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_filters_are_two_convolutions_with_zero_mean_kernels(kind):
    prior, x = random_l1_prior(kind), noisy_images()
    bound = prior.bind()
    expected = plain_analysis(prior, x)
    torch.testing.assert_close(bound.nu * bound.analyse(x), expected)
    w = noisy_images(2)[:, :1].expand_as(expected) + expected
    torch.testing.assert_close(
        inner(bound.analyse(x), w), inner(x, bound.adjoint(w)), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        bound.normal(x), bound.adjoint(bound.analyse(x)), rtol=1e-10, atol=1e-12
    )


def test_safi_mask_follows_its_formula():
    prior, x = random_l1_prior(SAFIPrior), noisy_images()
    expected = x
    network = prior.mask_network
    for V, spline in zip(network.V, network.splines, strict=True):
        expected = spline(F.conv2d(expected, V, padding=3))
    expected = torch.sigmoid(expected)
    torch.testing.assert_close(prior.mask(x), expected)
    assert expected.std() > 0.05, "the mask must depend on the image"


def test_safi_mask_starts_at_one_half():
    x = torch.rand(1, 1, 9, 9, generator=generator())
    assert (SAFIPrior(4).mask(x) == 0.5).all()


def test_mmr_mask_follows_its_formula():
    prior, x = random_l1_prior(MMRPrior), noisy_images()
    potential = prior.potential
    averages = []
    for weight in potential.G:
        kernel = weight.detach().abs()
        averages.append(kernel / kernel.sum((2, 3), keepdim=True))
    g = plain_analysis(prior, x).abs()
    for kernel in averages:
        g = F.conv2d(g, kernel, padding=3, groups=3)
    g = potential.spline(potential.scale.abs().view(1, -1, 1, 1) * g).clamp(0, 1)
    assert ((g > 0) & (g < 1)).any(), "the splines must matter"
    for kernel in reversed(averages):
        g = F.conv_transpose2d(g, kernel, padding=3, groups=3)
    torch.testing.assert_close(prior.mask(x), g)
    assert (g >= 0).all() and (g <= 1 + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_two_channels_are_regularized_alike(kind):
    prior = random_l1_prior(kind)
    a, b = noisy_images(seed=1), noisy_images(seed=2)
    both = torch.cat([a, b], 1)
    assert prior.mask(both).shape == (2, 6, 9, 8)
    torch.testing.assert_close(prior.mask(both)[:, :3], prior.mask(a))
    torch.testing.assert_close(prior.grad(both)[:, 1:], prior.grad(b))
    total = prior.frozen_fn(a, a) + prior.frozen_fn(b, b)
    torch.testing.assert_close(prior.frozen_fn(both, both), total)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_value_is_the_weighted_l1_norm(kind):
    prior, x, z = random_l1_prior(kind), noisy_images(seed=1), noisy_images(seed=2)
    expected = (prior.mask(z) * plain_analysis(prior, x)).abs().flatten(1).sum(1)
    torch.testing.assert_close(prior.frozen_fn(x, z), expected)


def test_safi_has_no_energy_and_says_so():
    prior = random_l1_prior(SAFIPrior)
    assert not prior.explicit_prior
    with pytest.raises(NotImplementedError, match="no energy"):
        prior(noisy_images())


def test_the_gradient_of_the_energy_of_mmr_is_the_field_of_its_mask():
    prior, x = random_l1_prior(MMRPrior), noisy_images().requires_grad_()
    assert prior.explicit_prior
    (expected,) = torch.autograd.grad(prior(x).sum(), x)
    torch.testing.assert_close(prior.grad(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_the_mask_of_mmr_majorises_its_energy(seed):
    prior = random_l1_prior(MMRPrior, seed=seed)
    x, z = noisy_images(seed=seed), noisy_images(seed=seed + 50)
    majoriser = prior(z) + prior.frozen_fn(x, z) - prior.frozen_fn(z, z)
    assert (majoriser >= prior(x)).all()
    assert (majoriser > prior(x) + 1e-3).any(), "touching everywhere proves nothing"


def test_a_scale_of_zero_gives_the_l1_norm():
    prior, x = random_l1_prior(MMRPrior), noisy_images(height=30, width=30)
    with torch.no_grad():
        prior.potential.scale.zero_()
    g = plain_analysis(prior, x).abs()
    expected = prior.potential.bind(torch.ones(())).average(g).flatten(1).sum(1)
    torch.testing.assert_close(prior(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_prox_is_denoising_without_a_box(kind):
    prior, y = random_l1_prior(kind), noisy_images() - 0.4
    gamma = 0.1 / float(prior.bind().nu)
    z = prior.prox(y, gamma=gamma, rtol=1e-6)
    equation = prior.equation(operator_term(y), lambda_reg=gamma, bounds=None)
    with torch.no_grad():
        p, result = equation.solve(equation.start(None), rtol=1e-9, max_iter=100)
    assert result.converged.all()
    expected = equation.image(p)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    assert (z < 0).any()
    with pytest.warns(ConvergenceWarning, match=rf"{kind.__name__}\.prox"):
        prior.prox(y, gamma=gamma, rtol=1e-9, max_iter=1)
