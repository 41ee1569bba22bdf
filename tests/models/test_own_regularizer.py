"""A regularizer that a user writes: solved, tuned, looked into, differentiated."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from helpers import gradients_equal_finite_differences, random
from problems import TIGHT, OwnPrior, images

from deepinv_deal import DEAL, interpret, tune
from deepinv_deal.priors import AttentiveQuadraticPrior


@pytest.fixture
def own():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OwnPrior().double()


def test_a_regularizer_of_ones_own_is_solved_tuned_and_looked_into(own, rng):
    x = images(2, 1, 9, 10)
    physics = dinv.physics.Inpainting(
        (1, 9, 10), mask=0.7, rng=torch.Generator().manual_seed(0)
    ).double()
    y = physics.A(x)
    model = DEAL(pretrained=None, prior=own, rtol=1e-9, lambda_reg=0.3)
    with torch.no_grad():
        x_hat, info = model(y, physics, sigma=0.1, return_info=True)
        force = 0.3 * own.grad(x_hat, 0.1)
    assert info.converged.all() and info.mask.shape == (2, 2, 9, 10)
    data = physics.A_adjoint(physics.A(x_hat) - y)
    torch.testing.assert_close(-data, force, rtol=0, atol=1e-9 * float(force.norm()))
    with pytest.warns(RuntimeWarning, match="before the search was over"):
        tuned = tune(model, physics, [x[:1]], max_trials=3)
    assert len({trial.score for trial in tuned.trials}) == 3
    plain = interpret.without_mask(model)
    _, unmasked = plain(y, physics, sigma=0.1, return_info=True)
    assert (unmasked.mask == 1).all()
    assert interpret.effective_filters(model).shape == (2, 1, 3, 3)
    first = interpret.with_filters(model, [0])
    _, less = first(y, physics, sigma=0.1, return_info=True)
    assert not less.mask[:, 1].any() and less.mask[:, 0].any()
    at = interpret.linearize(model, y[:1], physics, sigma=0.1)
    assert 0 < interpret.spectral_radius(at) < 1
    with pytest.raises(NotImplementedError, match="must define regularizer"):
        AttentiveQuadraticPrior().mask(x, 0.1)


def test_a_regularizer_of_ones_own_is_differentiated_exactly(own, rng):
    y = images(1, 1, 5, 6)
    model = DEAL(
        pretrained=None, prior=own, rtol=1e-12, max_iter=500, adjoint=TIGHT, scale=None
    )
    target = random(rng, 1, 1, 5, 6)

    def loss(y, *weights):
        named = dict(zip(names, weights, strict=True))
        x_hat = torch.func.functional_call(
            model, named, (y,), {"sigma": 0.1, "lambda_reg": 0.5}
        )
        return (x_hat * target).sum()

    names = ["prior.W.weight.0", "prior.c"]
    weights = [dict(model.named_parameters())[name] for name in names]
    gradients_equal_finite_differences(loss, [y, *weights], rng, rtol=1e-6)
