r"""The reconstruction map near its fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deepinv_deal.interpret._models import attentive
from deepinv_deal.problems import AttentiveEquation, AttentiveL1Equation, Problem
from deepinv_deal.problems.data_term import FrozenCurvature
from deepinv_deal.solvers import (
    AdjointOptions,
    SolverResult,
    solve_equation,
    solve_linearized_system,
)
from deepinv_deal.solvers.conjugate_gradient import LinearMap

#: Accuracy of the linear solves, by dtype: some digits above rounding.
INNER_RTOL = {torch.float32: 1e-5, torch.float64: 1e-8}


def linearize(
    model: Any,
    y: Tensor,
    physics: Any = None,
    sigma: float | Tensor | str | None = None,
    *,
    lambda_reg: float | Tensor | None = None,
    init: Any = None,
    rtol: float = 1e-4,
    max_iter: int = 500,
    inner_rtol: float | None = None,
) -> Linearization:
    r"""
    Solves a problem accurately and returns what is needed to look around the solution.

    The solution :math:`\hat x = T(\hat x)` is found by the model's own engine with a
    tighter tolerance than is usual: derivatives of :math:`T` are wanted *at* the fixed
    point.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import linearize
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> at = linearize(model, torch.rand(1, 1, 16, 17), sigma=0.1)
    >>> at.image.shape, at.jacobian(torch.ones(2, 1, 16, 17)).shape
    (torch.Size([1, 1, 16, 17]), torch.Size([2, 1, 16, 17]))

    :param object model: :class:`deepinv_deal.DEAL`, :class:`deepinv_deal.SAFI` or
        :class:`deepinv_deal.MMR`.
    :param torch.Tensor y: measurements of one sample, as for the model.
    :param deepinv.physics.LinearPhysics physics: forward operator; ``None`` to denoise.
    :param float, torch.Tensor, str sigma: noise level, as for the model.
    :param float, torch.Tensor lambda_reg: weight, as for the model.
    :param object init: first image, as for the model.
    :param float rtol: tolerance on the imbalance of forces.
    :param int max_iter: largest number of outer iterations.
    :param float inner_rtol: relative accuracy of the linear solves with the result;
        ``None``: 1e-8 in double precision, 1e-5 in single precision.
    :return: (:class:`Linearization`)
    :raises TypeError: for a model without mask.
    :raises ValueError: for more than one sample.
    """
    attentive(model)
    with torch.no_grad():
        problem = model.pose(y, physics, sigma, lambda_reg=lambda_reg, init=init)
        problem = problem.precise
        if problem.equation.bounds is not None and isinstance(
            problem.equation, AttentiveEquation
        ):
            raise ValueError(
                "model has bounds, with which DEAL's frozen problems are no linear "
                "systems. Linearise a model without."
            )
        b = problem.data.b
        if problem.data.slices is not None:
            raise ValueError(
                f"y makes a volume, {tuple(problem.data.layout.shape)}, and vectors "
                "here are images. Examine its slices one by one."
            )
        if len(b) != 1:
            raise ValueError(
                f"y must hold one sample, got {len(b)} (shape {tuple(b.shape)}). "
                "Examine them one by one: y[i : i + 1]."
            )
        x, result = solve_equation(
            problem.equation,
            problem.equation.start(problem.init),
            rtol=rtol,
            max_iter=max_iter,
            forcing=model.solver.forcing,
            anderson=model.solver.anderson,
        )
    result.report("linearize", rtol, "Raise max_iter or relax rtol.")
    if isinstance(problem.equation, AttentiveL1Equation):
        smoothed = problem.equation.smoothed(x, model.adjoint.smoothing)
        x = problem.equation.image(x)
        problem = replace(problem, equation=smoothed)
    if inner_rtol is None:
        inner_rtol = INNER_RTOL[x.dtype]
    return Linearization(problem, x, result, inner_rtol)


@dataclass(frozen=True)
class Linearization:
    r"""
    The derivatives of the map :math:`T` and of the reconstruction at a fixed point.

    With the equation :math:`F(x) = A^{\top}(y - A x) - \lambda G(x) = 0` of DEAL and
    the normal operator of the last solve, the mask frozen at :math:`\hat x`,

    .. math::
        B = A^{\top} A + \lambda W^{\top} M(\hat x)^2 W, \qquad
        J = \frac{\partial T}{\partial x}(\hat x) = I + B^{-1} F_x, \qquad
        \frac{\partial \hat x}{\partial y} = (I - J)^{-1} B^{-1} A^{\top}
        = (-F_x)^{-1} A^{\top}.

    With a likelihood, :math:`T` also freezes its curvature D, :math:`B = A^{\top} D A +
    \lambda W^{\top} M(\hat x)^2 W`, and the right-hand side of :math:`\partial \hat x
    / \partial y` is another one.

    All products are exact up to the tolerance of the solver: those with :math:`F_x` by
    automatic differentiation, those with :math:`B^{-1}` by conjugate gradients, those
    with :math:`F_x^{-1}` by the engine of the backward pass.
    Vectors are batches ``(K, C, H, W)`` of images in the units of the model.

    Those of SAFI and MMR are derivatives of the smoothed equation,
    :class:`deepinv_deal.problems.SmoothedL1Equation`, with the model's
    ``adjoint.smoothing``. Only :meth:`jacobian_adjoint` is available.

    :param Problem problem: the problem.
    :param torch.Tensor x: the fixed point, ``(1, C, H, W)``.
    :param SolverResult result: how it was found.
    :param float inner_rtol: relative accuracy of the linear solves.
    """

    problem: Problem
    x: Tensor
    result: SolverResult
    inner_rtol: float

    @property
    def image(self) -> Tensor:
        """The reconstruction as an image of the physics, ``(1, C, H, W)``."""
        return self.problem.image(self.problem.equation.image(self.x))

    @property
    def mask(self) -> Tensor:
        """The masks at the solution, ``(1, N, H, W)``; ``(1, 2 N, ...)`` if complex."""
        with torch.no_grad():
            mask = self.problem.equation.mask(self.x)
        return mask.reshape(1, -1, *mask.shape[2:])

    # -- products, K vectors at once ---------------------------------------------

    def normal(self, v: Tensor) -> Tensor:
        r"""Returns :math:`B v`, shape of ``v``."""
        self._needs_linear_systems("normal")
        return self._each(lambda at, w: at.frozen.A(w), v)

    def solve(self, v: Tensor) -> Tensor:
        r"""Returns :math:`B^{-1} v`, shape of ``v``, by conjugate gradients."""
        self._needs_linear_systems("solve")
        return self._each(lambda at, w: at.invert(w), v)

    def jacobian(self, v: Tensor) -> Tensor:
        r"""Returns :math:`J v`, shape of ``v``."""
        self._needs_linear_systems("jacobian")
        return self._each(lambda at, w: at.invert(at.frozen_change(w)), v)

    def jacobian_adjoint(self, v: Tensor) -> Tensor:
        r"""Returns :math:`J^{\top} v`, shape of ``v``."""
        return self._each(lambda at, w: at.frozen_change.adjoint(at.invert(w)), v)

    def sensitivity(self, v: Tensor) -> Tensor:
        r"""
        Returns :math:`(I - J)^{-1} B^{-1} v`, shape of ``v``.

        For :math:`v = A^{\top} \delta` this is how the reconstruction answers to a
        small change :math:`\delta` of the measurements, mask included.
        """
        self._needs_linear_systems("sensitivity")
        return self._each(lambda at, w: at.invert_equation(at.change, w), v)

    def sensitivity_adjoint(self, v: Tensor) -> Tensor:
        r"""Returns :math:`B^{-1} (I - J^{\top})^{-1} v`, shape of ``v``."""
        self._needs_linear_systems("sensitivity_adjoint")
        return self._each(lambda at, w: at.invert_equation(at.change.adjoint, w), v)

    def data_normal(self, v: Tensor) -> Tensor:
        r"""
        Returns :math:`A^{\top} A v`, shape of ``v``.

        :raises ValueError: with a likelihood, whose measurements enter otherwise.
        """
        if not self.problem.data.quadratic:
            raise ValueError(
                "data_fidelity is not least squares, so the derivative in y is another "
                "one. Backpropagate through the model."
            )
        with torch.no_grad():
            return self.problem.data.normal(v)

    # -- inside --------------------------------------------------------------------

    def _needs_linear_systems(self, name: str) -> None:
        if not isinstance(self.problem.equation, AttentiveEquation):
            raise TypeError(
                f"{name} needs the linear systems of DEAL; the frozen problems of SAFI "
                "and MMR have none. jacobian_adjoint and spectral_radius work for them."
            )

    def _each(self, product: Callable[[_Copies, Tensor], Tensor], v: Tensor) -> Tensor:
        """Applies a product to vectors together, or to each where they cannot be."""
        if v.shape[1:] != self.x.shape[1:]:
            raise ValueError(
                f"v must be a batch of vectors of shape {tuple(self.x.shape[1:])}, got "
                f"shape {tuple(v.shape)}."
            )
        # Real and imaginary part are a batch already.
        together = not self.problem.data.complex_pair
        parts = [v] if together else v.split(1)
        return torch.cat([product(self._copies(len(part)), part) for part in parts])

    @cached_property
    def _cache(self) -> dict[int, _Copies]:
        return {}

    def _copies(self, number: int) -> _Copies:
        if number not in self._cache:
            self._cache.clear()  # the graph of one batch size is enough
            self._cache[number] = _Copies(self, number)
        return self._cache[number]


class _Copies:
    """The equation and its derivatives for several vectors at once."""

    def __init__(self, at: Linearization, number: int):
        self.rtol = at.inner_rtol
        self.equation: Any = at.problem.equation.expanded(number)
        self.x = at.x.expand(number, -1, -1, -1)
        self._solve = self.equation.adjoint_solver(self.x)

    @cached_property
    def frozen(self) -> Any:
        """The frozen problem."""
        with torch.no_grad():
            return self.equation.freeze(self.x)

    @cached_property
    def curvature(self) -> FrozenCurvature | None:
        """The frozen curvature of a likelihood."""
        return self.equation.data.frozen(self.x)

    @cached_property
    def frozen_change(self) -> _Derivative:
        """Derivative of F where only what is frozen follows the image."""

        def follow(z: Tensor) -> Tensor:
            F = self.equation(self.x, self.equation.mask(z))
            if self.curvature is None:
                return F
            # The force at z, without what the frozen data term makes of it.
            return F + self.equation.data.force(z) + self.curvature(z)

        return _Derivative(follow, self.x)

    @cached_property
    def change(self) -> _Derivative:
        """Derivative of F."""
        return _Derivative(self.equation, self.x)

    def invert(self, v: Tensor) -> Tensor:
        """Applies the inverse of the frozen problem's operator."""
        with torch.no_grad():
            result = self._solve(v, v.new_full((len(v),), self.rtol))
        return self._checked(result, "A linear solve")

    def invert_equation(self, product: LinearMap, v: Tensor) -> Tensor:
        """Applies the negative inverse of a derivative of F."""
        options = AdjointOptions(rtol=10 * self.rtol, max_iter=500)
        with torch.no_grad():
            result = solve_linearized_system(
                product, v, solve=self._solve, options=options
            )
        return self._checked(result, "A solve with the linearised equation")

    def _checked(self, result: SolverResult, what: str) -> Tensor:
        advice = (
            "The figure it enters is less accurate. Raise inner_max_iter of the model, "
            "or use double precision."
        )
        result.report(what, self.rtol, advice)
        return result.x.detach()


class _Derivative:
    """The Jacobian of a function at an image, by products."""

    def __init__(self, function: LinearMap, x: Tensor):
        with torch.enable_grad():
            self.x = x.detach().clone().requires_grad_()
            self.value = function(self.x)

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        # The vector-Jacobian product is linear in its cotangent: its own derivative in
        # the cotangent is the Jacobian-vector product. Splines have no forward mode.
        with torch.enable_grad():
            cotangent = torch.zeros_like(self.value, requires_grad=True)
            (pullback,) = torch.autograd.grad(
                self.value, self.x, cotangent, create_graph=True
            )
        return cotangent, pullback

    def __call__(self, v: Tensor) -> Tensor:
        """Applies the Jacobian."""
        cotangent, pullback = self._transposed
        return torch.autograd.grad(pullback, cotangent, v, retain_graph=True)[0]

    def adjoint(self, v: Tensor) -> Tensor:
        """Applies its transpose."""
        return torch.autograd.grad(self.value, self.x, v, retain_graph=True)[0]
