"""Batched conjugate gradients in which every sample stops on its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm, select
from deepinv_deal.solvers.result import SolverResult, Status

LinearMap = Callable[[Tensor], Tensor]


def conjugate_gradient(
    A: LinearMap,  # (B, ...) -> (B, ...)
    b: Tensor,  # (B, ...)
    *,
    init: Tensor | None = None,  # (B, ...)
    rtol: float | Tensor = 1e-5,  # scalar or (B,)
    max_iter: int | Tensor = 100,  # scalar or (B,)
    preconditioner: LinearMap | None = None,
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
        all or one per sample ``(B,)``. With ``0``, ``max_iter`` iterations are run,
        fewer if rounding ends the progress before.
    :param int, torch.Tensor max_iter: largest number of iterations, one for all or one
        per sample ``(B,)``.
    :param Callable preconditioner: symmetric positive definite approximation of
        :math:`A^{-1}`; identity if ``None``.
    :param int check_every: number of iterations between two looks at whether all
        samples have stopped. Each look waits for the device; results do not depend on
        it. ``None``: 1 on the CPU, 8 elsewhere.
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
    M = preconditioner or (lambda v: v)
    if check_every is None:
        check_every = 1 if b.device.type == "cpu" else 8

    b_norm = norm(b)
    nonzero = b_norm != 0  # True for NaN, which must not pass as a solved zero system
    scale = expand(b_norm.where(nonzero, torch.ones_like(b_norm)), b)
    b = b / scale
    target = torch.as_tensor(rtol, dtype=b_norm.dtype, device=b.device) * nonzero
    x = torch.zeros_like(b)
    r = b
    if init is not None:
        x = select(nonzero, init / scale, x)
        r = b - A(x)

    r_norm = norm(r)
    active = ((r_norm > target) | r_norm.isnan()) & (max_iter > 0)
    status = torch.full_like(active, Status.MAX_ITER, dtype=torch.int8)
    n_iter = torch.zeros_like(status, dtype=torch.int64)
    z = M(r)
    p, rz = z, inner(r, z)
    verified = torch.full_like(r_norm, torch.inf)  # last recomputed residual
    # The budget is counted per sample: one that restarts late, because the slowest of
    # its batch was waited for, still has the iterations it would have alone.
    for k in count():
        if k % check_every == 0 and not active.any():
            if not verify or k == 0 and init is None:
                break
            # Residual replacement: restart samples whose true residual is still too
            # large, unless the last restart had stopped to pay.
            r = b - A(x)
            r_norm = norm(r)
            again = (r_norm > target) & (r_norm < 0.5 * verified)
            again &= (status < Status.BREAKDOWN) & (n_iter < max_iter)
            verified = r_norm
            if not again.any():
                break
            active = again
            z = M(r)
            p, rz = z, inner(r, z)
        q = A(p)
        curvature = inner(p, q)
        good = active & (curvature > 0) & curvature.isfinite()
        bad = torch.where(curvature.isfinite(), Status.BREAKDOWN, Status.NON_FINITE)
        # With rtol = 0 the residual may become so small that the curvature underflows.
        underflow = (curvature == 0) & (r_norm < torch.finfo(r_norm.dtype).eps)
        status = status.where(~active | good | underflow, bad.to(status.dtype))
        alpha = expand((rz / curvature).where(good, 0), b)
        x = select(good, x + alpha * p, x)
        r = select(good, r - alpha * q, r)
        n_iter += good
        r_norm = norm(r)
        active = good & (r_norm > target) & (n_iter < max_iter)
        z = M(r)
        rz_new = inner(r, z)
        beta = expand((rz_new / rz).where(active, 0), b)
        p = select(active, z + beta * p, p)
        rz = rz_new
    status = status.where(r_norm > target, Status.CONVERGED)
    status = status.where(r_norm.isfinite(), Status.NON_FINITE)
    return SolverResult(x * scale, status, n_iter, r_norm)
