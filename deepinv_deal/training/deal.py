"""The training of DEAL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepinv_deal._batch import select
from deepinv_deal.models.deal import DEAL
from deepinv_deal.priors import AttentiveQuadraticPrior, DEALPrior
from deepinv_deal.problems import SolverOptions
from deepinv_deal.solvers import AdjointOptions
from deepinv_deal.training.data import Problems, numbered_generator
from deepinv_deal.training.engine import Trainer
from deepinv_deal.training.growth import color_from_gray, grow
from deepinv_deal.training.losses import deal_loss
from deepinv_deal.training.recipes import DEALRecipe
from deepinv_deal.training.recorded import Recorded
from deepinv_deal.weights import load

Prior = TypeVar("Prior", bound=AttentiveQuadraticPrior)


class AttentiveQuadraticTrainer(Trainer[DEALRecipe, Prior]):
    """
    Trains any :class:`deepinv_deal.priors.AttentiveQuadraticPrior`; see
    :class:`Trainer`.

    A subclass gives the prior to train, in ``new_prior``.

    :param DEALRecipe recipe: settings.
    :param bool resume: go on from ``state.pt`` if there is one.
    """

    def new_model(self, prior: Prior) -> DEAL:
        """Returns the model around a prior, which validation calls."""
        return DEAL(pretrained=None, prior=prior, warn=False, scale=None)

    @cached_property
    def solver(self) -> DEAL:
        """The model whose solves are differentiated."""
        recipe = self.recipe
        return DEAL(
            pretrained=None,
            prior=self.prior,
            warn=False,
            scale=None,
            solver=SolverOptions(anderson=0, preconditioner="none"),
            adjoint=AdjointOptions(recipe.jacobian_free, recipe.adjoint_rtol),
        )

    def parameter_groups(self) -> Sequence[tuple[float, Sequence[nn.Parameter]]]:
        """Returns factors on the learning rate, with the parameters they are for."""
        # kappa counts gray levels, of order 1 to 30, all else is of order 0.01 to 1.
        kappa = list(self.prior.kappa.parameters())
        others = [p for p in self.prior.parameters() if all(p is not k for k in kappa)]
        return [(1.0, others), (10.0, kappa)]

    def _depth(self, new: bool) -> int:
        """The number of outer iterations of this step."""
        recipe = self.recipe
        low, high = recipe.warm_depth_min, recipe.warm_depth_max
        # Fixed points of the first, random weights are not worth finding.
        if new and (self.step >= recipe.pool or recipe.pool == 1):
            low, high = recipe.depth_min, recipe.depth_max
        rng = numbered_generator(recipe.seed, self.step)
        return int(torch.randint(low, high + 1, (), generator=rng, device="cpu"))

    def loss(self, problems: Problems, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """
        Returns the loss, and what the solver can start from when the batch returns.

        :param Problems problems: the batch.
        :param torch.Tensor start: the last images; ``None`` for a new batch.
        """
        recipe = self.recipe
        problem = self.solver.pose(problems.y, sigma=problems.sigma)
        recorded = Recorded(problem.equation)
        x_hat, result = self.solver.solve(
            replace(problem, equation=recorded),
            start,
            rtol=recipe.rtol,
            max_iter=self._depth(start is None),
        )
        mask = recorded.mask_at_solution
        assert mask is not None
        # The result need not be the last iterate: it is the best. Where it is the one
        # before, that one's mask has not changed, and the last one's is compared. The
        # mask at the solution stands for those of iterates that are not finite.
        (_, previous), (last, frozen) = recorded.iterates[0], recorded.iterates[-1]
        is_last = (result.x == last).flatten(1).all(1)
        other = select(is_last, previous.squared_mask, frozen.squared_mask)
        finite = other.flatten(1).isfinite().all(1)
        other = select(finite, other, mask.detach().square())
        weights = (problems.sigma / recipe.sigma_max + 0.1) ** -recipe.balance
        loss = deal_loss(
            x_hat,
            problems.x,
            mask,
            other.sqrt(),
            self.prior.splines(),
            gamma=recipe.gamma,
            drift=recipe.drift,
            weights=None if recipe.logarithmic else weights,
            logarithmic=recipe.logarithmic,
        )
        return loss, result.x


class DEALTrainer(AttentiveQuadraticTrainer[DEALPrior]):
    """
    Trains a :class:`deepinv_deal.priors.DEALPrior`; see :class:`Trainer`.

    :param DEALRecipe recipe: settings.
    :param bool resume: go on from ``state.pt`` if there is one.
    """

    def new_prior(self) -> DEALPrior:
        """Returns a prior with random weights."""
        recipe = self.recipe
        return DEALPrior(recipe.in_channels, recipe.num_filters, recipe.normalization)

    def load_prior(self, pretrained: str) -> DEALPrior:
        """
        Returns the prior with the weights of ``recipe.init``, grown if too small, and
        made for colour if it is for gray images and the recipe is not.
        """
        in_channels, num_filters = self.recipe.in_channels, self.recipe.num_filters
        prior = load(pretrained, DEALPrior, in_channels=in_channels)
        if (prior.in_channels, in_channels) == (1, 3):
            return color_from_gray(prior, num_filters)
        return grow(prior, num_filters) if prior.num_filters < num_filters else prior

    def describe(self, prior: DEALPrior) -> dict[str, Any]:
        """Returns what the recipe says about a prior, by the names it uses."""
        return {
            "in_channels": prior.in_channels,
            "num_filters": prior.num_filters,
            "normalization": prior.normalization,
        }
