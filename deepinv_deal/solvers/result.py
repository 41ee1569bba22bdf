"""What every solver returns, and the warning of those that did not converge."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._warnings import warn


class ConvergenceWarning(UserWarning):
    """A solver stopped before its tolerance was met."""


class ConvergenceError(RuntimeError):
    """
    A solver stopped before its tolerance was met, where this is an error.

    Its ``result`` is the :class:`SolverResult`, with the status of every sample and the
    iterate that was found.
    """

    result: SolverResult


class Status(IntEnum):
    """Why a sample stopped."""

    #: A fixed number of iterations was run, as asked; nothing was to be met.
    FINISHED = -1
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
    :param torch.Tensor weighted_residual: what was compared with the tolerance if the
        problem weights its residual, the residual itself otherwise, shape ``(B,)``.
    :param object state: all unknowns of a solver that has more than ``x``; a warm start
        for another run.
    """

    x: Tensor
    status: Tensor
    n_iter: Tensor
    residual: Tensor
    n_inner: Tensor = None  # type: ignore[assignment]
    history: Tensor = None  # type: ignore[assignment]
    weighted_residual: Tensor = None  # type: ignore[assignment]
    state: Any = None

    def __post_init__(self) -> None:
        """Fills in what a solver without inner solver or weights need not say."""
        if self.n_inner is None:
            self.n_inner = torch.zeros_like(self.n_iter)
        if self.history is None:
            self.history = self.residual[None]
        if self.weighted_residual is None:
            self.weighted_residual = self.residual

    @property
    def converged(self) -> Tensor:
        """Whether each sample met the stopping rule, shape ``(B,)``, boolean."""
        return self.status == Status.CONVERGED

    def report(
        self,
        what: str,
        rtol: float,
        advice: str,
        *,
        strict: bool = False,
    ) -> None:
        """
        Issues one :class:`ConvergenceWarning` if a sample did not converge.

        :param str what: what did not converge.
        :param float rtol: tolerance that was asked for. With ``0``, to run all
            iterations is no failure.
        :param str advice: what to do.
        :param bool strict: raise :class:`ConvergenceError` instead.
        """
        # With a tolerance of 0, to run all iterations is what was asked for.
        least = Status.MAX_ITER if rtol else Status.BREAKDOWN
        failed = [i for i, s in enumerate(self.status.tolist()) if s >= least]
        if not failed:
            return
        judged = self.weighted_residual
        measure = "relative residual" if judged is self.residual else "imbalance"
        worst = max(failed, key=lambda i: float(judged[i].nan_to_num(torch.inf)))
        message = (
            f"{what} did not converge for {len(failed)} of {len(self.status)} samples "
            f"(index {', '.join(map(str, failed[:8]))}{', ...' * (len(failed) > 8)}). "
            f"Worst: {Status(int(self.status[worst])).name} after "
            f"{int(self.n_iter[worst])} iterations, {measure} "
            f"{float(judged[worst]):.1e}, asked for {rtol:.1e}. {advice}"
        )
        if strict:
            error = ConvergenceError(message)
            error.result = self
            raise error
        warn(message, ConvergenceWarning)
