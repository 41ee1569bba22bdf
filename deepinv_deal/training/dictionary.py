"""The training of synthesis dictionaries: CPR, NCPR and the convex model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from deepinv_deal.models.patches import PatchSynthesis, SmoothPlusSparse
from deepinv_deal.priors import PatchSynthesisPrior, SmoothPlusSparsePrior
from deepinv_deal.priors.patches import PenaltyName
from deepinv_deal.problems import WeaklyConvexPenalty
from deepinv_deal.solvers import AdjointOptions
from deepinv_deal.training.data import Problems
from deepinv_deal.training.engine import Trainer
from deepinv_deal.training.recipes import DictionaryRecipe
from deepinv_deal.weights import load

#: The penalties of the smooth-plus-sparse models.
PENALTIES: dict[str, PenaltyName] = {"cpr": "group", "ncpr": "weakly_convex"}

#: Published settings by model, for noise of 5 and of 25 gray levels: first coupling,
#: base of the thresholds, order of the weakly convex penalty.
PUBLISHED = {
    ("cpr", 5): (0.5, 0.002, 1.8),
    ("cpr", 25): (2.0, 0.002, 1.8),
    ("ncpr", 5): (1.0, 0.003, 2.0),
    ("ncpr", 25): (2.0, 0.0125, 1.8),
    ("patch", 5): (0.3, 0.0015, 1.8),
    ("patch", 25): (2.0, 0.0075, 1.8),
}

#: Slope at which derivatives of the weakly convex model are cut off, since solutions in
#: training are not accurate. At 1, systems of redundant atoms would be singular.
LARGEST_SLOPE = 0.99


class DictionaryTrainer(
    Trainer[DictionaryRecipe, PatchSynthesisPrior | SmoothPlusSparsePrior]
):
    """
    Trains a :class:`deepinv_deal.priors.SmoothPlusSparsePrior` or
    :class:`deepinv_deal.priors.PatchSynthesisPrior`; see :class:`Trainer`.

    :param DictionaryRecipe recipe: settings.
    :param bool resume: go on from ``state.pt`` if there is one.
    """

    def new_prior(self) -> PatchSynthesisPrior | SmoothPlusSparsePrior:
        """Returns a prior with random weights."""
        recipe = self.recipe
        level = 5 if recipe.sigma < 15 / 255 else 25
        published = PUBLISHED[recipe.model, level]
        beta, lambda_reg, order = (
            theirs if ours is None else ours
            for ours, theirs in zip(
                (recipe.beta, recipe.lambda_reg, recipe.order), published, strict=True
            )
        )
        options: dict[str, Any] = {
            "beta": beta,
            "lambda_reg": lambda_reg,
            "sigma": recipe.sigma,
        }
        size: dict[str, Any] = {
            "num_atoms": recipe.num_atoms,
            "patch_size": recipe.atom_size,
        }
        size = {name: value for name, value in size.items() if value is not None}
        if recipe.model == "patch":
            return PatchSynthesisPrior(**size, **options, mean=recipe.mean)
        return SmoothPlusSparsePrior(
            PENALTIES[recipe.model],
            num_free_atoms=recipe.num_free_atoms,
            order=order,
            **size,
            **options,
        )

    def load_prior(
        self, pretrained: str
    ) -> PatchSynthesisPrior | SmoothPlusSparsePrior:
        """
        Returns the prior with the weights of ``recipe.init``; weights of the other
        penalty or of another noise level give their atoms only.
        """
        new = self.new_prior()
        prior = load(pretrained, type(new))
        theirs, ours = self.describe(prior), self.describe(new)
        same_model = theirs.pop("model") == ours.pop("model")
        if theirs != ours or (same_model and _gray_level(prior) == _gray_level(new)):
            if isinstance(prior, PatchSynthesisPrior):
                prior.mean = self.recipe.mean
            return self._with_settings(prior)
        new.dictionary.load_state_dict(prior.dictionary.state_dict())
        return new

    def _with_settings(
        self, prior: PatchSynthesisPrior | SmoothPlusSparsePrior
    ) -> PatchSynthesisPrior | SmoothPlusSparsePrior:
        """Gives loaded weights the settings that the recipe names."""
        recipe = self.recipe
        with torch.no_grad():
            if recipe.beta is not None:
                prior.log_beta.fill_(math.log(recipe.beta))
            if recipe.lambda_reg is not None:
                prior.lambda_reg.fill_(recipe.lambda_reg)
        if recipe.order is not None and isinstance(prior, SmoothPlusSparsePrior):
            prior.order = recipe.order
        return prior

    def describe(
        self, prior: PatchSynthesisPrior | SmoothPlusSparsePrior
    ) -> dict[str, Any]:
        """Returns what the recipe says about a prior, by the names it uses."""
        names = {penalty: model for model, penalty in PENALTIES.items()}
        smooth = isinstance(prior, SmoothPlusSparsePrior)
        # Sizes first: the other penalty may start from the same atoms.
        return {
            "num_atoms": len(prior.dictionary.atoms),
            "atom_size": prior.dictionary.patch_size,
            "num_free_atoms": len(prior.dictionary.free_atoms) if smooth else None,
            "model": names.get(prior.penalty_name) if smooth else "patch",
        }

    def new_model(
        self, prior: PatchSynthesisPrior | SmoothPlusSparsePrior
    ) -> PatchSynthesis | SmoothPlusSparse:
        """Returns the model around a prior, which validation calls."""
        if isinstance(prior, PatchSynthesisPrior):
            return PatchSynthesis(prior=prior, warn=False)
        return SmoothPlusSparse(prior=prior, warn=False)

    @cached_property
    def solver(self) -> PatchSynthesis | SmoothPlusSparse:
        """The model whose solves are differentiated."""
        adjoint = AdjointOptions(jacobian_free=True, rtol=self.recipe.adjoint_rtol)
        settings: dict[str, Any] = {"warn": False, "scale": None, "adjoint": adjoint}
        if isinstance(self.prior, PatchSynthesisPrior):
            return PatchSynthesis(prior=self.prior, **settings)
        return SmoothPlusSparse(prior=self.prior, **settings)

    @property
    def chooses_lambda(self) -> bool:
        """Whether ``lambda_reg`` is chosen anew for the best weights at the end."""
        return self.recipe.model == "patch"  # the others train their thresholds

    def parameter_groups(self) -> Sequence[tuple[float, Sequence[nn.Parameter]]]:
        """Returns factors on the learning rate, with the parameters they are for."""
        prior = self.prior
        if isinstance(prior, PatchSynthesisPrior):  # beta is fixed, as published
            return [(1.0, [prior.dictionary.atoms])]
        # Few numbers of order 1, against thousands of entries of order 0.1.
        return [
            (1.0, list(prior.dictionary.parameters())),
            (5.0, [prior.log_scale, prior.log_beta]),
        ]

    def after_step(self) -> None:
        """Replaces the weights by the constrained ones, which they stand for."""
        self.prior.dictionary.project_()

    def loss(self, problems: Problems, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """
        Returns the loss, and what the solver can start from when the batch returns.

        :param Problems problems: the batch.
        :param torch.Tensor start: the last coefficients; ``None`` for a new batch.
        """
        recipe = self.recipe
        problem = self.solver.pose(problems.y)
        rtol, max_iter = recipe.accuracy(new=start is None)
        equation = replace(problem.equation, start_coefficients=start, inner_rtol=rtol)
        penalty = equation.problem.penalty
        if isinstance(penalty, WeaklyConvexPenalty):
            penalty = replace(penalty, largest_slope=LARGEST_SLOPE)
            equation = replace(
                equation, problem=replace(equation.problem, penalty=penalty)
            )
        x_hat, result = self.solver.solve(
            replace(problem, equation=equation), rtol=rtol, max_iter=max_iter
        )
        loss = (x_hat - problems.x).abs().mean()
        return loss, result.state[0].detach()


def _gray_level(prior: PatchSynthesisPrior | SmoothPlusSparsePrior) -> int:
    """The noise level of the thresholds: 0.098 is 25 / 255, too."""
    return round(255 * prior.sigma.item())
