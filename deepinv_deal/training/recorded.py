"""What a training remembers of a solve that the model itself forgets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepinv_deal._batch import select
from deepinv_deal.problems.equation import IterativeEquation
from deepinv_deal.solvers import AdjointOptions, SolverResult


class Recorded(IterativeEquation):
    """
    An equation that keeps its last two iterates and the mask of its solution.

    Training solves it as the model does, and then asks how much the mask still moves.

    :param object equation: the equation of an attentive prior.
    """

    def __init__(self, equation: Any):
        self.equation = equation
        #: The last two iterates with their frozen problems, the older one first.
        self.iterates: list[tuple[Tensor, Any]] = []
        #: The mask at the solution, with gradients.
        self.mask_at_solution: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.equation, name)

    def freeze(self, x: Tensor) -> Any:
        """Freezes the weights at an iterate, and keeps both."""
        problem = self.equation.freeze(x)
        self.iterates = [*self.iterates[-1:], (x, problem)]
        return problem

    def attach(
        self, unknown: Tensor, options: AdjointOptions, mask: Tensor | None = None
    ) -> Tensor:
        """Makes the solution differentiable, and keeps its mask."""
        self.mask_at_solution = self.equation.mask(unknown) if mask is None else mask
        return self.equation.attach(unknown, options, self.mask_at_solution)

    def last_two(self, result: SolverResult) -> tuple[Tensor, Tensor]:
        """
        Returns the last iterate and the one before.

        Samples that are not finite are those of the result, which is the best iterate
        and need not be one of the two.

        :param SolverResult result: how the equation was solved.
        """
        before, last = (
            select(x.isfinite().flatten(1).all(1), x, result.x)
            for x, _ in (self.iterates[0], self.iterates[-1])
        )
        return last, before
