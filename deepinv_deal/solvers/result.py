"""What every solver returns, and the warning of those that did not converge."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class ConvergenceWarning(UserWarning):
    """A solver stopped before its tolerance was met."""


class Status(IntEnum):
    """Why a sample stopped."""

    #: The stopping rule is met.
    CONVERGED = 0
    #: The largest number of iterations was reached.
    MAX_ITER = 1
    #: The operator is not positive definite along a search direction.
    BREAKDOWN = 2
    #: NaN or infinity appeared.
    NON_FINITE = 3


@dataclass
class SolverResult:
    """
    Solution and status, one entry per sample.

    :param torch.Tensor x: solution, shape ``(B, ...)``.
    :param torch.Tensor status: :class:`Status` values, shape ``(B,)``.
    :param torch.Tensor n_iter: iterations, shape ``(B,)``.
    :param torch.Tensor residual: relative residual at ``x``, shape ``(B,)``.
    :param torch.Tensor n_inner: iterations of the inner solver in total, shape
        ``(B,)``.
    :param torch.Tensor history: residual at every outer iteration, shape ``(n, B)``.
    :param object state: all unknowns of a solver that has more than ``x``; a warm start
        for another run.
    """

    x: Tensor
    status: Tensor
    n_iter: Tensor
    residual: Tensor
    n_inner: Tensor | None = None
    history: Tensor | None = None
    state: Any = None

    @property
    def converged(self) -> Tensor:
        """Whether each sample met the stopping rule, shape ``(B,)``, boolean."""
        return self.status == Status.CONVERGED

    def warn(self, what: str, rtol: float, advice: str, stacklevel: int = 3) -> None:
        """Issues one :class:`ConvergenceWarning` if a sample did not converge."""
        failed = (~self.converged).nonzero().flatten().tolist()
        if not failed:
            return
        worst = max(failed, key=lambda i: float(self.residual[i].nan_to_num(torch.inf)))
        warnings.warn(
            f"{what} did not converge for {len(failed)} of {len(self.status)} samples "
            f"(index {', '.join(map(str, failed[:8]))}{', ...' * (len(failed) > 8)}). "
            f"Worst: {Status(int(self.status[worst])).name} after "
            f"{int(self.n_iter[worst])} iterations, relative residual "
            f"{float(self.residual[worst]):.1e}, asked for {rtol:.1e}. {advice}",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )
