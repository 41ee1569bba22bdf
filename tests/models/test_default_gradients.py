"""Gradients at default settings against differences of accurate solutions."""

from __future__ import annotations

import pytest
import torch
from helpers import slope_in_place
from skimage.data import camera

from deepinv_deal import DEAL, MMR, SAFI, PatchSynthesis, SmoothPlusSparse

#: Models by their weights, and what makes their solutions accurate.
MODELS = {
    "deal_gray": (DEAL, {"rtol": 1e-5}),
    "safi_25": (SAFI, {"rtol": 3e-3, "max_iter": 40}),
    "mmr_25": (MMR, {"rtol": 3e-3, "max_iter": 40}),
    "cpr_25": (SmoothPlusSparse, {"rtol": 1e-5}),
    "patch_25": (PatchSynthesis, {}),
}
#: Lengths of the steps, in the measurements and relative to the weights: differences of
#: shorter ones would be those of single kinks, and of the solver's errors.
STEPS = 0.1, 5e-3
TOLERANCES = 0.15, 0.4


@pytest.mark.parametrize("name", MODELS)
def test_gradients_by_default_are_those_of_accurate_solutions(name):
    """
    Along the gradient of the squared error, in the measurements and in the weights.

    At a rough pair of SAFI or MMR too many filter responses counted as zero, which left
    a gradient of zero, without a word.
    """
    kind, accurate = MODELS[name]
    sigma = 25 / 255
    x = torch.from_numpy(camera()[100:114, 200:214] / 255.0).double()[None, None]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = (x + sigma * noise.double()).requires_grad_()
    model = kind(pretrained=name).double()
    weight = max(model.prior.parameters(), key=torch.Tensor.numel)
    reference = kind(prior=model.prior, warn=False, **accurate)

    def loss(model, y):
        return (model(y, sigma=sigma) - x).square().sum()

    gradients = torch.autograd.grad(loss(model, y), (y, weight))
    lengths = STEPS[0], STEPS[1] * float(weight.detach().norm())
    for tensor, gradient, length, tolerance in zip(
        (y, weight), gradients, lengths, TOLERANCES, strict=True
    ):
        slope = gradient.norm()
        direction = gradient / slope
        difference = slope_in_place(
            lambda: loss(reference, y), tensor, direction, length
        )
        assert float(difference / slope) == pytest.approx(1, abs=tolerance)
