"""Small trainings of every kind of model, and what the tests do with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers import slope_in_place
from problems import generator
from torch import Tensor

from deepinv_deal import DEAL, MMR, SAFI, PatchSynthesis, SmoothPlusSparse
from deepinv_deal.solvers import SolverResult
from deepinv_deal.training import (
    AttentiveL1Recipe,
    AttentiveL1Trainer,
    DEALRecipe,
    DEALTrainer,
    DictionaryRecipe,
    DictionaryTrainer,
)

#: The solver of all trainings, for a stand-in.
SOLVE = "deepinv_deal.solvers.implicit.fixed_point"


def stopping_at(*factors: float, kept: float):
    """
    Returns a stand-in for ``fixed_point`` that visits multiples of the first iterate.

    :param float factors: the multiples, in this order.
    :param float kept: multiple that it returns as the best.
    """

    def solve(freeze, init, **kwargs):  # noqa: ARG001
        for factor in factors:
            freeze(factor * init)
        zero = torch.zeros(len(init))
        return SolverResult(kept * init, zero.to(torch.int8), zero.long(), zero)

    return solve


#: Settings of all recipes that make a training small.
SMALL = {
    "patch_size": 10,
    "batch_size": 2,
    "steps": 6,
    "warmup": 1,
    "pool": 2,
    "reuse": 2,
    "val_every": 3,
    "val_images": 1,
    "val_size": 16,
}


@dataclass
class Kind:
    """A model with its recipe, in a small size."""

    model: Any
    recipe: Any
    trainer: Any
    settings: dict[str, Any]

    def start(self, folder, out, *, resume=False, **changes):
        settings = SMALL | self.settings | changes
        recipe = self.recipe(data=str(folder), out=str(out), **settings)
        return self.trainer(recipe, resume=resume)


_l1 = AttentiveL1Recipe, AttentiveL1Trainer
_dictionary = DictionaryRecipe, DictionaryTrainer
_size = {"num_atoms": 6, "atom_size": 4, "num_free_atoms": 5}

KINDS = {
    "deal": Kind(DEAL, DEALRecipe, DEALTrainer, {"num_filters": 4}),
    "safi": Kind(SAFI, *_l1, {"num_filters": 3, "model": "safi"}),
    "mmr": Kind(MMR, *_l1, {"num_filters": 3, "model": "mmr"}),
    "cpr": Kind(SmoothPlusSparse, *_dictionary, _size | {"model": "cpr"}),
    "ncpr": Kind(SmoothPlusSparse, *_dictionary, _size | {"model": "ncpr"}),
    "patch": Kind(PatchSynthesis, *_dictionary, _size | {"model": "patch"}),
}


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as options of the command."""
    return [f"--{name.replace('_', '-')}={v}" for name, v in settings.items()]


def take(trainer, steps: int) -> list[float]:
    """Takes training steps and returns their losses."""
    losses = []
    for _ in range(steps):
        losses.append(trainer.train_step())
        trainer.step += 1
    return losses


def gradient(trainer) -> Tensor:
    """The last step's gradient in all weights, in one vector."""
    return torch.cat([p.grad.flatten() for p in trainer.prior.parameters()])


def weights_after(trainer, steps: int) -> Tensor:
    """All weights after some more training steps, in one vector."""
    take(trainer, steps)
    return torch.cat([p.detach().flatten() for p in trainer.prior.parameters()])


def slopes_of_the_loss(trainer, weight: Tensor, step: float) -> tuple[float, float]:
    """
    The derivative of the loss along a random direction of one weight.

    In double precision: by the gradient, and by a central difference.
    """
    trainer.prior.double()
    problems = trainer.sampler.batch(0, 1)
    problems = type(problems)(*(v.double() for v in vars(problems).values()))
    trainer.loss(problems, None)[0].backward()
    direction = torch.randn(weight.shape, generator=generator(3)).to(weight)
    slope = (weight.grad * direction).sum().item()
    return slope, slope_in_place(
        lambda: trainer.loss(problems, None)[0].item(), weight, direction, step
    )
