"""Relaxed Picard iteration on frozen problems, with Anderson acceleration."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm, read_any, select
from deepinv_deal.solvers.anderson import Anderson, Memory
from deepinv_deal.solvers.best import Best
from deepinv_deal.solvers.damping import Damping
from deepinv_deal.solvers.forcing import Forcing
from deepinv_deal.solvers.frozen import FrozenProblem, LinearProblem
from deepinv_deal.solvers.result import SolverResult, Status


class State(NamedTuple):
    r"""
    The iteration at an image; tensors have one entry per sample.

    :param torch.Tensor x: the image, ``(B, ...)``.
    :param FrozenProblem problem: the problem frozen at it; ``None`` until it is.
    :param torch.Tensor residual: nonlinear residual.
    :param torch.Tensor weighted: that residual as it is compared with the tolerance.
    :param torch.Tensor active: samples that go on.
    :param torch.Tensor status: :class:`Status`.
    :param torch.Tensor n_iter: iterations.
    :param torch.Tensor n_inner: iterations of the inner solver.
    :param Best best: the best iterate so far.
    :param torch.Tensor eta: accuracy of the next inner solve.
    :param torch.Tensor omega: length of the next step.
    :param torch.Tensor move: the last full step, shape of x.
    :param torch.Tensor turned: cosine between it and the one before.
    :param torch.Tensor predicted: residual that the last inner solve left.
    :param torch.Tensor plain: samples whose last step was not accelerated.
    :param Memory memory: of the acceleration; ``None`` if there is none.
    :param bool any_active: whether any sample goes on.
    :param bool any_kept: whether any of these may still be accelerated.
    :param bool any_usable: whether any of these combines past images now.
    """

    x: Tensor
    problem: FrozenProblem | None
    residual: Tensor
    weighted: Tensor
    active: Tensor
    status: Tensor
    n_iter: Tensor
    n_inner: Tensor
    best: Best
    eta: Tensor
    omega: Tensor
    move: Tensor
    turned: Tensor
    predicted: Tensor
    plain: Tensor
    memory: Memory | None
    any_active: bool = True
    any_kept: bool = False
    any_usable: bool = False


class Picard:
    r"""
    The method of :func:`fixed_point`, which describes it.

    :param float rtol: tolerance on the weighted residual.
    :param Forcing forcing: how accurately inner problems are solved.
    :param Damping damping: how long steps are.
    :param int anderson: depth of the acceleration; ``0`` switches it off.
    """

    def __init__(self, rtol: float, forcing: Forcing, damping: Damping, anderson: int):
        self.rtol, self.forcing, self.damping = rtol, forcing, damping
        self.anderson = Anderson(anderson)

    def init(self, x: Tensor, problem: FrozenProblem) -> State:
        """Returns the state at the first image, whose frozen problem is given."""
        depth = self.anderson.depth
        if depth and not isinstance(problem, LinearProblem):
            raise ValueError(
                f"anderson={depth} needs frozen problems that are linear systems, and "
                f"{type(problem).__name__} is none. Leave it at 0."
            )
        residual = problem.residual
        everyone = torch.ones_like(residual, dtype=torch.bool)
        none = torch.zeros_like(residual, dtype=torch.int64)
        state = State(
            x,
            problem,
            residual,
            weighted=residual,
            active=everyone,
            status=torch.full_like(none, Status.MAX_ITER, dtype=torch.int8),
            n_iter=none,
            n_inner=none,
            best=Best.init(x, residual),
            eta=self.forcing.init(residual),
            omega=self.damping.init(residual),
            move=torch.zeros_like(x),
            turned=torch.zeros_like(residual),
            predicted=residual,
            plain=everyone,
            memory=self.anderson.init(residual) if depth else None,
        )
        return self._judge(state)

    def terminate(self, state: State) -> bool:
        """Returns whether no sample goes on."""
        return not state.any_active

    def step(self, state: State) -> State:
        """Returns the state with the next image, which is not assessed yet."""
        x, working, memory = state.x, state.active, state.memory
        if memory is not None:
            if memory.images:
                x = select(memory.rejected, memory.images[-1], x)
            working = working & ~memory.rejected
            memory = memory if state.any_kept else None
        start, memory, solution = self._solve(state, x, working, memory)
        # An indefinite inner problem has no meaningful solution to go on from.
        broken = working & (solution.status >= Status.BREAKDOWN)
        working = working & ~broken
        active = state.active & ~broken
        moved = torch.lerp(start, solution.x, expand(state.omega, x))
        move = solution.x - start
        turned = inner(move, state.move) / (norm(move) * norm(state.move))
        return state._replace(
            x=select(working, moved, x),
            problem=None,  # what it holds may be large, and the next one is to follow
            active=active,
            status=state.status.where(~broken, solution.status.to(state.status.dtype)),
            n_iter=state.n_iter + active,
            n_inner=state.n_inner + solution.n_iter * working,
            move=move,
            turned=turned,
            predicted=solution.residual * state.residual,
            plain=working if memory is None else working & ~memory.accelerated,
            memory=memory,
        )

    def _solve(
        self, state: State, x: Tensor, working: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Memory | None, SolverResult]:
        """Returns where the step starts, the new memory and the inner solution."""
        if memory is None:
            factor = self.forcing.factor(state.eta, state.weighted)
            problem = cast(FrozenProblem, state.problem)
            return x, None, problem.solve(factor, working)
        system = cast(LinearProblem, state.problem)
        start, r = x, system.r
        if state.any_usable:
            start, r = self.anderson.combine(memory, x, r)
        memory = self.anderson.remember(memory, x, system.r, state.residual, working)
        gained = (norm(system.r) / norm(r)).nan_to_num(1)
        factor = self.forcing.factor(state.eta, state.weighted, gained)
        return start, memory, system.solve_from(start, r, factor, working)

    def assess(self, state: State, problem: FrozenProblem) -> State:
        """Completes the state after a step by what its frozen problem tells."""
        before, after = state.residual, problem.residual
        # Combinations of past images make up for rough solves.
        eta = self.forcing.update(before, state.predicted, after)
        state = state._replace(
            problem=problem,
            residual=after,
            eta=eta.where(state.plain, self.forcing.largest),
            omega=self.damping.update(
                state.omega, before, after, state.turned, state.plain
            ),
        )
        return self._judge(state)

    def _judge(self, state: State) -> State:
        """Decides which samples go on, and how."""
        problem, residual, active = state.problem, state.residual, state.active
        acceptable = residual.isfinite()
        if state.memory is not None:  # a step that is taken back may be NaN
            acceptable |= self.anderson.rejects(state.memory, residual)
        weighted = residual / getattr(problem, "weight", 1.0)
        solved = weighted <= self.rtol
        status = state.status.where(~active | acceptable, Status.NON_FINITE)
        status = status.where(~active | ~solved, Status.CONVERGED)
        best = state.best.update(state.x, residual, weighted, active)
        active = active & acceptable & ~solved
        memory, questions = state.memory, [active]
        if memory is not None:
            near = cast(LinearProblem, problem).near
            memory = self.anderson.judge(memory, residual, best.residual, near, active)
            questions += [memory.kept & active, memory.usable.any(1)]
        # Asked together: every answer makes the host wait for the device.
        any_active, any_kept, any_usable = (read_any(questions) + [False] * 2)[:3]
        return state._replace(
            weighted=weighted,
            active=active,
            status=status,
            best=best,
            memory=memory,
            any_active=any_active,
            any_kept=any_kept,
            any_usable=any_usable,
        )

    def result(self, state: State, history: Tensor) -> SolverResult:
        """Returns the best iterate, with the residuals of all iterates ``(n, B)``."""
        best = state.best
        return SolverResult(
            best.x,
            state.status,
            state.n_iter,
            best.residual,
            state.n_inner,
            history,
            best.weighted,
        )
