"""Batched conjugate gradients in which every sample stops on its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm, select
from deepinv_deal.solvers.result import SolverResult, Status

LinearMap = Callable[[Tensor], Tensor]

#: Numbers in an unknown from which an accelerator takes longer for a step than the host
#: for a look at it.
LARGE_UNKNOWN = 2**17


def conjugate_gradient(
    A: LinearMap,  # (B, ...) -> (B, ...)
    b: Tensor,  # (B, ...)
    *,
    init: Tensor | None = None,  # (B, ...)
    rtol: float | Tensor = 1e-5,  # scalar or (B,)
    max_iter: int | Tensor = 100,  # scalar or (B,)
    preconditioner: LinearMap | None = None,
    flexible: bool = False,
    check_every: int | None = None,
    verify: bool = True,
) -> SolverResult:
    r"""
    Solves :math:`A x = b` by (preconditioned) conjugate gradients, sample by sample.

    Sample :math:`i` stops as soon as

    .. math::
        \|b_i - A_i x_i\|_2 \leq \mathrm{rtol}_i \, \|b_i\|_2

    and is left unchanged from then on, so a batch gives what its samples give alone.
    This is Algorithm 5.3 of :footcite:t:`nocedal2006numerical`. It differs from
    :func:`deepinv.optim.linear.conjugate_gradient` in that every right-hand side is
    divided by its norm and no absolute constant enters: the relative accuracy is the
    same for :math:`b` and :math:`10^{-8} b`, as the backward pass of a mean-reduced
    loss needs.

    .. note::
        Symmetry of :math:`A` is not checked. A direction of non-positive curvature ends
        the sample with :attr:`Status.BREAKDOWN`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.solvers import conjugate_gradient
    >>> result = conjugate_gradient(lambda v: 2 * v, torch.ones(1, 1, 4, 4))
    >>> result.x.unique(), int(result.n_iter)
    (tensor([0.5000]), 1)

    :param Callable A: symmetric positive definite linear map on the whole batch.
    :param torch.Tensor b: right-hand side, shape ``(B, ...)``.
    :param torch.Tensor init: initial value, shape of ``b``; zeros if ``None``. Not
        modified.
    :param float, torch.Tensor rtol: relative tolerance on the residual norm, one for
        all or one per sample ``(B,)``. With the number ``0``, a sample runs
        ``max_iter`` iterations, fewer if rounding ends its progress before.
    :param int, torch.Tensor max_iter: largest number of iterations, one for all or one
        per sample ``(B,)``.
    :param Callable preconditioner: symmetric positive definite approximation of
        :math:`A^{-1}`; identity if ``None``.
    :param bool flexible: whether the preconditioner is another one in every iteration,
        such as a solve that stops early: with :math:`z = M r`, directions are then made
        conjugate by :math:`\langle z_{k+1}, r_{k+1} - r_k \rangle / \langle z_k, r_k
        \rangle` :footcite:p:`golub1999inexact`.
    :param int check_every: number of iterations between two looks at whether all
        samples have stopped. Each look waits for the device; results do not depend on
        it. ``None``: 8 for small unknowns on an accelerator, else 1. Nobody looks if
        ``rtol`` is the number ``0`` and ``max_iter`` a number: the operator is applied
        ``max_iter`` times.
    :param bool verify: recompute the residual at the end (one more application of
        ``A``) and go on if rounding had made the recursion too optimistic.
    :return: (:class:`SolverResult`) ``x`` of shape ``(B, ...)``; ``status``, ``n_iter``
        and ``residual`` (relative to :math:`\|b\|`) of shape ``(B,)``.
    :raises ValueError: if ``init`` and ``b`` differ in shape, ``rtol`` is negative or
        ``max_iter`` is negative.
    """
    if init is not None and init.shape != b.shape:
        raise ValueError(
            f"init must have the shape of b, {tuple(b.shape)}, got {tuple(init.shape)}."
        )
    if not isinstance(rtol, Tensor) and rtol < 0:
        raise ValueError(f"rtol must not be negative, got {rtol}.")
    if not isinstance(max_iter, Tensor) and max_iter < 0:
        raise ValueError(f"max_iter must not be negative, got {max_iter}.")
    if check_every is None:
        # A wait costs an accelerator about as much as a step on a small image.
        small = b.device.type != "cpu" and b.numel() < LARGE_UNKNOWN
        check_every = 8 if small else 1

    b_norm = norm(b)
    nonzero = b_norm != 0  # True for NaN, which must not pass as a solved zero system
    scale = expand(b_norm.where(nonzero, torch.ones_like(b_norm)), b)
    b = b / scale
    if isinstance(rtol, Tensor):
        rtol = rtol.to(b_norm)
    x = torch.zeros_like(b)
    r = b
    if init is not None:
        x = select(nonzero, init / scale, x)
        r = b - A(x)
    system = _System(
        A,
        preconditioner,
        flexible,
        nonzero.to(b_norm.dtype) * rtol,
        max_iter if isinstance(max_iter, Tensor) else None,
        b_norm.new_zeros(()),
    )
    result = _solve(system, x, r, b, rtol, max_iter, check_every, verify)
    result.x = result.x * scale
    return result


class _System(NamedTuple):
    """
    What is the same in all steps.

    :param Callable A: the operator.
    :param Callable M: the preconditioner, if any.
    :param bool flexible: whether it varies.
    :param torch.Tensor target: norm of the residual to reach, ``(B,)``.
    :param torch.Tensor budget: largest number of iterations of every sample, ``None``
        if the host counts them.
    :param torch.Tensor zero: a number. Making one is a launch on an accelerator.
    """

    A: LinearMap
    M: LinearMap | None
    flexible: bool
    target: Tensor
    budget: Tensor | None
    zero: Tensor


class _State(NamedTuple):
    """
    The recursion between two steps; all but the vectors is of shape ``(B,)``.

    A sample that is not ``active`` has stopped. ``curvature`` is that of its last
    direction and tells why.
    """

    x: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor
    r_norm: Tensor
    active: Tensor
    n_iter: Tensor
    curvature: Tensor


def _solve(
    system: _System,
    x: Tensor,
    r: Tensor,
    b: Tensor,
    rtol: float | Tensor,
    max_iter: int | Tensor,
    check_every: int,
    verify: bool,
) -> SolverResult:
    """Runs the recursion, verifies its residual and starts again where that pays."""
    target, r_norm = system.target, _norm(r)
    n_iter = torch.zeros_like(r_norm, dtype=torch.int64)
    active = ((r_norm > target) | r_norm.isnan()) & (max_iter > 0)
    status = torch.full_like(n_iter, Status.MAX_ITER, dtype=torch.int8)
    verified = torch.full_like(r_norm, torch.inf)  # last recomputed residual
    limit = None if isinstance(max_iter, Tensor) else max_iter
    fixed = limit is not None and not isinstance(rtol, Tensor) and rtol == 0
    # A look before the first step saves it for systems that are solved already. On the
    # CPU it is free; elsewhere it would be one wait more for each of the others.
    early = check_every == 1 and not fixed
    done = limit == 0 or early and not active.any()
    while not done:
        state = _start(system, x, r, r_norm, active, n_iter)
        state = _run(system, state, limit, None if fixed else check_every)
        x, r_norm, n_iter = state.x, state.r_norm, state.n_iter
        status = _broken(state).where(status < Status.BREAKDOWN, status)
        if not verify:
            break
        # Residual replacement: restart samples whose true residual is still too large,
        # unless the last restart had stopped to pay.
        r = b - system.A(x)
        r_norm = _norm(r)
        active = (r_norm > target) & (r_norm < 0.5 * verified)
        active &= (status < Status.BREAKDOWN) & (n_iter < max_iter)
        verified = r_norm
        done = fixed or not active.any()
        # The budget is counted per sample from here on: one that restarts late, because
        # the slowest of its batch was waited for, has the iterations it has alone.
        if not done and limit is not None:
            budget = torch.full_like(n_iter, limit)
            system, limit = system._replace(budget=budget), None
    status = status.where(r_norm > target, Status.CONVERGED)
    status = status.where(r_norm.isfinite(), Status.NON_FINITE)
    return SolverResult(x, status, n_iter, r_norm)


def _norm(r: Tensor) -> Tensor:
    # By a sum of squares as in the steps. On the CPU it is also more accurate: the
    # norms of torch add up float32 without pairing, with errors of 1e-5 in an image.
    return inner(r, r).sqrt()


def _start(
    system: _System,
    x: Tensor,
    r: Tensor,
    r_norm: Tensor,
    active: Tensor,
    n_iter: Tensor,
) -> _State:
    """Returns the state before the first step from ``x`` with the residual ``r``."""
    z = r if system.M is None else system.M(r)
    good = torch.ones_like(r_norm)
    return _State(x, r, z, inner(r, z), r_norm, active, n_iter, good)


def _run(
    system: _System, state: _State, limit: int | None, check_every: int | None
) -> _State:
    """
    Steps until all samples have stopped.

    :param _System system: the system.
    :param _State state: where to start.
    :param int limit: number of steps after which all stop; ``None``: any.
    :param int check_every: steps between two looks at whether all have stopped;
        ``None``: never look.
    """
    for k in count(1):
        state = _step(system, state)
        if k == limit:
            break
        if check_every and k % check_every == 0 and not state.active.any():
            break
    return state


def _step(system: _System, state: _State) -> _State:
    """One iteration, in few operations: each is a launch on an accelerator."""
    A, M, flexible, target, budget, zero = system
    x, r, p, rz, _, active, n_iter, last = state
    q = A(p)
    curvature = inner(p, q)
    # Positive and finite: the product is 0 for finite numbers and NaN for others.
    good = active & (0 * curvature < curvature)
    last = curvature.where(active, last)
    alpha = expand(rz / curvature, x)
    # Samples that have stopped are selected, not multiplied by zero: their direction
    # and its image may be NaN.
    x = select(good, torch.addcmul(x, p, alpha), x)
    r_old, r = r, select(good, torch.addcmul(r, q, alpha, value=-1), r)
    n_iter = n_iter + good
    if M is None:
        z, rz_new = r, inner(r, r)
        r_norm = rz_new.sqrt()
    elif flexible:
        r_norm = norm(r)
        # An iteration has nothing to do for samples that have stopped.
        z = M(select(r_norm > target, r, torch.zeros_like(r)))
        rz_new = inner(r, z)
    else:
        z = M(r)
        rz_new, r_norm = inner(r, z), norm(r)
    active = good & (r_norm > target)
    if budget is not None:
        active = active & (n_iter < budget)
    conjugate = rz_new - inner(r_old, z) if flexible else rz_new
    beta = expand((conjugate / rz).where(active, zero), z)
    p = torch.addcmul(z, p, beta)
    return _State(x, r, p, rz_new, r_norm, active, n_iter, last)


def _broken(state: _State) -> Tensor:
    """Returns why samples ended whose direction was of no use, else ``MAX_ITER``."""
    curvature = state.curvature
    finite = curvature.isfinite()
    # With rtol = 0 the residual may become so small that the curvature underflows.
    tiny = state.r_norm < torch.finfo(state.r_norm.dtype).eps
    good = finite & ((curvature > 0) | (curvature == 0) & tiny)
    status = torch.where(finite, Status.BREAKDOWN, Status.NON_FINITE).to(torch.int8)
    return status.where(~good, Status.MAX_ITER)
