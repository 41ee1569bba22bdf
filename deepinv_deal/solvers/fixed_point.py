"""The outer iteration of every model: freeze the weights, solve, repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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
    least the factor ``forcing``, more if the frozen problem has turned out to predict
    the nonlinear residual well, and never far below ``rtol`` (choice 1 of
    :footcite:t:`eisenstat1996choosing`).

    Where :math:`T` overshoots, the iterates would oscillate. Steps are therefore
    damped: a sample whose residual has risen moves only a fraction of the way to
    :math:`T(x_k)`, and returns to full steps as its residual falls. Fixed points stay
    the same.

    With ``anderson=m``, the last :math:`m` steps are combined such that the combined
    step is shortest (Anderson acceleration, :footcite:t:`walker2011anderson`). It is
    safeguarded: an extrapolation that raises the nonlinear residual is taken back, the
    plain iterate restored and the history dropped, for that sample only. Where this
    does not halve the residual in 15 iterations, as for maps that overshoot, damped
    steps take over for good.

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
    :raises ValueError: if ``forcing`` is not in (0, 1) or a number is negative.
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
    history = [residual]
    eta = torch.full_like(residual, min(FIRST_FORCING, forcing))
    omega = torch.ones_like(residual)
    mixer = _Anderson(anderson, residual) if anderson else None
    for k in range(max_iter + 1):
        finite = residual.isfinite()
        weighted = residual / getattr(problem, "weight", 1.0)
        status = status.where(~active | finite, Status.NON_FINITE)
        status = status.where(~active | ~(weighted <= rtol), Status.CONVERGED)
        better = active & (weighted < best_weighted)
        best_residual = residual.where(better, best_residual)
        best_weighted = weighted.where(better, best_weighted)
        best = select(better, x, best)
        active = active & finite & (weighted > rtol)
        if k == max_iter or not active.any():
            break
        previous = x
        working = active
        if mixer is not None:
            mixer.judge(best_residual)
            x, working = mixer.safeguard(x, residual, active)
        # No need to aim far below the final tolerance. The new weights change the
        # residual that the frozen problem predicts, hence a little below.
        enough = AIM * rtol / weighted
        step = problem.solve(torch.maximum(eta, enough).clamp(max=forcing), working)
        # An indefinite inner problem has no meaningful solution to go on from.
        broken = working & (step.status >= Status.BREAKDOWN)
        status = status.where(~broken, step.status.to(status.dtype))
        active = active & ~broken
        working = working & ~broken
        n_iter += active
        n_inner += step.n_iter * working
        shortened = select(working, x + expand(omega, x) * (step.x - x), x)
        if mixer is not None:
            mixed = mixer.extrapolate(x, step.x, residual, working)
            x = select(mixer.on, mixed, shortened)
            plain = working & ~mixer.on
        else:
            x, plain = shortened, working
        if callback is not None:
            callback(k, previous, x)
        problem = freeze(x)
        # How well the frozen problem predicted the residual tells how accurately the
        # next one is worth solving. The safeguard of Eisenstat and Walker, by which eta
        # falls slowly, is left out: it cost more than it saved on trained weights.
        mismatch = (problem.residual - step.residual * residual).abs() / residual
        choice = mismatch.nan_to_num(forcing).clamp(min(1e-3, forcing), forcing)
        # A sample that only took a step back has learnt nothing about its problem.
        eta = choice.where(working, eta)
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
        self.images: list[Tensor] = []  # T(x_j)
        self.steps: list[Tensor] = []  # T(x_j) - x_j
        self.valid: list[Tensor] = []  # (B,): whether entry j belongs to sample i
        self.fallback: Tensor | None = None  # plain iterate behind the extrapolated one
        self.reference: Tensor | None = None  # residual before the extrapolation
        # (B,): whether accelerated, residual to reach, and for how long it was not.
        self.on = torch.ones_like(residual, dtype=torch.bool)
        self.goal = torch.full_like(residual, torch.inf)
        self.waited = torch.zeros_like(residual)

    def judge(self, best: Tensor) -> None:
        """Gives samples up whose best residual has not been halved for long."""
        reached = best <= self.goal
        self.goal = torch.where(reached, best / 2, self.goal)
        self.waited = torch.where(reached, 0, self.waited + 1)
        self.on = self.on & (self.waited < PATIENCE)

    def safeguard(
        self, x: Tensor, residual: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Takes back extrapolations that raised the residual; returns who may go on."""
        if self.fallback is None or self.reference is None:
            return x, active
        rejected = active & self.on & (residual > self.reference)
        self.valid = [valid & ~rejected for valid in self.valid]
        return select(rejected, self.fallback, x), active & ~rejected

    def extrapolate(
        self, x: Tensor, image: Tensor, residual: Tensor, working: Tensor
    ) -> Tensor:
        """Returns the accelerated iterate of the samples in ``working``."""
        self.images.append(image)
        self.steps.append(image - x)
        self.valid.append(working)
        if len(self.images) > self.depth + 1:
            self.images, self.steps = self.images[1:], self.steps[1:]
            self.valid = self.valid[1:]
        self.fallback = select(working, image, x)
        self.reference = residual.where(working, torch.inf)
        if len(self.images) == 1:
            return self.fallback
        # minimise || f_k - sum_j gamma_j (f_k - f_j) ||, invalid entries have gamma_j =
        # 0.
        mask = torch.stack(self.valid[:-1], 1).to(x.dtype)  # (B, m)
        f = self.steps[-1].flatten(1)
        df = torch.stack([f - s.flatten(1) for s in self.steps[:-1]], 1)  # (B, m, N)
        df = (df * mask[..., None]).nan_to_num(0, 0, 0)
        f = f.nan_to_num(0, 0, 0)
        size = norm(f).clamp_min(torch.finfo(f.dtype).tiny)
        df, f = df / expand(size, df), f / expand(size, f)
        gram = df @ df.mT
        trace = gram.diagonal(dim1=1, dim2=2).sum(1)
        # Relative regularisation keeps the solve scale free, and never singular if it
        # is above the rounding level.
        ridge = max(1e-8, 10 * torch.finfo(x.dtype).eps) * trace
        ridge = ridge + (trace == 0).to(trace.dtype)
        eye = torch.eye(len(self.steps) - 1, dtype=x.dtype, device=x.device)
        rhs = (df @ f[..., None])[..., 0]
        empty = (1 - mask)[:, :, None] * eye  # unit rows for invalid entries
        gamma, _ = torch.linalg.solve_ex(gram + expand(ridge, gram) * eye + empty, rhs)
        gamma = gamma.nan_to_num(0, 0, 0) * mask
        dx = torch.stack([image - t for t in self.images[:-1]], 1).flatten(2)
        correction = (gamma[:, None] @ dx.nan_to_num(0, 0, 0))[:, 0].view_as(image)
        return select(working, image - correction, self.fallback)
