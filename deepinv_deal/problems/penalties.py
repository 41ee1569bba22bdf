r"""Sparsity penalties of coefficients: proximal map, value, and its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deepinv_deal._batch import in_parts
from deepinv_deal.solvers.proximal import soft_threshold

#: Rows (and columns) of the groups of coefficients that belong together.
GROUP_SIDE = 2

#: Largest number of steps of the Newton method that inverts a proximal map.
NEWTON_STEPS = 60


class Penalty(Protocol):
    r"""
    A separable penalty :math:`R` of coefficients ``(B, p, H', W')``.

    ``prox(v, r)`` is :math:`\mathrm{prox}_{R/r}(v)`.
    """

    @property
    def weak_convexity(self) -> float:
        r"""Smallest :math:`\rho` with :math:`R + \tfrac\rho2 \|\cdot\|^2` convex."""
        ...

    def prox(self, v: Tensor, r: float = 1.0) -> Tensor:
        r"""Returns :math:`\arg\min_a \tfrac r2 \|a - v\|^2 + R(a)`, shape of ``v``."""
        ...

    def value(self, a: Tensor) -> Tensor:
        """Returns R(a) of every sample, ``(B,)``."""
        ...

    def jacobian(self, v: Tensor) -> Callable[[Tensor, float], Tensor]:
        r"""
        Returns ``apply(e, power)``: powers of the derivative of ``prox`` at ``v``.

        The derivative :math:`S` is symmetric and positive semidefinite.
        """
        ...


@dataclass(frozen=True)
class L1Penalty:
    r"""
    The weighted l1 norm :math:`R(a) = \sum_{j,k} t_j |a_{j,k}|`.

    :param torch.Tensor threshold: the :math:`t_j`, broadcastable to ``(B, p, H', W')``.
    """

    threshold: Tensor
    weak_convexity = 0.0

    def prox(self, v: Tensor, r: float = 1.0) -> Tensor:
        """Returns the soft threshold of ``v`` at ``threshold / r``."""
        return soft_threshold(v, self.threshold / r)

    def value(self, a: Tensor) -> Tensor:
        """Returns R(a), ``(B,)``."""
        return (self.threshold * a.abs()).flatten(1).sum(1)

    def jacobian(self, v: Tensor) -> Callable[[Tensor, float], Tensor]:
        """Returns powers of the derivative of ``prox``: the support."""
        active = (v.abs() > self.threshold).to(v.dtype)
        return lambda e, _power: active * e


@dataclass(frozen=True)
class SlicedPenalty:
    r"""
    The mean of a penalty over the patches of all three orientations of a volume.

    :math:`R(a) = \tfrac13 \sum_o R_o(\sqrt 3\, a_o)` for coefficients of
    :class:`~deepinv_deal.operators.patches.SlicedPatchFrame`.

    :param tuple parts: the penalty of every orientation, of ``(n, p, H', W')``.
    :param PatchFrame frame: the dictionary.
    """

    parts: tuple[Any, ...]
    frame: Any

    @property
    def weak_convexity(self) -> float:
        """That of its parts."""
        return self.parts[0].weak_convexity

    def _unpacked(self, v: Tensor) -> Iterator[tuple[Any, Tensor]]:
        stacks = self.frame.unpack(3**0.5 * v, len(self.frame.C))
        return zip(self.parts, stacks, strict=True)

    def prox(self, v: Tensor, r: float = 1.0) -> Tensor:
        r"""Returns :math:`\mathrm{prox}_{R/r}(v)`."""
        parts = [R.prox(stack, r) for R, stack in self._unpacked(v)]
        return 3**-0.5 * self.frame.pack(parts, len(v))

    def value(self, a: Tensor) -> Tensor:
        """Returns R(a), ``(B,)``."""
        values = [R.value(s).view(len(a), -1).sum(1) for R, s in self._unpacked(a)]
        return torch.stack(values).sum(0) / 3

    def jacobian(self, v: Tensor) -> Callable[[Tensor, float], Tensor]:
        """Returns powers of the derivative of ``prox``."""
        maps = [R.jacobian(stack) for R, stack in self._unpacked(v)]

        def apply(e: Tensor, power: float) -> Tensor:
            stacks = self.frame.unpack(e, len(self.frame.C))
            parts = [S(s, power) for S, s in zip(maps, stacks, strict=True)]
            return self.frame.pack(parts, len(e))

        return apply


@dataclass(frozen=True)
class GroupPenalty:
    r"""
    The weighted group norm :math:`R(a) = \sum_{j,G} t_j \|a_{j,G}\|_2` over blocks
    :math:`G` of 2 x 2 positions.

    It is the penalty of CPR in :footcite:t:`ducotterd2024smooth`.
    Blocks do not overlap and start at the upper left corner. Where the number of rows
    or columns is odd, the last blocks are smaller: coefficients continued by one row
    or column of zeros.

    :param torch.Tensor threshold: the :math:`t_j`, broadcastable to ``(B, p, H', W')``.
    """

    threshold: Tensor
    weak_convexity = 0.0

    def prox(self, v: Tensor, r: float = 1.0) -> Tensor:
        """Returns the group threshold of ``v`` at ``threshold / r``."""
        return v * _spread(self._gain(v, r)[0], v)

    def _gain(self, v: Tensor, r: float = 1.0) -> tuple[Tensor, Tensor]:
        """The factor of every block, and its inverse norm; 0 where it is set to 0."""
        t = self.threshold / r
        square = _block_sums(v.square())
        active = square > t.square()
        # Never the root of 0, which has no derivative.
        inverse = active / square.where(active, 1).sqrt()
        # Rounding may leave a tiny negative number, which has no square root.
        return (active * (1 - t * inverse)).clamp_min(0), inverse

    def value(self, a: Tensor) -> Tensor:
        """Returns R(a), ``(B,)``."""
        square = _block_sums(a.square())
        active = square > 0
        size = active * square.where(active, 1).sqrt()
        return (self.threshold * size).flatten(1).sum(1)

    def jacobian(self, v: Tensor) -> Callable[[Tensor, float], Tensor]:
        r"""
        Returns powers of the derivative of ``prox``, one matrix per block.

        Its eigenvalues are 1 along the block of ``v``, :math:`1 - t / \|v_G\|`
        across, and 0 for a block that is set to zero.
        """
        gain, inverse = self._gain(v)
        direction = v * _spread(inverse, v)

        @lru_cache(maxsize=4)
        def parts(power: float) -> tuple[Tensor, Tensor]:
            across = _spread(gain**power, v)
            return across, (1 - across) * direction

        def apply(e: Tensor, power: float) -> Tensor:
            across, more_along = parts(power)
            along = _spread(_block_sums(direction * e), e)
            return torch.addcmul(across * e, more_along, along)

        return apply


def _block_sums(a: Tensor) -> Tensor:  # (B, p, H, W) -> (B, p, H / 2, W / 2)
    """Sums over blocks of 2 x 2 positions; smaller blocks at odd ends."""
    height, width = a.shape[-2:]
    if height % 2 or width % 2:
        a = F.pad(a, (0, width % 2, 0, height % 2))
    rows = a[..., ::2, :] + a[..., 1::2, :]  # several times faster than pooling
    return rows[..., ::2] + rows[..., 1::2]


def _spread(blocks: Tensor, like: Tensor) -> Tensor:
    """Gives every position the value of its block."""
    height, width = like.shape[-2:]
    everywhere = blocks.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return everywhere[..., :height, :width]


@dataclass(frozen=True)
class WeaklyConvexPenalty:
    r"""
    The penalty whose proximal map is a smooth compromise of hard and soft threshold.

    .. math::
        \mathrm{prox}_R(v) = T(v) = \frac{v |v|^g}{l^g + |v|^g}

    (:footcite:t:`ducotterd2024smooth`). :math:`T` is increasing, so it is the proximal
    map of a function :math:`R`, unique up to a constant and :math:`\rho`-weakly convex
    with :math:`\rho = ((g - 1) / (g + 1))^2`. Its Moreau envelope is

    .. math::
        M(v) = \int_0^v w - T(w) \, \mathrm{d} w
        = l^2 \int_0^{|v| / l} \frac{s}{1 + s^g} \, \mathrm{d} s,
        \qquad R(T(v)) = M(v) - \tfrac12 (v - T(v))^2,

    for :math:`g = 2` the Cauchy function :math:`\tfrac{l^2}{2} \log(1 + v^2 / l^2)`.

    :param torch.Tensor threshold: the :math:`l_j > 0`, broadcastable to ``(B, p, H',
        W')``.
    :param float order: the exponent :math:`1 < g \leq 2`.
    :param float largest_slope: where to cut off the derivative of :math:`T`, which may
        exceed 1. Below 1, gradients of solutions exist at any coefficients, not only
        near a minimiser, but are approximate, at a minimiser too.
    """

    threshold: Tensor
    order: float = 2.0
    largest_slope: float = math.inf

    @property
    def weak_convexity(self) -> float:
        r"""The modulus :math:`\rho`."""
        return ((self.order - 1) / (self.order + 1)) ** 2

    def _power(self, v: Tensor) -> Tensor:
        return v.square() if self.order == 2 else v.abs() ** self.order

    def prox(self, v: Tensor, r: float = 1.0) -> Tensor:
        r"""
        Returns :math:`\mathrm{prox}_{R/r}(v)`; anything but r = 1 inverts T.

        :param torch.Tensor v: coefficients, shape ``(B, p, H', W')``.
        :param float r: inverse step, larger than the modulus :math:`\rho`.
        """
        if r != 1:
            # z = T(u) minimises if v = z + (u - z) / r.
            v = self._invert(v, 1 / r)
        if self.order == 2:
            q = v.square()
            return v * (q / (self.threshold.square() + q))
        # q / (l^g + q) as a logistic function: faster than a power. The logarithm has
        # no derivative at 0, where that of T is 0.
        size = v.abs().clamp_min(torch.finfo(v.dtype).tiny)
        shift = -self.order * self.threshold.log()
        return v * torch.add(shift, size.log(), alpha=self.order).sigmoid()

    @torch.no_grad()
    def _invert(self, v: Tensor, step: float) -> Tensor:
        r"""
        Returns u with :math:`v = s u + (1 - s) T(u)`, s the step.

        By Newton's method inside a bracket, on magnitudes in units of the threshold;
        there :math:`0 \leq u - T(u) \leq 1`.
        """
        size = v.abs() / self.threshold
        low = size / step if step > 1 else size
        high = size if step > 1 else size + 1
        u = (low + high) / 2
        if step < 1:  # T(u) is about u^(g + 1) where it is small
            u = ((size / (1 - step)) ** (1 / (1 + self.order))).clamp(low, high)
        tiny, close = torch.finfo(v.dtype).tiny, 8 * torch.finfo(v.dtype).eps
        for k in range(NEWTON_STEPS):
            q = self._power(u)
            gain = q / (1 + q)
            slope = step + (1 - step) * gain * (1 + self.order / (1 + q))
            error = step * u + (1 - step) * u * gain - size
            low, high = u.where(error < 0, low), u.where(error > 0, high)
            new = u - error / slope.clamp_min(tiny)
            # Bisect where Newton's method leaves the bracket.
            new = new.where((new >= low) & (new <= high), (low + high) / 2)
            change, u = (new - u).abs(), new
            if k % 4 == 3 and (change <= close * u.clamp_min(1e-6)).all():
                break
        return torch.copysign(u * self.threshold, v)

    def value(self, a: Tensor) -> Tensor:
        """Returns R(a), ``(B,)``; for an order below 2 to about ten digits."""
        threshold = self.threshold.expand_as(a)
        if a.device.type == "cpu" and not torch.is_grad_enabled():
            # Parts are views of tensors of one shape and layout.
            threshold = torch.empty_like(a).copy_(threshold)
        return in_parts(self._values, a, threshold).flatten(1).sum(1)

    def _values(self, a: Tensor, threshold: Tensor) -> Tensor:
        """The value of every coefficient."""
        # At the preimage v the derivatives through v cancel: v may stay fixed.
        v = replace(self, threshold=threshold)._invert(a, 0.0)
        s = v.abs() / threshold
        if self.order == 2:
            envelope = 0.5 * torch.log1p(s.square())
        else:
            envelope = _Envelope.apply(s, self.order)
        return threshold.square() * envelope - 0.5 * (v - a).square()

    def jacobian(self, v: Tensor) -> Callable[[Tensor, float], Tensor]:
        """Returns powers of the derivative of ``prox``, a diagonal."""
        q = self._power(v / self.threshold)
        slope = q / (1 + q) * (1 + self.order / (1 + q))
        slope = slope.clamp_max(self.largest_slope)
        return lambda e, power: slope**power * e


#: The envelope is tabulated over equal cells of log(1 + s), up to s of about 2e8.
TABLE_END, TABLE_CELLS = 19.0, 4096


@lru_cache(maxsize=8)
def _envelope_table(order: float) -> Tensor:
    r"""Integrates :math:`\int_0^s w / (1 + w^g) dw` by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    h = TABLE_END / TABLE_CELLS
    s = np.expm1(h * (np.arange(TABLE_CELLS)[:, None] + 0.5 * (1 + nodes)))
    cells = (s / (1 + s**order) * (1 + s)) @ weights * (h / 2)
    return torch.from_numpy(np.concatenate([[0.0], np.cumsum(cells)]))


class _Envelope(torch.autograd.Function):
    """The tabulated envelope, with its exact derivative."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, order: float) -> Tensor:
        ctx.save_for_backward(s)
        ctx.order = order
        table = _envelope_table(order).to(s)
        h = TABLE_END / TABLE_CELLS
        t = torch.log1p(s) / h
        cell = t.long().clamp(0, TABLE_CELLS - 1)
        fraction = t - cell

        def slope(cell: Tensor) -> Tensor:
            w = torch.expm1(h * cell.to(s))
            return h * w / (1 + w**order) * (1 + w)

        # cubic Hermite interpolation
        left, right = table[cell], table[cell + 1]
        rise = right - left
        bend = (1 - fraction) * (slope(cell) - rise)
        bend = bend + fraction * (rise - slope(cell + 1))
        return left + fraction * rise + fraction * (1 - fraction) * bend

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        return grad * s / (1 + s**ctx.order), None
