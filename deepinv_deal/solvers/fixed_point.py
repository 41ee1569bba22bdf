"""The outer iteration of every model: freeze the weights, solve, repeat."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

from deepinv_deal._batch import expand, norm, select
from deepinv_deal.solvers.result import SolverResult, Status


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

#: Factor by which the first inner solve reduces the residual, unless ``forcing`` is
#: less.
FIRST_FORCING = 0.1

#: Part of the tolerance that the last inner solve aims at. Half of it took up to a
#: third more applications on trained weights.
AIM = 0.9

#: Steps are shortened by the first factor when the residual rises, lengthened by the
#: second when it falls, and never shorter than the third.
DAMPING, RECOVERY, SHORTEST_STEP = 0.7, 1.05, 0.2

#: Acceleration is given up where the residual was not halved in so many iterations.
PATIENCE = 15

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
    damped: a sample whose residual has risen moves only a fraction of the way to
    :math:`T(x_k)`, and returns to full steps as its residual falls. Fixed points stay
    the same.

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
    :param bool damped: shorten steps that overshoot; with Anderson acceleration from
        when it is given up.
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
    x = best = init
    problem = freeze(x)
    residual = problem.residual
    best_residual = best_weighted = torch.full_like(residual, torch.inf)
    active = torch.ones_like(residual, dtype=torch.bool)
    n_iter = torch.zeros_like(residual, dtype=torch.int64)
    n_inner = torch.zeros_like(n_iter)
    status = torch.full_like(n_iter, Status.MAX_ITER, dtype=torch.int8)
    if anderson and not isinstance(problem, LinearProblem):
        raise ValueError(
            f"anderson={anderson} needs frozen problems that are linear systems, and "
            f"{type(problem).__name__} is none. Leave it at 0."
        )
    history = [residual]
    eta = torch.full_like(residual, min(FIRST_FORCING, forcing))
    omega = torch.ones_like(residual)
    mixer = _Anderson(anderson, residual) if anderson else None
    for k in range(max_iter + 1):
        finite = residual.isfinite()
        if mixer is not None and not (mixer.kept & active).any():
            mixer = None
        if mixer is not None:
            finite = finite | mixer.rejects(residual)
        weighted = residual / getattr(problem, "weight", 1.0)
        status = status.where(~active | finite, Status.NON_FINITE)
        status = status.where(~active | ~(weighted <= rtol), Status.CONVERGED)
        better = active & (weighted < best_weighted)
        best_residual = residual.where(better, best_residual)
        best_weighted = weighted.where(better, best_weighted)
        best = select(better, x, best)
        active = active & finite & ~(weighted <= rtol)
        if k == max_iter or not active.any():
            break
        previous, working, start = x, active, x
        # No need to aim far below the final tolerance. The new weights change the
        # residual that the frozen problem predicts, hence a little below.
        enough = (AIM * rtol / weighted).nan_to_num(forcing)
        if mixer is None:
            step = problem.solve(torch.maximum(eta, enough).clamp(max=forcing), working)
        else:
            system = cast(LinearProblem, problem)
            mixer.judge(best_residual, system.near)
            x, working = mixer.safeguard(x, residual, active)
            start, r = mixer.combine(x, system.r, residual, working)
            # What the combination has gained need not be gained by the solve.
            enough = enough * (norm(system.r) / norm(r)).nan_to_num(1)
            enough = torch.maximum(eta, enough).clamp(max=forcing)
            step = system.solve_from(start, r, enough, working)
        # An indefinite inner problem has no meaningful solution to go on from.
        broken = working & (step.status >= Status.BREAKDOWN)
        status = status.where(~broken, step.status.to(status.dtype))
        active = active & ~broken
        working = working & ~broken
        n_iter += active
        n_inner += step.n_iter * working
        x = select(working, start + expand(omega, x) * (step.x - start), x)
        if callback is not None:
            callback(k, previous, x)
        problem = freeze(x)
        plain = working if mixer is None else working & ~mixer.accelerated
        # How well the frozen problem predicted the residual tells how accurately the
        # next one is worth solving. The safeguard of Eisenstat and Walker, by which eta
        # falls slowly, is left out: it cost more than it saved on trained weights.
        # Combinations make up for rough solves.
        mismatch = (problem.residual - step.residual * residual).abs() / residual
        choice = mismatch.nan_to_num(forcing).clamp(min(1e-3, forcing), forcing)
        eta = choice.where(plain, forcing)
        # Overshooting shows as a residual that rises: take shorter steps from then on.
        rose = damped & plain & (problem.residual > residual)
        omega = torch.where(rose, DAMPING * omega, RECOVERY * omega)
        omega = omega.clamp(SHORTEST_STEP, 1.0)
        residual = problem.residual
        history.append(residual)
    return SolverResult(
        best,
        status,
        n_iter,
        best_residual,
        n_inner,
        torch.stack(history),
        best_weighted,
    )


class _Anderson:
    """History and safeguard of Anderson acceleration, per sample."""

    def __init__(self, depth: int, residual: Tensor):
        self.depth = depth
        self.images: list[Tensor] = []  # x_j, the last one where the last step began
        self.residuals: list[Tensor] = []  # r_j
        # (B, m): whether entry j belongs to sample i.
        self.valid = torch.zeros_like(residual, dtype=torch.bool)[:, None][:, :0]
        # Residual that the last step must not exceed, infinite if it was a plain step.
        self.limit = torch.full_like(residual, torch.inf)
        # (B,): whether not given up, whether ever near, and whether accelerated in this
        # iteration.
        self.kept = torch.ones_like(residual, dtype=torch.bool)
        self.begun = self.accelerated = ~self.kept
        # (B,): residual to reach, and for how long it was not.
        self.goal = torch.full_like(residual, torch.inf)
        self.waited = torch.zeros_like(residual)

    def judge(self, best: Tensor, near: Tensor) -> None:
        """
        Says which samples are accelerated: those that are ``near``, unless their best
        residual has not been halved for long, which gives them up.
        """
        # Who leaves and comes back has no more time than others.
        self.begun = self.begun | near
        reached = (best <= self.goal) | ~self.begun
        self.goal = torch.where(reached, best / 2, self.goal)
        self.waited = torch.where(reached, 0, self.waited + 1)
        self.kept = self.kept & (self.waited < PATIENCE)
        self.accelerated = self.kept & near

    def safeguard(
        self, x: Tensor, residual: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Takes back steps that raised the residual; returns who may go on."""
        if not self.images:
            return x, active
        rejected = active & self.rejects(residual)
        self.valid = self.valid & ~rejected[:, None]
        return select(rejected, self.images[-1], x), active & ~rejected

    def rejects(self, residual: Tensor) -> Tensor:
        """Whether the last step, from a combination, was none to keep, ``(B,)``."""
        return self.limit.isfinite() & ~(residual <= self.limit)

    def combine(
        self, x: Tensor, r: Tensor, residual: Tensor, working: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Returns where the steps of the samples in ``working`` start, and the residual
        vectors expected there.
        """
        self.limit = torch.full_like(residual, torch.inf)
        start, expected = x, r
        valid = self.valid & (self.accelerated & working)[:, None]
        if valid.any():
            self.limit = residual.where(valid.any(1), torch.inf)
            # Scaled, lest squares underflow. One after the other: they are large.
            size = norm(r).clamp_min(torch.finfo(r.dtype).tiny)
            dr = _differences(r, self.residuals)
            dr = dr.div_(expand(size, dr)).nan_to_num_(0, 0, 0)
            b = (r / expand(size, r)).flatten(1).nan_to_num(0, 0, 0)
            gamma = _least_squares(dr, b, valid)[:, None]  # (B, 1, m)
            expected = r - expand(size, r) * (gamma @ dr).view_as(r)
            del dr
            dx = _differences(x, self.images).nan_to_num_(0, 0, 0)
            start = x - (gamma @ dx).view_as(x)
        keep = slice(-self.depth, None)
        self.images = [*self.images, x][keep]
        self.residuals = [*self.residuals, r][keep]
        entry = working & self.accelerated
        self.valid = torch.cat([self.valid, entry[:, None]], 1)[:, keep]
        return start, expected


def _differences(v: Tensor, past: list[Tensor]) -> Tensor:
    """Returns ``v - v_j`` for all past ``v_j``, shape ``(B, m, N)``."""
    out = v.new_empty(len(v), len(past), v[:1].numel())
    for j, v_j in enumerate(past):
        out[:, j] = (v - v_j).flatten(1)
    return out


def _least_squares(A: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    r"""
    Returns the :math:`\gamma (B, m)` that minimise
    :math:`\|b - \sum_j \gamma_j a_j\|`, zero where not ``valid (B, m)``.

    :param torch.Tensor A: the :math:`a_j`, shape ``(B, m, N)``.
    :param torch.Tensor b: shape ``(B, N)``.
    :param torch.Tensor valid: the entries that may be used.
    """
    mask = valid.to(A.dtype)
    gram, rhs = A @ A.mT, (A @ b[..., None])[..., 0]
    # Not by multiplication: an entry that is not valid may be infinite.
    gram = gram.where(valid[:, None] & valid[:, :, None], 0)
    rhs = rhs.where(valid, 0)
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    # Relative regularisation keeps the solve scale free, and never singular if it is
    # above the rounding level.
    ridge = max(1e-8, 10 * torch.finfo(A.dtype).eps) * trace
    ridge = ridge + (trace == 0).to(trace.dtype)
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    empty = (1 - mask)[:, :, None] * eye  # unit rows for invalid entries
    gamma, _ = torch.linalg.solve_ex(gram + expand(ridge, gram) * eye + empty, rhs)
    return gamma.nan_to_num(0, 0, 0) * mask
