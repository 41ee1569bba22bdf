"""The weight of denoising, chosen anew."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import generator, random_prior
from skimage.data import astronaut

from deepinv_deal import DEAL
from deepinv_deal.priors import DEALPrior
from deepinv_deal.training import retune_kappa
from deepinv_deal.weights import load

IMAGE = torch.from_numpy(astronaut()[60:108, 200:248].mean(-1).round()).byte()[None]


def psnr(prior, level):
    """Of the noise that the search saw, at one level."""
    x = IMAGE[None].float() / 255
    y = x + level / 255 * torch.randn(x.shape, generator=generator(0))
    with torch.no_grad():
        x_hat = DEAL(pretrained=None, prior=prior)(y, sigma=level / 255)
    return float(-10 * (x_hat.clamp(0, 1) - x).square().mean().log10())


def weights(prior):
    with torch.no_grad():
        return [
            float(prior.default_lambda(s / 255, IMAGE[None] / 255)) for s in (5, 25)
        ]


def test_a_wrong_weight_is_corrected_where_it_is_wrong():
    prior = load("deal_gray", DEALPrior)
    with torch.no_grad():
        prior.kappa.coefficients[:, prior.kappa.knots > 15] *= 0.7
    before = weights(prior)
    others = {k: v.clone() for k, v in prior.state_dict().items() if "kappa" not in k}
    poor = psnr(prior, 25)
    factors = retune_kappa(prior, [IMAGE], (5, 25), size=48, progress=False)
    assert np.divide(weights(prior), before) == pytest.approx(factors, rel=1e-5)
    assert 0.85 < factors[0] < 1.15 and 1.2 < factors[1] < 1.7
    assert psnr(prior, 25) > poor + 0.1
    for key, value in others.items():
        assert torch.equal(prior.state_dict()[key], value), key


@pytest.mark.parametrize("levels", [(10,), (5, 10, 50)])
def test_quotients_are_interpolated(monkeypatch, levels):
    values = [0.9, 1.0, 1.3][: len(levels)]
    rest = iter(values)

    def found(*_, lambda_reg, **__):
        return SimpleNamespace(lambda_reg=next(rest) * lambda_reg)

    monkeypatch.setattr("deepinv_deal.training.retune.tune", found)
    prior = random_prior()
    before = prior.kappa.coefficients[0].detach().clone()
    assert retune_kappa(prior, [IMAGE], levels) == pytest.approx(values)
    expected = np.interp(prior.kappa.knots.numpy(), levels, values)
    actual = prior.kappa.coefficients[0].detach().numpy()
    np.testing.assert_allclose(actual, before.numpy() * expected, rtol=1e-6)


@pytest.mark.parametrize("levels", [(), (0, 5), (25, 5), (5, 5)])
def test_bad_input_is_named(levels):
    with pytest.raises(ValueError, match="levels must be positive and increasing"):
        retune_kappa(random_prior(), [IMAGE], levels)
    with pytest.raises(ValueError, match="images must hold at least one"):
        retune_kappa(random_prior(), [])
