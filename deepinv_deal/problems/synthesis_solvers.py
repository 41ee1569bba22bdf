"""Solvers of the joint problem of image and coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._batch import distance, expand, inner, joint_norm, norm
from deepinv_deal.operators.blocks import cache_bytes, row_blocks
from deepinv_deal.problems.bounds import Bounds, clamp, projection
from deepinv_deal.problems.penalties import GROUP_SIDE
from deepinv_deal.problems.synthesis import (
    LINEAR,
    CoefficientEquation,
    SynthesisProblem,
    in_cache,
)
from deepinv_deal.solvers import SolverResult, Status, attach_gradient
from deepinv_deal.solvers.proximal import (
    ADMMState,
    admm,
    extrapolated,
    proximal_gradient,
    relative_change,
)

#: ``callback(k, before, after)`` with the images of an iteration.
Observer = Callable[[int, Tensor, Tensor], None]

#: Published margins of the steps of iPALM.
PALM_MARGIN = 1.01

#: Iterations after a restart of FISTA in which the change of the image is no measure.
SETTLE = 5

#: Over-relaxation of ADMM, and its penalty parameter for the coefficients of a given
#: image.
RELAXATION, CODING_PENALTY = 1.6, 0.03


#: ``minimise(problem, x, a, rtol)``: a solver of a problem with a least-squares term.
Minimiser = Callable[[SynthesisProblem, Tensor, Tensor, Tensor], SolverResult]

#: How often the curvature of a likelihood is frozen at most; the tolerance of the first
#: problem, and that of the others relative to the last change of the image.
MAX_REWEIGHTINGS, FIRST_FORCING, FORCING = 300, 1e-2, 0.1


@torch.no_grad()
def reweighted(
    problem: SynthesisProblem,
    minimise: Minimiser,
    x: Tensor,
    a: Tensor,
    *,
    rtol: float,
    callback: Observer | None = None,
) -> SolverResult:
    """
    Minimises J with a likelihood: freezes its curvature at the image and minimises the
    problem with that least-squares term, again and again, from where the last ended.

    :param SynthesisProblem problem: the problem.
    :param Callable minimise: ``minimise(problem, x, a, rtol)``, a solver of problems
        with a least-squares term.
    :param torch.Tensor x: first image.
    :param torch.Tensor a: first coefficients.
    :param float rtol: tolerance on the relative change of the image per reweighting.
    :param Callable callback: called with the number of every iteration and the images
        before and after it.
    :return: (:class:`SolverResult`) the image in ``x``, coefficients and image in
        ``state``; ``n_inner`` counts the iterations of ``minimise``.
    """
    n_inner = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    inner_status = torch.zeros_like(n_inner, dtype=torch.int8)
    image, inner_rtol = x, torch.full_like(norm(x), max(FIRST_FORCING, rtol))

    def step_coefficients(v: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        nonlocal n_inner, inner_status, image
        frozen = problem.frozen(blocks[1])
        result = minimise(frozen, blocks[1], v, inner_rtol)
        n_inner, inner_status = n_inner + result.n_iter, result.status
        image = result.x
        return result.state[0]

    def measure(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> Tensor:
        nonlocal inner_rtol
        change, solved_to = relative_change(new[1:], old[1:]), inner_rtol
        inner_rtol = torch.minimum(FORCING * change, inner_rtol).clamp_min(rtol)
        # An image says nothing that was found more roughly than is asked for.
        return torch.maximum(change, solved_to)

    steps = [step_coefficients, lambda *_: image]
    result = _alternate(steps, [a, x], rtol, MAX_REWEIGHTINGS, measure, callback)
    # An image that has settled is none if the problem behind it was not solved.
    status = torch.maximum(result.status, inner_status)
    return replace(result, x=result.state[1], status=status, n_inner=n_inner)


@torch.no_grad()
def ipalm(
    problem: SynthesisProblem,
    x: Tensor,
    a: Tensor,
    *,
    rtol: float = 1e-4,
    max_iter: int = 10000,
    bounds: Bounds | None = None,
    callback: Observer | None = None,
) -> SolverResult:
    r"""
    Minimises J by the inertial proximal alternating linearised minimisation.

    As published (:footcite:t:`ducotterd2024smooth`): inertia :math:`(k - 1) / (k + 2)`,
    steps 1 in the coefficients and :math:`1 / L`, :math:`L = 1.01\, (\|H\| + \beta
    \|B\|)` in the image; stops when the image changes by at most ``rtol``, relatively.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor x: first image.
    :param torch.Tensor a: first coefficients.
    :param float rtol: tolerance on the relative change of the image per iteration.
    :param int max_iter: largest number of iterations.
    :param tuple bounds: smallest and largest value of the image.
    :param Callable callback: called with the number of every iteration and the images
        before and after it.
    :return: (:class:`SolverResult`) the image in ``x``, coefficients and image in
        ``state``.
    """
    L = PALM_MARGIN * (
        problem.data.norm_bound + problem.beta * problem.aggregation_norm
    )

    def step_coefficients(v: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        return problem.threshold(v, problem.features(blocks[1]))

    def step_image(v: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        synthesis = problem.features_adjoint(problem.synthesis(blocks[0]))
        g = problem.data.normal(v) + problem.aggregate(v) - problem.data.b - synthesis
        x = v - g / expand(L, v)
        return clamp(x, bounds)

    result = proximal_gradient(
        [step_coefficients, step_image],
        [a, x],
        inertia="palm",
        rtol=rtol,
        max_iter=max_iter,
        measure=lambda new, old: relative_change(new[1:], old[1:]),
        callback=_watched(callback, 1),
    )
    return replace(result, x=result.state[1])


@torch.no_grad()
def eliminated_fista(
    problem: SynthesisProblem,
    x: Tensor,
    a: Tensor,
    *,
    rtol: float = 1e-4,
    max_iter: int = 10000,
    callback: Observer | None = None,
) -> SolverResult:
    """
    Minimises J by FISTA on the coefficients, image eliminated, with restarts.

    Every iteration replaces the image by the best one for the coefficients, one linear
    system. The step in the coefficients is 1, whatever H and beta. Stops when the image
    changes by at most ``rtol``, relatively.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor x: first image.
    :param torch.Tensor a: first coefficients.
    :param float rtol: tolerance on the relative change of the image per iteration.
    :param int max_iter: largest number of iterations.
    :param Callable callback: called with the number of every iteration and the images
        before and after it.
    :return: (:class:`SolverResult`) the image in ``x``, coefficients and image in
        ``state``.
    """

    # Synthesis and image are affine in the coefficients, so extrapolating all together
    # gives those of the extrapolated coefficients: no second product, no second solve.
    def step(
        blocks: tuple[Tensor, ...], previous: tuple[Tensor, ...], w: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        a, _, x = blocks
        synthesis, image = (
            extrapolated(*pair, w)
            for pair in zip(blocks[1:], previous[1:], strict=True)
        )
        misfit = synthesis - problem.features(image)

        def code(a: Tensor, before: Tensor, misfit: Tensor) -> tuple[Tensor, Tensor]:
            v = extrapolated(a, before, w)
            new = problem.penalty.prox(v - problem.analysis(misfit))
            return new, problem.synthesis(new)

        new, new_synthesis = in_cache(code, a, previous[0], misfit)
        new_image = problem.image_of(new_synthesis, init=image)
        # What is seen of the coefficients is a cheaper measure, about as good.
        turned = inner(synthesis - new_synthesis, new_synthesis - blocks[1])
        turned = turned + inner(image - new_image, new_image - x)
        return (new, new_synthesis, new_image), turned

    synthesis = problem.synthesis(a)
    result = proximal_gradient(
        step,
        [a, synthesis, problem.image_of(synthesis, init=x)],
        inertia="fista",
        restart=True,
        settle=SETTLE,
        rtol=rtol,
        max_iter=max_iter,
        measure=lambda new, old: relative_change(new[2:], old[2:]),
        callback=_watched(callback, 2),
        look_every=1,  # an iteration, with its linear system, costs more than a look
    )
    a, _, x = result.state
    return replace(result, x=x, state=(a, x))


def _watched(callback: Observer | None, block: int) -> Callable[..., None] | None:
    """Returns a callback for all blocks, of which one is the image."""
    if callback is None:
        return None
    return lambda k, before, after: callback(k, before[block], after[block])


def _alternate(
    steps: Sequence[Callable[..., Tensor]],
    blocks: Sequence[Tensor],
    rtol: Tensor | float,
    max_iter: int,
    measure: Callable[..., Tensor],
    callback: Observer | None,
) -> SolverResult:
    """Updates two blocks in turn, of which the second one is the image."""
    return proximal_gradient(
        steps,
        blocks,
        inertia="none",
        rtol=rtol,
        max_iter=max_iter,
        measure=measure,
        callback=_watched(callback, 1),
        look_every=1,  # an iteration, with its solves, costs more than a look
    )


def _image(state: ADMMState) -> Tensor:
    """Returns the image of a state: the split one, inside its bounds, if there is."""
    return state.z[1] if len(state.z) > 1 else state.x


def _violation(
    scale: Callable[[ADMMState], Tensor],
) -> Callable[[ADMMState, ADMMState], Tensor]:
    """
    Returns a stopping rule for ADMM that also ends where all coefficients are zero.

    The violation of the splitting and the last change of the split variables, relative
    to the norm of these and a ``scale`` of the unknown.
    """

    def measure(new: ADMMState, old: ADMMState) -> Tensor:
        worst = torch.maximum(apart(new.Kx, new.z), apart(new.z, old.z))
        size = torch.hypot(joint_norm(new.z), scale(new))
        return worst / size.where(size != 0, 1)

    def apart(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        distances = [distance(v, w) for v, w in zip(a, b, strict=True)]
        return norm(torch.stack(distances, 1))

    return measure


@torch.no_grad()
def joint_admm(
    problem: SynthesisProblem,
    x: Tensor,
    a: Tensor,
    *,
    r: float,
    relaxation: float = RELAXATION,
    rtol: float = 1e-4,
    max_iter: int = 10000,
    bounds: Bounds | None = None,
    callback: Observer | None = None,
) -> SolverResult:
    r"""
    Minimises J by ADMM with the exact joint quadratic solve.

    Sample :math:`i` stops as soon as, relative to :math:`(\|x\|^2 + \|z\|^2)^{1/2}`,
    neither the distance of the coefficients from their split z nor the last change of z
    exceeds ``rtol``: a rule that also ends where all coefficients are zero.

    The coefficients are split, :math:`a = z`, with penalty ``r``. For a target v the
    quadratic part is minimised over image and coefficients at once: with
    :math:`K = r (G^{\top} G + r I)^{-1}`, an m x m matrix,

    .. math::
        \big(H + \beta \sum_k P_k^{\top} U^{\top} K U P_k\big) x
        &= b + \sqrt{\beta} \sum_k P_k^{\top} U^{\top} K G^{\top} v_k, \\
        a_k &= v_k + \tfrac1r G K (\sqrt{\beta}\, U P_k x - G^{\top} v_k).

    With ``bounds`` the image is split too, :math:`x = w`.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor x: first image.
    :param torch.Tensor a: first coefficients.
    :param float r: penalty parameter, larger than the weak convexity of R.
    :param float relaxation: over-relaxation, in (0, 2).
    :param float rtol: tolerance, see above.
    :param int max_iter: largest number of iterations.
    :param tuple bounds: smallest and largest value of the image.
    :param Callable callback: called with the number of every iteration and the images
        before and after it.
    :return: (:class:`SolverResult`) the image in ``x``, coefficients and image in
        ``state``.
    :raises ValueError: if ``r`` is not larger than the weak convexity of R.
    """
    if not r > problem.penalty.weak_convexity:
        raise ValueError(
            f"r must be larger than {problem.penalty.weak_convexity:.3g}, the modulus "
            f"of weak convexity of the penalty, got {r}."
        )
    eye = torch.eye(len(problem._gram), dtype=x.dtype, device=x.device)
    K = r * torch.linalg.inv(problem._gram + r * eye)
    correct = problem.frame.C @ K / r
    # The split of the image weighs as much as the data term.
    rho = problem.data.norm_bound.expand(len(x)) if bounds is not None else None
    solve = problem.image_solver(K, rho)

    def solve_x(
        targets: tuple[Tensor, ...], previous: Tensor, _: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        v = targets[0]
        Gv = problem.synthesis(v)
        rhs = problem.data.b + problem.features_adjoint(problem.frame.map(K, Gv))
        if rho is not None:
            rhs = rhs + expand(rho, x) * targets[1]
        image = solve(rhs, previous).x
        misfit = problem.features(image) - Gv
        # Into the correction, which nobody else has: new memory takes longer.
        a = problem.frame.map(correct, misfit).add_(v)
        return image, (a, image)[: len(targets)]

    z = (a,) if bounds is None else (a, x)
    prox = [problem.local_prox(r), projection(bounds)]
    result = admm(
        solve_x,
        prox[: len(z)],
        ADMMState(x, z, z, z),
        rho=(r,) if rho is None else (r, rho),
        relaxation=relaxation,
        rtol=rtol,
        max_iter=max_iter,
        measure=_violation(lambda state: norm(state.x)),
        callback=None
        if callback is None
        else lambda k, old, new: callback(k, *(_image(s) for s in (old, new))),
    )
    state = result.state
    if bounds is not None:
        return replace(result, x=state.z[1], state=state.z)
    # The split coefficients are sparse; the image that belongs to them is the result.
    image = problem.image(state.z[0], init=state.x)
    return replace(result, x=image, state=(*state.z, image))


@torch.no_grad()
def sparse_coding(
    problem: SynthesisProblem,
    features: Tensor,
    a: Tensor,
    *,
    rtol: float = 1e-4,
    max_iter: int = 10000,
    r: float = CODING_PENALTY,
) -> SolverResult:
    r"""
    Finds the coefficients of given features, :math:`\min_a \tfrac12 \|f - G^{\top}
    a\|^2 + R(a)`.

    By ADMM for convex penalties, whose only linear system is m x m; the dictionaries
    are so badly conditioned that gradient steps need hundreds of iterations. By FISTA
    with restarts for others. The tolerance of ADMM is relative to the features and the
    coefficients together. Every patch is a problem of its own: on a CPU they are solved
    in blocks of rows that fit into the cache, each of which stops on its own, and
    status, iterations and residual are those of the worst.

    :param SynthesisProblem problem: the problem; its data term does not matter.
    :param torch.Tensor features: shape ``(B, C m, H', W')``.
    :param torch.Tensor a: first coefficients.
    :param float rtol: tolerance, see the solvers.
    :param int max_iter: largest number of iterations.
    :param float r: penalty parameter of ADMM.
    :return: (:class:`SolverResult`) the coefficients in ``x``.
    """
    convex = problem.penalty.weak_convexity == 0
    code = _coder_by_admm(problem, r) if convex else partial(_code_by_fista, problem)
    # The same blocks whatever the batch, so that it gives what its samples give alone.
    row_bytes = a[0, :, :1].numel() * a.element_size()
    size = cache_bytes(a.device)
    blocks = row_blocks(a.shape[2], row_bytes, size, GROUP_SIDE, GROUP_SIDE)
    parts = [
        code(features[:, :, rows], a[:, :, rows], rtol=rtol, max_iter=max_iter)
        for rows in blocks
    ]
    worst = {
        name: torch.stack([getattr(part, name) for part in parts]).amax(0)
        for name in ("status", "n_iter", "residual")
    }
    return SolverResult(torch.cat([part.x for part in parts], 2), **worst)


def _code_by_fista(
    problem: SynthesisProblem, f: Tensor, a: Tensor, *, rtol: float, max_iter: int
) -> SolverResult:
    return proximal_gradient(
        [lambda v, _: problem.threshold(v, f)],
        [a],
        restart=True,
        settle=SETTLE,
        rtol=rtol,
        max_iter=max_iter,
    )


def _coder_by_admm(problem: SynthesisProblem, r: float) -> Callable[..., SolverResult]:
    """Returns the solver, with the matrices that all blocks of rows share."""
    C, gram, channel_map = problem.frame.C, problem._gram, problem.frame.map
    eye = torch.eye(len(gram), dtype=C.dtype, device=C.device)
    # The quadratic problem has the solution v + B (f - G^T v).
    B = C @ torch.linalg.inv(gram + r * eye)
    keep = None
    if C.shape[0] <= 2 * C.shape[1]:  # one product is cheaper than two
        keep = torch.eye(len(C), dtype=C.dtype, device=C.device) - B @ C.T

    def code(f: Tensor, a: Tensor, *, rtol: float, max_iter: int) -> SolverResult:
        fitted = channel_map(B, f)

        def solve_x(
            targets: tuple[Tensor, ...], *_: Any
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            (v,) = targets
            if keep is None:
                x = torch.sub(v, channel_map(B, problem.synthesis(v))).add_(fitted)
            else:
                x = channel_map(keep, v).add_(fitted)
            return x, (x,)

        # The multipliers of the optimality condition: a start at the solution stays.
        u = problem.analysis(f - problem.synthesis(a)) / r
        result = admm(
            solve_x,
            [problem.local_prox(r)],
            ADMMState(a, z=(a,), target=(a - u,), Kx=(a,)),
            rho=(r,),
            relaxation=RELAXATION,
            rtol=rtol,
            max_iter=max_iter,
            measure=_violation(lambda _: norm(f)),
        )
        return replace(result, x=result.state.z[0])

    return code


def coordinate_descent(
    problem: SynthesisProblem,
    x: Tensor,
    a: Tensor,
    *,
    rtol: float = 1e-4,
    max_iter: int = 2,
    inner_rtol: float = 1e-4,
    bounds: Bounds | None = None,
    callback: Observer | None = None,
) -> SolverResult:
    r"""
    Minimises J over coefficients and image in turn, starting with the coefficients.

    The first model of :footcite:t:`ducotterd2024convex` is trained with two passes;
    stopping early gives better images than the minimiser. Sample :math:`i` stops when
    :math:`(\|\Delta x\|^2 + \|\Delta a\|^2)^{1/2} \leq \mathrm{rtol}\, (\|x\|^2 +
    \|a\|^2)^{1/2}`. Differentiable if run with gradients enabled: every coefficient
    problem and every image problem by implicit differentiation.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor x: first image.
    :param torch.Tensor a: first coefficients.
    :param float rtol: tolerance; with ``0``, ``max_iter`` passes are run.
    :param int max_iter: largest number of passes.
    :param float inner_rtol: tolerance of the coefficient problems.
    :param tuple bounds: smallest and largest value of the image, imposed by clipping.
    :param Callable callback: called with the number of every iteration and the images
        before and after it.
    :return: (:class:`SolverResult`) the image in ``x``, coefficients and image in
        ``state``.
    """
    inner_iterations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    inner_status = torch.zeros_like(inner_iterations, dtype=torch.int8)

    def step_coefficients(v: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        nonlocal inner_iterations, inner_status
        f = problem.features(blocks[1])
        with torch.no_grad():
            result = sparse_coding(problem, f, v, rtol=inner_rtol)
        inner_iterations = inner_iterations + result.n_iter
        inner_status = torch.maximum(inner_status, result.status)
        options = LINEAR.made_strict(problem.strict)
        return attach_gradient(CoefficientEquation(problem, f), result.x, options)

    def step_image(v: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        x = problem.image(blocks[0], init=v)
        return clamp(x, bounds)

    steps = [step_coefficients, step_image]
    result = _alternate(steps, [a, x], rtol, max_iter, relative_change, callback)
    status = result.status
    if not rtol:  # a fixed number of passes is what was asked for
        status = status.where(status != Status.MAX_ITER, Status.FINISHED)
    # Coefficients that were not found make the image wrong, whatever its change.
    worst = torch.maximum(status, inner_status)
    status = status.where(inner_status == Status.CONVERGED, worst)
    return replace(result, x=result.state[1], status=status, n_inner=inner_iterations)
