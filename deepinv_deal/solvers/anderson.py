"""Anderson acceleration with a safeguard, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepinv_deal._batch import expand, norm

#: Acceleration is given up where the residual was not halved in so many iterations.
PATIENCE = 15


class Memory(NamedTuple):
    """
    What the acceleration remembers; all but the lists has one entry per sample.

    :param tuple images: past images :math:`x_j`; the last step began at the last one.
    :param tuple residuals: their residual vectors :math:`r_j`.
    :param torch.Tensor valid: which of them a sample may use, ``(B, m)``.
    :param torch.Tensor usable: the same, empty for samples that do not combine now.
    :param torch.Tensor limit: residual that the last step must not exceed, infinite
        after a plain step.
    :param torch.Tensor rejected: whether the last step exceeded it.
    :param torch.Tensor kept: whether the acceleration has not been given up.
    :param torch.Tensor begun: whether the sample has ever been near.
    :param torch.Tensor accelerated: whether it is accelerated in this iteration.
    :param torch.Tensor goal: residual to reach next.
    :param torch.Tensor waited: for how many iterations it has not been reached.
    """

    images: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    valid: Tensor
    usable: Tensor
    limit: Tensor
    rejected: Tensor
    kept: Tensor
    begun: Tensor
    accelerated: Tensor
    goal: Tensor
    waited: Tensor


@dataclass(frozen=True)
class Anderson:
    """
    Combinations of past images that reduce the residual, and when to trust them.

    :param int depth: largest number of past images.
    """

    depth: int

    def init(self, residual: Tensor) -> Memory:
        """Returns an empty memory for samples with this ``residual``, ``(B,)``."""
        yes = torch.ones_like(residual, dtype=torch.bool)
        none = yes[:, None][:, :0]
        infinite = torch.full_like(residual, torch.inf)
        return Memory(
            images=(),
            residuals=(),
            valid=none,
            usable=none,
            limit=infinite,
            rejected=~yes,
            kept=yes,
            begun=~yes,
            accelerated=~yes,
            goal=infinite,
            waited=torch.zeros_like(residual),
        )

    def rejects(self, memory: Memory, residual: Tensor) -> Tensor:
        """
        Returns which samples, ``(B,)``, stepped from a combination to a ``residual``
        that is larger than before, or NaN.
        """
        return memory.limit.isfinite() & ~(residual <= memory.limit)

    def judge(
        self,
        memory: Memory,
        residual: Tensor,
        best: Tensor,
        near: Tensor,
        active: Tensor,
    ) -> Memory:
        """
        Decides which steps are taken back and which samples are accelerated next.

        Those that are ``near`` are, unless their best residual has not been halved for
        long, which ends their acceleration for good. Where a step is taken back, the
        history is dropped.

        :param Memory memory: what is remembered.
        :param torch.Tensor residual: residual of the current image, ``(B,)``.
        :param torch.Tensor best: smallest residual so far.
        :param torch.Tensor near: samples near enough to the fixed point.
        :param torch.Tensor active: samples that go on.
        """
        # Patience is counted from when a sample was near first, also while it is far
        # again: leaving and coming back does not extend it.
        begun = memory.begun | near
        reached = (best <= memory.goal) | ~begun
        waited = torch.where(reached, 0, memory.waited + 1)
        kept = memory.kept & (waited < PATIENCE)
        accelerated = kept & near
        rejected = active & self.rejects(memory, residual)
        valid = memory.valid & ~rejected[:, None]
        combining = accelerated & active & ~rejected
        return memory._replace(
            valid=valid,
            usable=valid & combining[:, None],
            rejected=rejected,
            kept=kept,
            begun=begun,
            accelerated=accelerated,
            goal=torch.where(reached, best / 2, memory.goal),
            waited=waited,
        )

    def combine(self, memory: Memory, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """
        Returns where steps start, ``x`` where nothing is ``usable``, and the residual
        vectors expected there.

        :param Memory memory: what is remembered.
        :param torch.Tensor x: current image, ``(B, ...)``.
        :param torch.Tensor r: its residual vector.
        """
        # Scaled, lest squares underflow. One after the other: they are large.
        size = norm(r).clamp_min(torch.finfo(r.dtype).tiny)
        dr = _differences(r, memory.residuals)
        dr = dr.div_(expand(size, dr)).nan_to_num_(0, 0, 0)
        b = (r / expand(size, r)).flatten(1).nan_to_num(0, 0, 0)
        gamma = _least_squares(dr, b, memory.usable)[:, None]  # (B, 1, m)
        expected = r - expand(size, r) * (gamma @ dr).view_as(r)
        del dr
        dx = _differences(x, memory.images).nan_to_num_(0, 0, 0)
        return x - (gamma @ dx).view_as(x), expected

    def remember(
        self, memory: Memory, x: Tensor, r: Tensor, residual: Tensor, working: Tensor
    ) -> Memory:
        """
        Adds an image, from which the samples ``working`` step, and its residual.

        :param Memory memory: what is remembered.
        :param torch.Tensor x: the image, ``(B, ...)``.
        :param torch.Tensor r: its residual vector.
        :param torch.Tensor residual: the norm by which steps are judged, ``(B,)``.
        :param torch.Tensor working: samples that step.
        """
        keep = slice(-self.depth, None)
        entry = working & memory.accelerated
        return memory._replace(
            images=(*memory.images, x)[keep],
            residuals=(*memory.residuals, r)[keep],
            valid=torch.cat([memory.valid, entry[:, None]], 1)[:, keep],
            limit=residual.where(memory.usable.any(1), torch.inf),
        )


def _differences(v: Tensor, past: tuple[Tensor, ...]) -> Tensor:
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
