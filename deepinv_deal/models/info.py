"""How a reconstruction went: the report of every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepinv_deal.solvers import SolverResult

Info = TypeVar("Info", bound="ReconstructionInfo")


@dataclass(kw_only=True)
class ReconstructionInfo:
    r"""
    How a reconstruction went, one entry per sample.

    :param torch.Tensor converged: whether ``imbalance`` met the tolerance, ``(B,)``.
    :param torch.Tensor status: :class:`deepinv_deal.solvers.Status` values, ``(B,)``.
    :param torch.Tensor n_iter: outer iterations, ``(B,)``.
    :param torch.Tensor inner_iter: iterations of the inner solver in total, ``(B,)``.
    :param torch.Tensor imbalance: nonlinear residual of the result relative to the
        force of the regularizer, ``(B,)``.
    :param torch.Tensor residual: the same relative to :math:`A^{\top} y`, ``(B,)``.
    :param torch.Tensor history: ``residual`` of every iterate, ``(n, B)``.
    :param torch.Tensor lambda_reg: regularization weight, absolute, ``(B,)``.
    :param float rtol: tolerance on the imbalance.
    :param torch.Tensor scale: intensity by which the data were divided, ``(B,)``.
    :param list notes: remarks on what was decided for the user.
    :param torch.Tensor sigma: noise level given to the model, in its [0, 1] units,
        ``(B,)``; ``None`` for models without.
    :param Callable compute_mask: returns the masks at the solution, see :attr:`mask`.
    """

    converged: Tensor
    status: Tensor
    n_iter: Tensor
    inner_iter: Tensor
    imbalance: Tensor
    residual: Tensor
    history: Tensor
    lambda_reg: Tensor
    rtol: float
    scale: Tensor
    notes: list[str] = field(default_factory=list)
    sigma: Tensor | None = None
    compute_mask: Callable[[], Tensor] | None = field(default=None, repr=False)

    @classmethod
    def of(cls: type[Info], result: SolverResult, **settings: Any) -> Info:
        """Makes the report of a solver's result; ``settings`` are the other fields."""
        return cls(
            converged=result.converged,
            status=result.status,
            n_iter=result.n_iter,
            inner_iter=result.n_inner,
            imbalance=result.weighted_residual,
            residual=result.residual,
            history=result.history,
            **settings,
        )

    @property
    def cg_iter(self) -> Tensor:
        """``inner_iter``, by the name of DEAL's inner solver, conjugate gradients."""
        return self.inner_iter

    @property
    def has_mask(self) -> bool:
        """Whether :attr:`mask` exists: not for models with a dictionary."""
        return self.compute_mask is not None or "mask" in self.__dict__

    @cached_property
    def mask(self) -> Tensor:
        """
        Masks at the solution, ``(B, num_filters, H, W)``; computed when asked for.
        """
        if self.compute_mask is None:
            raise AttributeError("This info holds no mask.")
        with torch.no_grad():
            return self.compute_mask()

    def __getstate__(self) -> dict[str, Any]:
        # A file cannot hold the function, but what it would have returned.
        if self.compute_mask is not None:
            _ = self.mask
        return {**self.__dict__, "compute_mask": None}
