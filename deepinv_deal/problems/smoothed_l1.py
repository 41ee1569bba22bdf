r"""The derivative of attentive l1 reconstructions: absolute values rounded off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.problems.bounds import Bounds, clamp, projected_descent
from deepinv_deal.problems.data_term import DataTerm
from deepinv_deal.problems.equation import IterativeEquation
from deepinv_deal.problems.options import SolverOptions
from deepinv_deal.problems.quadratic import AttentiveEquation, FrozenSystem
from deepinv_deal.solvers import SolverResult
from deepinv_deal.solvers.implicit import LinearSolve

if TYPE_CHECKING:
    from deepinv_deal.problems.l1 import AttentiveL1


@dataclass(frozen=True)
class SmoothedL1Equation(IterativeEquation):
    r"""
    What :class:`AttentiveL1Equation` asks of the image near one solution, with absolute
    values rounded off: :math:`|u|` is replaced by :math:`\sqrt{u^2 + \delta^2}`.

    .. math::
        F(x) = b - H x - W^{\top} \big( c(x) \odot s(W x) \big), \qquad
        s(u) = \frac{\bar w}{c(\bar x)} + \frac{u}{\sqrt{u^2 + \delta^2}}
        - \frac{W \bar x}{\sqrt{(W \bar x)^2 + \delta^2}}

    with :math:`c(x) = \lambda \nu \, m(x)`, and with bounds as in
    :class:`AttentiveEquation`. At the solution :math:`(\bar x, \bar w)` the residual is
    that of the pair.

    A solution is a piecewise smooth function of the data: filter responses that are
    zero stay so. Which they are, a solution of finite accuracy does not tell. Where too
    many are taken to be zero, they tie up every pixel and the derivative vanishes.
    Rounded off, each response is held the less the larger it is, and nothing has to be
    decided. As :math:`\delta \to 0` at an exact solution, the derivative becomes that
    of the :math:`\ell_1` problem.

    With the mask frozen, :math:`-F_x = H + W^{\top} \operatorname{diag}\big( c \,
    \delta^2 / ((W x)^2 + \delta^2)^{3/2} \big) W` is the linear system of an attentive
    quadratic problem.

    :param DataTerm data: the data term.
    :param torch.Tensor lambda_reg: regularization weight per sample, ``(B,)``.
    :param AttentiveL1 regularizer: the regularizer.
    :param torch.Tensor delta: :math:`\delta` per sample, ``(B,)``.
    :param torch.Tensor sign: :math:`\bar w / c(\bar x)`, which stands for the signs of
        the responses, ``(B, C N, H, W)``.
    :param tuple bounds: smallest and largest value of the image; ``None``: none.
    :param SolverOptions options: ``inner_max_iter`` limits the linear systems.
    """

    data: DataTerm
    lambda_reg: Tensor
    regularizer: AttentiveL1
    delta: Tensor
    sign: Tensor
    bounds: Bounds | None = None
    options: SolverOptions = SolverOptions()

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Returns F(x), shape of ``x``; with the given mask instead of that of ``x``.
        """
        step = self.data.step
        return projected_descent(x, self._descent(x, mask), step, self.bounds)

    def _descent(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns F(x) without bounds."""
        Wx = self.regularizer.analyse(x)
        mask = self.regularizer.mask(x, Wx) if mask is None else mask
        change = Wx / self._rounded(Wx)
        sign = self.sign + (change - change.detach())
        return self.data.force(x) - self.regularizer.adjoint(self.bound(mask) * sign)

    def bound(self, mask: Tensor) -> Tensor:
        r"""Returns :math:`c = \lambda \nu m`, shape of the mask."""
        return expand(self.lambda_reg * self.regularizer.strength, mask) * mask

    def mask(self, x: Tensor) -> Tensor:
        """Returns the masks of an image, to be given to a call."""
        return self.regularizer.mask(x, self.regularizer.analyse(x))

    def image(self, x: Tensor) -> Tensor:
        """Returns the image of an unknown: itself."""
        return x

    def expanded(self, number: int) -> SmoothedL1Equation:
        """Returns the equation of one sample for ``number`` equal ones."""
        return replace(
            self,
            data=self.data.expanded(number),
            lambda_reg=self.lambda_reg.expand(number),
            delta=self.delta.expand(number),
            sign=self.sign.expand(number, -1, -1, -1),
        )

    def _rounded(self, Wx: Tensor) -> Tensor:
        return torch.hypot(Wx, expand(self.delta, Wx))

    def adjoint_solver(self, x: Tensor) -> LinearSolve:
        """Returns a solver for the transposed Jacobian with the mask frozen."""
        with torch.no_grad():
            system = FrozenSystem(self._quadratic(x), x)
            if self.bounds is None:
                return system.correction
            t = expand(self.data.step, x)
            target = x + t * self._descent(x)
            free = target == clamp(target, self.bounds)

        def solve(v: Tensor, rtol: Tensor) -> SolverResult:
            return system.correction_within(free, v, rtol)

        return solve

    def _quadratic(self, x: Tensor) -> AttentiveEquation:
        """The quadratic problem whose system is the derivative at ``x``."""
        Wx = self.regularizer.analyse(x)
        squared = self.bound(self.regularizer.mask(x, Wx)) / self._rounded(Wx)
        squared = squared * (expand(self.delta, Wx) / self._rounded(Wx)).square()
        return AttentiveEquation(
            self.data,
            torch.ones_like(self.lambda_reg),
            self.regularizer.quadratic(x, squared),
            self.bounds,
            SolverOptions(inner_max_iter=self.options.inner_max_iter),
        )
