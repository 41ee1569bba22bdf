"""Training of SAFI and MMR: every setting, the gradient, bad input."""

from __future__ import annotations

import pytest
import torch

from deepinv_deal.training import AttentiveL1Recipe, AttentiveL1Trainer

SMALL = {
    "num_filters": 3,
    "patch_size": 10,
    "batch_size": 2,
    "steps": 100,
    "warmup": 1,
    "pool": 2,
    "reuse": 2,
    "val_images": 1,
    "val_size": 16,
    "lr": 0.02,
    "adjoint_rtol": 1e-4,
}


def trainer(folder, out, **changes):
    recipe = AttentiveL1Recipe(data=str(folder), out=str(out), **(SMALL | changes))
    return AttentiveL1Trainer(recipe, resume=False)


def take(training, steps):
    for _ in range(steps):
        training.train_step()
        training.step += 1
    return torch.cat([p.detach().flatten() for p in training.prior.parameters()])


@pytest.mark.parametrize(
    "change",
    [
        {"model": "mmr"},
        {"sigma": 0.2},
        {"depth": 1},
        {"warm_depth": 1},
        {"inner_max_iter": 5},
        {"jacobian_free": False},
        {"adjoint_rtol": 0.9},
        {"rtol": 0.5},
    ],
    ids=str,
)
def test_each_setting_changes_the_training(folder, tmp_path, change):
    # Steps large enough for the masks to move away from 1/2, where they all start.
    accurate = {"rtol": 1e-3, "depth": 20, "warm_depth": 3}
    plain = take(trainer(folder, tmp_path, **accurate), 4)
    changed = take(trainer(folder, tmp_path, **(accurate | change)), 4)
    assert plain.shape != changed.shape or not torch.equal(plain, changed)


@pytest.mark.parametrize("model", ["safi", "mmr"])
def test_the_gradient_is_that_of_the_loss(folder, tmp_path, model):
    accurate = {
        "rtol": 1e-9,
        "depth": 200,
        "inner_max_iter": 5000,
        "adjoint_rtol": 1e-8,
        "jacobian_free": False,
        "batch_size": 1,
        "model": model,
    }
    training = trainer(folder, tmp_path, **accurate)
    training.prior.double()
    with torch.no_grad():
        training.prior.lambda_reg.fill_(0.02)
    problems = training.sampler.batch(0, 1)
    problems = type(problems)(*(v.double() for v in vars(problems).values()))
    loss, _ = training.loss(problems, None)
    loss.backward()
    weight = training.prior.W.weight[0]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    direction = direction.to(weight)
    slope = (weight.grad * direction).sum().item()

    def at(t):
        with torch.no_grad():
            weight.add_(t * direction)
            value = training.loss(problems, None)[0].item()
            weight.sub_(t * direction)
        return value

    step = 1e-6
    assert slope == pytest.approx((at(step) - at(-step)) / (2 * step), rel=1e-3)


def test_the_weight_stays_positive(folder, tmp_path):
    training = trainer(folder, tmp_path)
    with torch.no_grad():
        training.prior.lambda_reg.fill_(-1.0)
    training.after_step()
    assert training.prior.lambda_reg > 0


def test_bad_settings_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="model must be 'safi' or 'mmr', got 'deal'"):
        trainer(folder, tmp_path, model="deal")
    with pytest.raises(ValueError, match="depth must be positive, got 0"):
        trainer(folder, tmp_path, depth=0)
