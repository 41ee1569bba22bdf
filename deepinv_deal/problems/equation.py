"""What all equations have in common that are solved by freezing their weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from deepinv_deal.problems.options import DEFAULT_RTOL, SolverOptions
from deepinv_deal.solvers import (
    AdjointOptions,
    SolverResult,
    attach_gradient,
    solve_equation,
)
from deepinv_deal.solvers.fixed_point import Callback


class IterativeEquation:
    """
    An equation :math:`F(x) = 0` that the fixed-point engine solves.

    A subclass has the members of :class:`deepinv_deal.solvers.Equation`, an attribute
    ``options``, and ``anderson``, the depth of acceleration that suits it.
    """

    options: SolverOptions

    #: Tolerance that suits it.
    default_rtol: ClassVar[float] = DEFAULT_RTOL

    def solve(
        self: Any,
        start: Tensor,
        *,
        rtol: float | None = None,
        max_iter: int,
        adjoint: AdjointOptions | None = None,
        callback: Callback | None = None,
    ) -> tuple[Tensor, SolverResult]:
        """
        Solves the equation, with implicit gradients.

        :param torch.Tensor start: first unknown.
        :param float rtol: tolerance on the imbalance of forces; ``None``: what suits.
        :param int max_iter: largest number of outer iterations.
        :param AdjointOptions adjoint: settings of the backward pass.
        :param Callable callback: called as ``callback(k, before, after)`` with the
            unknowns before and after every outer iteration.
        :return: the unknown, and how it was found.
        """
        with torch.no_grad():
            unknown, result = solve_equation(
                self,
                start,
                rtol=self.default_rtol if rtol is None else rtol,
                max_iter=max_iter,
                forcing=self.options.forcing,
                anderson=self.options.anderson,
                callback=callback,
            )
        return self.attach(unknown, adjoint or AdjointOptions()), result

    def attach(
        self: Any,
        unknown: Tensor,
        options: AdjointOptions,
        mask: Tensor | None = None,
    ) -> Tensor:
        """
        Makes a solution differentiable in all that the equation holds.

        :param torch.Tensor unknown: the solution.
        :param AdjointOptions options: settings of the backward pass.
        :param torch.Tensor mask: its masks with gradients, if they are known already.
        :return: the same values.
        """
        residual = None if mask is None else self(unknown, mask)
        return attach_gradient(self, unknown, options, residual)
