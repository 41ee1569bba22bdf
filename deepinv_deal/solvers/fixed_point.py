"""The outer iteration of every model: freeze the weights, solve, repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from deepinv_deal.solvers.damping import Damping
from deepinv_deal.solvers.forcing import Forcing
from deepinv_deal.solvers.frozen import LEAST_FORCE, FrozenProblem, LinearProblem
from deepinv_deal.solvers.picard import Picard
from deepinv_deal.solvers.result import SolverResult

__all__ = [
    "LEAST_FORCE",
    "Callback",
    "FrozenProblem",
    "LinearProblem",
    "fixed_point",
]

#: ``callback(k, x_previous, x)`` after outer iteration ``k = 0, 1, ...``
Callback = Callable[[int, Tensor, Tensor], None]


def fixed_point(
    freeze: Callable[[Tensor], FrozenProblem],
    init: Tensor,  # (B, ...)
    *,
    rtol: float = 1e-4,
    max_iter: int = 100,
    forcing: float = 0.5,
    anderson: int = 0,
    damped: bool = True,
    callback: Callback | None = None,
) -> SolverResult:
    r"""
    Finds :math:`x = T(x)`, where :math:`T(z)` solves a problem whose weights are frozen
    at :math:`z`, by :math:`x_{k+1} \approx T(x_k)`.

    Sample :math:`i` stops, and is left unchanged, as soon as its nonlinear residual is
    at most ``rtol`` times the weight that the problem gives it. That residual is
    recomputed with fresh weights at every iterate: a small step :math:`x_{k+1} - x_k`
    is no evidence of convergence when the inner solves are inexact.

    The inner problems are solved just well enough: their residual is reduced by at
    least the factor ``forcing`` (the first time 0.1), more if the frozen problem has
    turned out to predict the nonlinear residual well, and never far below ``rtol``
    (choice 1 of :footcite:t:`eisenstat1996choosing`).

    Where :math:`T` overshoots, the iterates would oscillate. Steps are therefore
    damped: a sample whose residual has not fallen moves only a fraction of the way to
    :math:`T(x_k)`, and soon returns to full steps, later and from a smaller fraction
    if its last two steps went back and forth. Fixed points stay the same.

    With ``anderson=m``, a step starts at the combination of the last :math:`m` images
    and :math:`x_k` that would have the least residual if residuals were affine,

    .. math::
        \bar x = x_k - \sum_j \gamma_j (x_k - x_j), \qquad
        \bar r = r_k - \sum_j \gamma_j (r_k - r_j), \qquad
        \gamma = \arg\min \|\bar r\|_2,

    and solves the frozen linear system for :math:`\bar r`. This is Anderson
    acceleration (:footcite:t:`walker2011anderson`) with the residuals of the nonlinear
    equation in place of the steps: what they tell does not suffer from rough inner
    solves, which therefore keep to ``forcing``. It is safeguarded: a step from a
    combination that raises the residual, or makes it NaN, is taken back and the history
    dropped, for that sample only; that takes an iteration without an inner solve. It
    starts where the frozen problem says so, see :attr:`LinearProblem.near`. Where it
    does not halve the residual in 15 iterations, damped steps take over for good.

    If a sample does not converge, the iterate with the smallest weighted residual is
    returned.

    :param Callable freeze: maps an image batch to its :class:`FrozenProblem`.
    :param torch.Tensor init: first image, shape ``(B, ...)``. Not modified.
    :param float rtol: tolerance on the nonlinear residual, divided by its weight. With
        ``0``, ``max_iter`` iterations are run.
    :param int max_iter: largest number of outer iterations.
    :param float forcing: largest factor, in (0, 1), by which an inner solve reduces the
        residual.
    :param int anderson: depth of the acceleration; ``0`` switches it off.
    :param bool damped: shorten steps where the residual rises; with Anderson
        acceleration from when it is given up.
    :param Callable callback: called as ``callback(k, x_previous, x)`` after each
        iteration.
    :return: (:class:`SolverResult`) with the inner iterations in ``n_inner``, the
        nonlinear residuals of all iterates in ``history`` and the weighted residual of
        the result in ``weighted_residual``.
    :raises ValueError: if ``forcing`` is not in (0, 1), a number is negative, or
        Anderson acceleration is asked for and the frozen problems are not linear.
    """
    if not 0 < forcing < 1:
        raise ValueError(f"forcing must lie in (0, 1), got {forcing}.")
    if not rtol >= 0 or max_iter < 0 or anderson < 0:
        raise ValueError(
            "rtol, max_iter and anderson must not be negative, got "
            f"{rtol}, {max_iter}, {anderson}."
        )
    method = Picard(rtol, Forcing(forcing, rtol), Damping(damped), anderson)
    return _iterate(method, freeze, init, max_iter, callback)


class Iterate(Protocol):
    """What the loop reads of the state of a method."""

    @property
    def x(self) -> Tensor:
        """The image, ``(B, ...)``."""
        ...

    @property
    def residual(self) -> Tensor:
        """Its nonlinear residual, ``(B,)``."""
        ...


State = TypeVar("State", bound=Iterate)


class Method(Protocol[State]):
    """
    A way to get from image to image; the state of the iteration is all it remembers.
    """

    def init(self, x: Tensor, problem: FrozenProblem) -> State:
        """Returns the state at the first image, whose frozen problem is given."""
        ...

    def step(self, state: State) -> State:
        """Returns the state with the next image, which is not assessed yet."""
        ...

    def assess(self, state: State, problem: FrozenProblem) -> State:
        """Completes the state after a step by what its frozen problem tells."""
        ...

    def terminate(self, state: State) -> bool:
        """Returns whether no sample goes on."""
        ...

    def result(self, state: State, history: Tensor) -> SolverResult:
        """Returns the result, with the residuals of all iterates ``(n, B)``."""
        ...


def _iterate(
    method: Method[State],
    freeze: Callable[[Tensor], FrozenProblem],
    init: Tensor,
    max_iter: int,
    callback: Callback | None,
) -> SolverResult:
    state = method.init(init, freeze(init))
    history = [state.residual]
    for k in range(max_iter):
        if method.terminate(state):
            break
        previous, state = state.x, method.step(state)
        if callback is not None:
            callback(k, previous, state.x)
        state = method.assess(state, freeze(state.x))
        history.append(state.residual)
    return method.result(state, torch.stack(history))
