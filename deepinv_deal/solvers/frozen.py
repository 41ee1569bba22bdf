"""The convex problems that are left when the weights of a model are frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.solvers.result import SolverResult


class FrozenProblem(Protocol):
    r"""
    The convex problem left when the weights are frozen at an image :math:`x_k`.

    It may also have an attribute ``weight``, ``(B,)``: the residual that counts as 1
    when it is compared with ``rtol``.
    """

    @property
    def residual(self) -> Tensor:
        r"""
        How far :math:`x_k` itself is from solving the problem, ``(B,)``, relative.

        This is the *nonlinear* residual of the model at :math:`x_k`.
        """
        ...

    def solve(self, rtol: Tensor, active: Tensor) -> SolverResult:
        """
        Returns the solution, started at the image where the problem was frozen.

        Its ``residual`` is the fraction of the problem's residual that remains.

        :param torch.Tensor rtol: factor by which to reduce ``residual``, shape
            ``(B,)``.
        :param torch.Tensor active: samples to work on, shape ``(B,)``; others stay.
        """
        ...


class LinearProblem(ABC):
    """
    A frozen problem that is a linear system, as Anderson acceleration needs.

    A subclass sets the attributes ``x``, the image where it was frozen, ``r``, the
    residual vector there, and ``residual``, see :class:`FrozenProblem`.
    """

    x: Tensor
    r: Tensor
    residual: Tensor

    @property
    def near(self) -> Tensor:
        """
        Samples near enough to the fixed point for residuals to be about affine,
        ``(B,)``: only those are accelerated. In the base class, all.
        """
        return torch.ones_like(self.residual, dtype=torch.bool)

    @abstractmethod
    def correction(self, r: Tensor, rtol: Tensor, active: Tensor) -> SolverResult:
        """
        Returns the solution of the system with the right-hand side ``r``.

        :param torch.Tensor r: shape of the image, zero for samples not ``active``.
        :param torch.Tensor rtol: relative tolerance, ``(B,)``.
        :param torch.Tensor active: samples to work on, ``(B,)``.
        """

    def solve(self, rtol: Tensor, active: Tensor) -> SolverResult:
        """Reduces the residual of the active samples by the factor ``rtol (B,)``."""
        return self.solve_from(self.x, self.r, rtol, active)

    def solve_from(
        self, x: Tensor, r: Tensor, rtol: Tensor, active: Tensor
    ) -> SolverResult:
        """
        As :meth:`solve`, started at another image.

        :param torch.Tensor x: that image, ``(B, ...)``.
        :param torch.Tensor r: the residual vector there, as far as it is known.
        :param torch.Tensor rtol: factor by which to reduce ``r``, ``(B,)``.
        :param torch.Tensor active: samples to work on, ``(B,)``; others get ``x``.
        """
        # A zero right-hand side costs a sample no iterations and changes nothing.
        step = self.correction(r * expand(active, r), rtol, active)
        step.x = x + step.x
        return step


#: When a residual is compared with the force of the regularizer, the force counts for
#: at least this fraction of the right-hand side: without force, zero cannot be reached.
LEAST_FORCE = 1e-4
