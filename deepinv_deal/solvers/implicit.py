"""Implicit differentiation of solutions: gradients without the iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from deepinv_deal._batch import norm
from deepinv_deal.solvers.fixed_point import (
    Callback,
    FrozenProblem,
    LinearProblem,
    fixed_point,
)
from deepinv_deal.solvers.precision import solver_precision
from deepinv_deal.solvers.result import SolverResult

NO_SECOND_DERIVATIVES = (
    "Solutions by implicit differentiation are differentiable once. Second derivatives "
    "(hvp, vhp, torch.autograd.functional.jvp, a penalty on gradients) do not exist. "
    "Products with the Jacobian are those of deepinv_deal.interpret.linearize."
)
NO_FORWARD_MODE = (
    "Solutions by implicit differentiation have no forward mode. Use backward or "
    "torch.autograd.grad; products with the Jacobian are those of "
    "deepinv_deal.interpret.linearize."
)

AdjointSolve = Callable[[Tensor], Tensor]

#: ``solve(r, rtol)``: approximate solution of a linear system, relative tolerance (B,).
LinearSolve = Callable[[Tensor, Tensor], SolverResult]


class SolvedEquation(Protocol):
    r"""
    What a solution satisfies: :math:`F(x) = 0`.

    Calling the object evaluates :math:`F`, differentiable in the unknown and in
    everything the equation depends on.
    """

    def __call__(self, x: Tensor, /) -> Tensor:
        """Returns the residual F(x), shape of ``x``."""
        ...

    def adjoint_solver(self, x: Tensor, /) -> LinearSolve:
        r"""
        Returns a solver for :math:`-F_x^{\top}`, or a symmetric part that can be
        inverted: for frozen weights.
        """
        ...


class Equation(SolvedEquation, Protocol):
    r"""
    What a model asks of an image, solved by freezing its weights again and again.
    """

    def freeze(self, x: Tensor, /) -> FrozenProblem:
        """Returns the convex problem with all weights frozen at ``x``."""
        ...


@dataclass(frozen=True)
class AdjointOptions:
    r"""
    How the backward pass solves :math:`-F_x^{\top} w = v`.

    :param bool jacobian_free: freeze the weights in :math:`F_x`: one symmetric solve,
        an approximation that is cheap and usually good enough for training.
    :param float rtol: tolerance on the relative residual of the adjoint system.
    :param int max_iter: largest number of outer iterations (exact gradients only).
    :param float forcing: accuracy of the inner solves (exact gradients only).
    :param int anderson: depth of Anderson acceleration (exact gradients only).
    :param float smoothing: SAFI and MMR only: filter responses are differentiated as
        if absolute values were rounded off below this, relative to the root mean square
        of all responses. Smaller is closer to the derivative of the exact solution,
        which jumps from kink to kink, but needs more accurate solutions to make sense;
        see :class:`deepinv_deal.problems.SmoothedL1Equation`.
    :param bool strict: raise a :class:`ConvergenceError` if the system is not solved,
        instead of a warning.
    """

    jacobian_free: bool = False
    rtol: float = 1e-4
    max_iter: int = 100
    forcing: float = 0.1
    anderson: int = 5
    smoothing: float = 0.1
    strict: bool = False

    def made_strict(self, strict: bool) -> AdjointOptions:
        """Returns the same options, strict if they are or ``strict`` says so."""
        return replace(self, strict=self.strict or strict)


def anderson_depth(equation: object, anderson: int | None = None) -> int:
    """
    Returns the given depth of Anderson acceleration, or what suits an equation.

    :param Equation equation: says what suits it in an attribute ``anderson``; without,
        none does.
    :param int anderson: the depth, ``None`` if it is not given.
    """
    return int(getattr(equation, "anderson", 0)) if anderson is None else anderson


def solve_equation(
    equation: Equation,
    init: Tensor,  # (B, ...)
    *,
    rtol: float = 1e-4,
    max_iter: int = 100,
    forcing: float = 0.5,
    anderson: int | None = None,
    damped: bool = True,
    callback: Callback | None = None,
    adjoint: AdjointOptions | None = None,
) -> tuple[Tensor, SolverResult]:
    r"""
    Solves :math:`F(x) = 0` with :func:`fixed_point` and attaches implicit gradients.

    The iterations run without gradient tracking; memory does not grow with their
    number. If gradients are enabled and anything in the equation requires them, the
    solution is differentiable through :func:`implicit_solution`.

    :param Equation equation: the equation of the model for given data and weights.
    :param torch.Tensor init: first image, shape ``(B, ...)``.
    :param float rtol: tolerance on the nonlinear residual, see :func:`fixed_point`.
    :param int max_iter: see :func:`fixed_point`.
    :param float forcing: see :func:`fixed_point`.
    :param int anderson: see :func:`fixed_point`; ``None``: what suits the equation,
        see :func:`anderson_depth`.
    :param bool damped: see :func:`fixed_point`.
    :param Callable callback: see :func:`fixed_point`.
    :param AdjointOptions adjoint: settings of the backward pass.
    :return: the solution, shape of ``init``, and the :class:`SolverResult`.
    """
    options = adjoint or AdjointOptions()
    with torch.no_grad(), solver_precision(init.device):
        result = fixed_point(
            equation.freeze,
            init.detach(),
            rtol=rtol,
            max_iter=max_iter,
            forcing=forcing,
            anderson=anderson_depth(equation, anderson),
            damped=damped,
            callback=callback,
        )
    return attach_gradient(equation, result.x, options), result


def attach_gradient(
    equation: SolvedEquation,
    x: Tensor,
    options: AdjointOptions,
    residual: Tensor | None = None,
) -> Tensor:
    """
    Makes the solution ``x`` of an equation differentiable in all that the equation
    holds.

    Returns ``x`` itself if gradients are disabled or nothing requires them.

    :param SolvedEquation equation: the equation that ``x`` solves.
    :param torch.Tensor x: solution, shape ``(B, ...)``.
    :param AdjointOptions options: settings of the backward pass.
    :param torch.Tensor residual: ``equation(x)`` with gradients, if it is known
        already.
    """
    if not torch.is_grad_enabled():
        return x
    x = x.detach()
    if residual is None:
        residual = equation(x)
    if not residual.requires_grad:
        return x

    def solve_adjoint(v: Tensor) -> Tensor:
        solve = equation.adjoint_solver(x)
        if options.jacobian_free:
            answer = solve(v, torch.full_like(norm(v), options.rtol))
        else:
            answer = solve_adjoint_system(equation, x, v, solve=solve, options=options)
        answer.report(
            "The adjoint system of the backward pass",
            options.rtol,
            "Gradients are inaccurate. Raise the iteration limits of the adjoint, or "
            "relax "
            "its rtol if this accuracy is not needed.",
            strict=options.strict,
        )
        return answer.x

    return implicit_solution(x, residual, solve_adjoint)


def implicit_solution(
    x: Tensor, residual: Tensor, solve_adjoint: AdjointSolve
) -> Tensor:
    r"""
    Gives the solution :math:`x` of :math:`F(x, \theta) = 0` its derivative in
    :math:`\theta`.

    By the implicit function theorem :math:`\mathrm{d}x = -F_x^{-1} F_\theta\,
    \mathrm{d}\theta`. For a cotangent :math:`v` the backward pass therefore solves

    .. math::
        -F_x(x, \theta)^{\top} w = v

    and hands :math:`w` to the residual, whose graph continues to everything that
    :math:`F` depends on. Nothing of the iterations that found :math:`x` is stored.
    Leaving terms out of :math:`F_x` in ``solve_adjoint`` gives Jacobian-free variants.

    :param torch.Tensor x: solution, shape ``(B, ...)``, detached.
    :param torch.Tensor residual: :math:`F(x, \theta)`, shape of ``x``, with ``x`` held
        fixed and the graph of :math:`\theta` attached.
    :param Callable solve_adjoint: maps :math:`v` to :math:`w`, both shape of ``x``.
    :return: the values of ``x``, differentiable in :math:`\theta`.
    """
    return _ImplicitSolution.apply(residual, x.detach(), solve_adjoint)


class _ImplicitSolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        x: Tensor,
        solve_adjoint: AdjointSolve,
    ) -> Tensor:
        ctx.solve_adjoint = solve_adjoint
        ctx.save_for_backward(residual)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        # The backward pass may have been started inside a region of autocast.
        with torch.no_grad(), solver_precision(v.device):
            w = ctx.solve_adjoint(v)
        if torch.is_grad_enabled():
            w = _FirstDerivative.apply(w, v, *ctx.saved_tensors)
        return w, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:  # noqa: ARG004
        raise RuntimeError(NO_FORWARD_MODE)


class _FirstDerivative(Function):
    """
    Passes on what depends on ``v`` and the residual in ways that are not differentiated
    once more. Without this, second derivatives would miss a part without a word.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor, residual: Tensor) -> Tensor:  # noqa: ARG004
        return w.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(NO_SECOND_DERIVATIVES)


def solve_adjoint_system(
    F: Callable[[Tensor], Tensor],  # (B, ...) -> (B, ...)
    x: Tensor,  # (B, ...)
    v: Tensor,  # (B, ...)
    *,
    solve: LinearSolve,
    options: AdjointOptions,
) -> SolverResult:
    r"""
    Solves :math:`-F_x^{\top} w = v` by :func:`solve_linearized_system`.

    :param Callable F: the residual as a function of the image alone.
    :param torch.Tensor x: solution of :math:`F(x) = 0`.
    :param torch.Tensor v: cotangent.
    :param Callable solve: approximate inverse, as there; its operator is the symmetric
        part of :math:`-F_x` that can be inverted (for frozen weights: the normal
        operator).
    :param AdjointOptions options: tolerance, limits.
    :return: (:class:`SolverResult`) with :math:`w` in ``x``.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = F(x)

    def pullback(w: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, w, retain_graph=True)[0]

    return solve_linearized_system(pullback, v, solve=solve, options=options)


def solve_linearized_system(
    product: Callable[[Tensor], Tensor],  # (B, ...) -> (B, ...)
    v: Tensor,  # (B, ...)
    *,
    solve: LinearSolve,
    options: AdjointOptions,
) -> SolverResult:
    r"""
    Solves :math:`-L w = v` with the fixed-point engine.

    :math:`L` is the Jacobian of an equation or its transpose. With :math:`P` the part
    of :math:`-L` that ``solve`` can invert, the iteration is :math:`w \leftarrow w +
    P^{-1}(v + L w)`. It starts at zero, so its first step is the Jacobian-free answer.

    :param Callable product: applies :math:`L`.
    :param torch.Tensor v: right-hand side.
    :param Callable solve: ``solve(r, rtol)`` approximates :math:`P^{-1} r` to the
        per-sample relative tolerance ``rtol (B,)``.
    :param AdjointOptions options: tolerance on :math:`\|v + L w\| / \|v\|`, limits.
    :return: (:class:`SolverResult`) with :math:`w` in ``x``.
    """
    v_norm = norm(v)
    v_norm = v_norm.where(v_norm != 0, 1)

    def freeze(w: Tensor) -> _LinearizedStep:
        return _LinearizedStep(w, v + product(w), v_norm, solve)

    return fixed_point(
        freeze,
        torch.zeros_like(v),
        rtol=options.rtol,
        max_iter=options.max_iter,
        forcing=options.forcing,
        anderson=options.anderson,
    )


class _LinearizedStep(LinearProblem):
    """One step of that iteration: the part of :math:`L` beyond P is frozen."""

    def __init__(self, w: Tensor, r: Tensor, v_norm: Tensor, solve: LinearSolve):
        self.x, self.r, self.invert = w, r, solve
        self.residual = norm(r) / v_norm

    def correction(
        self,
        r: Tensor,
        rtol: Tensor,
        active: Tensor,  # noqa: ARG002 - the solver tries nothing out
    ) -> SolverResult:
        return self.invert(r, rtol)
