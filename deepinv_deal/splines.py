"""Learned linear splines: values, slopes, second-order total variation, constraints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from deepinv_deal._batch import PART

__all__ = ["BoundSpline", "LinearSpline", "linear_spline"]


def linear_spline(x: Tensor, coefficients: Tensor, x_min: float, step: float) -> Tensor:
    r"""
    Evaluates linear splines on uniform knots, extended linearly beyond the outer knots.

    .. math::
        s(x) = (1 - f)\, c_i + f\, c_{i+1}, \qquad
        i = \Big\lfloor \frac{\min(\max(x, x_0), x_{K-2}) - x_0}{h} \Big\rfloor, \quad
        f = \frac{x - x_0}{h} - i.

    Differentiable in ``x`` (slope of the piece; the right one at a knot) and in
    ``coefficients``. No host synchronisation. NaN in gives NaN out.

    :param torch.Tensor x: arguments, shape ``(B, C, ...)``.
    :param torch.Tensor coefficients: values at the knots, shape ``(1, K)`` for one
        spline shared by all channels, or ``(C, K)`` for one spline per channel.
    :param float x_min: first knot.
    :param float step: distance of the knots.
    :return: values, shape of ``x``.
    :raises ValueError: if ``coefficients`` fits neither one spline nor one per channel.
    """
    _check(x, coefficients)
    if torch.is_grad_enabled() and (x.requires_grad or coefficients.requires_grad):
        return _LinearSpline.apply(x, coefficients, x_min, step)
    return _in_parts(x, coefficients, x_min, step)


def _check(x: Tensor, coefficients: Tensor) -> None:
    if coefficients.ndim != 2 or coefficients.shape[0] not in (1, x.shape[1]):
        raise ValueError(
            f"coefficients must have shape (1, K) or ({x.shape[1]}, K) for x with "
            f"{x.shape[1]} channels, got {tuple(coefficients.shape)}."
        )


#: Columns of bins, into which the entries of an accelerator's tensor are added in turn.
_BIN_COLUMNS = 4096


def _in_parts(
    x: Tensor, coefficients: Tensor, x_min: float, step: float, overwrite: bool = False
) -> Tensor:
    """
    Evaluates without gradients, and without temporary tensors of the size of x.

    With ``overwrite``, the values take the place of ``x`` where they can.
    """
    rows, n_splines = _rows(x), len(coefficients)
    channels = x.shape[1] if n_splines > 1 else 1
    whole = x.device.type != "cpu" or not rows.is_contiguous()
    if whole or (n_splines > 1 and rows is x and x.ndim > 2):  # channels are not last
        return _evaluate(x, coefficients, x_min, step)[0]
    flat = rows.reshape(-1, channels)
    keep = not overwrite or x.dtype != coefficients.dtype
    out = torch.empty_like(flat, dtype=coefficients.dtype) if keep else flat
    size = max(1, PART * torch.get_num_threads() // channels)
    for part, target in zip(flat.split(size), out.split(size), strict=True):
        target.copy_(_evaluate(part, coefficients, x_min, step)[0])
    out = out.view(rows.shape)
    return out if rows is x else out.permute(0, 3, 1, 2)


def _evaluate(
    x: Tensor, coefficients: Tensor, x_min: float, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the values, and fraction and index of the pieces."""
    n_splines, n_knots = coefficients.shape
    fraction = (x - x_min) / step
    # The float clamp prevents overflow of the cast, the integer clamp keeps NaN (cast
    # to INT_MIN) inside the table; the fraction stays NaN and reaches the output.
    index = fraction.clamp(0, n_knots - 2).to(torch.int32).clamp_(0, n_knots - 2)
    fraction -= index
    if n_splines > 1:
        index += _channel_offset(x, n_knots)
    left = _lookup(coefficients, index)
    rise = _lookup(_forward_difference(coefficients), index)
    return left.addcmul_(rise, fraction), fraction, index


class _LinearSpline(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, coefficients: Tensor, x_min: float, step: float
    ) -> Tensor:
        values, _, index = _evaluate(x, coefficients, x_min, step)
        ctx.save_for_backward(x, index, coefficients)
        ctx.x_min, ctx.step = x_min, step
        return values

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, index, coefficients = ctx.saved_tensors
        grad_x = grad_coefficients = None
        if ctx.needs_input_grad[0]:
            slopes = _forward_difference(coefficients) / ctx.step
            grad_x = _lookup(slopes, index) * grad
        if ctx.needs_input_grad[1]:
            # From x itself: where derivatives are differentiated again, it counts.
            fraction = (x - ctx.x_min) / ctx.step - _piece(index, coefficients)
            right = fraction * grad
            n = coefficients.numel()
            total = _histogram(index, grad, n)
            rise = _histogram(index, right, n)
            # d/dc_i = sum (1 - f) g,  d/dc_{i+1} = sum f g.
            grad_coefficients = (total - rise + rise.roll(1)).view_as(coefficients)
        return grad_x, grad_coefficients, None, None


def _rows(t: Tensor) -> Tensor:
    """Views ``(B, C, H, W)`` in memory order, without a copy for channels-last."""
    if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1)
    return t


def _lookup(table: Tensor, index: Tensor) -> Tensor:
    rows = _rows(index)
    values = table.reshape(-1).index_select(0, rows.reshape(-1)).view(rows.shape)
    return values if rows is index else values.permute(0, 3, 1, 2)


def _forward_difference(coefficients: Tensor) -> Tensor:
    """Differences to the next knot; the last entry of a row is never looked up."""
    return coefficients.roll(-1, 1) - coefficients


def _channel_offset(x: Tensor, n_knots: int) -> Tensor:
    offset = torch.arange(x.shape[1], device=x.device, dtype=torch.int32) * n_knots
    return offset.view(1, -1, *[1] * (x.ndim - 2))


def _piece(index: Tensor, coefficients: Tensor) -> Tensor:
    """Returns the indices within the spline of their channel."""
    n_splines, n_knots = coefficients.shape
    return index - _channel_offset(index, n_knots) if n_splines > 1 else index


def _histogram(index: Tensor, weights: Tensor, n: int) -> Tensor:
    """Sums ``weights`` by ``index`` into ``n`` bins."""
    rows = _rows(index)
    if index.device.type != "cpu":
        # Neighbours in memory are added to neighbouring bins, so that the threads of a
        # GPU do not wait for one another.
        if rows is not index:
            weights = weights.permute(0, 2, 3, 1)
        width = math.gcd(rows.numel(), _BIN_COLUMNS)
        bins = weights.new_zeros(n, width)
        where = rows.reshape(-1, width).long()
        return bins.scatter_add_(0, where, weights.reshape(-1, width)).sum(1)
    # Many short rows of bins keep the additions parallel; summing them afterwards is
    # cheap and deterministic.
    if rows is not index:
        weights = weights.permute(0, 2, 3, 1)
    n_rows = rows.shape[0] * (rows.shape[1] if rows.ndim > 2 else 1)
    bins = weights.new_zeros(n_rows, n)
    bins.scatter_add_(1, rows.reshape(n_rows, -1).long(), weights.reshape(n_rows, -1))
    return bins.sum(0)


class LinearSpline(nn.Module):
    r"""
    Learned linear splines on :math:`K` uniform knots of :math:`[x_0, x_{K-1}]`.

    With bounds on the slope, the coefficients are re-parametrised: the slopes are
    clamped, integrated again, and the mean of the coefficients is kept, so every
    gradient step stays feasible (:footcite:t:`pourya2025dealing`, Section 3.1.2).

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.splines import LinearSpline
    >>> spline = LinearSpline(4, 0.0, 3.0, init=torch.square)
    >>> spline(torch.tensor([[0.5, 2.5, 4.0]])), spline.slopes()
    (tensor([[ 0.5000,  6.5000, 14.0000]], grad_fn=<_LinearSplineBackward>),
    tensor([[1., 3., 5.]], grad_fn=<DivBackward0>))

    :param int num_knots: number of knots :math:`K \geq 2`.
    :param float x_min: first knot.
    :param float x_max: last knot.
    :param int num_splines: 1 (shared by all channels) or the number of channels.
    :param Callable init: function of the knots giving the first coefficients; identity
        if ``None``.
    :param float slope_min: lower bound of the slopes, or ``None``.
    :param float slope_max: upper bound of the slopes, or ``None``.
    :param float anchor: value at the first knot, instead of keeping the mean of the
        coefficients; ``None`` leaves it free.
    """

    def __init__(
        self,
        num_knots: int,
        x_min: float,
        x_max: float,
        *,
        num_splines: int = 1,
        init: Callable[[Tensor], Tensor] | None = None,
        slope_min: float | None = None,
        slope_max: float | None = None,
        anchor: float | None = None,
    ):
        super().__init__()
        if num_knots < 2 or not x_min < x_max:
            raise ValueError(
                "A spline needs num_knots >= 2 and x_min < x_max, got "
                f"num_knots={num_knots}, x_min={x_min}, x_max={x_max}."
            )
        self.x_min, self.x_max = float(x_min), float(x_max)
        self.slope_min, self.slope_max, self.anchor = slope_min, slope_max, anchor
        self.step = (self.x_max - self.x_min) / (num_knots - 1)
        knots = torch.linspace(self.x_min, self.x_max, num_knots)
        values = knots if init is None else init(knots)
        self.coefficients = nn.Parameter(values.repeat(num_splines, 1))

    @property
    def knots(self) -> Tensor:
        """The knots, shape ``(K,)``."""
        return torch.linspace(self.x_min, self.x_max, self.coefficients.shape[1])

    def constrained_coefficients(self) -> Tensor:
        """
        Returns the values at the knots with the slope bounds met, shape ``(n, K)``.
        """
        c = self.coefficients
        if self.slope_min is None and self.slope_max is None:
            return c if self.anchor is None else c - c[:, :1] + self.anchor
        slopes = (c.diff(dim=1) / self.step).clamp(self.slope_min, self.slope_max)
        integral = nn.functional.pad(slopes.cumsum(1) * self.step, (1, 0))
        if self.anchor is not None:
            return integral + self.anchor
        return integral + (c - integral).mean(1, keepdim=True)

    def slopes(self) -> Tensor:
        """Returns the slopes of the pieces, shape ``(n, K - 1)``."""
        return self.constrained_coefficients().diff(dim=1) / self.step

    def tv2(self) -> Tensor:
        r"""
        Returns :math:`\mathrm{TV}^{(2)}`, the sum of absolute slope changes (scalar).
        """
        return self.slopes().diff(dim=1).abs().sum()

    def bind(self) -> BoundSpline:
        """Returns the function of the current coefficients, constraints included."""
        return BoundSpline(self.constrained_coefficients(), self.x_min, self.step)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluates the splines at ``x`` of shape ``(B, C, ...)``."""
        return self.bind()(x)

    def extra_repr(self) -> str:
        """Describes the module."""
        n, k = self.coefficients.shape
        bounds = (self.slope_min, self.slope_max)
        return f"{n} x {k} knots on [{self.x_min:g}, {self.x_max:g}], slopes {bounds}"


class BoundSpline:
    """
    A linear spline whose coefficients are given tensors: a plain function of ``x``.
    """

    def __init__(self, coefficients: Tensor, x_min: float, step: float):
        self.coefficients, self.x_min, self.step = coefficients, x_min, step

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluates the spline, see :func:`linear_spline`."""
        return linear_spline(x, self.coefficients, self.x_min, self.step)

    def in_place(self, x: Tensor) -> Tensor:
        """
        Evaluates it; where gradients are disabled, the values may overwrite ``x``.

        New memory for large features takes longer than the arithmetic.
        """
        if torch.is_grad_enabled():
            return self(x)
        _check(x, self.coefficients)
        return _in_parts(x, self.coefficients, self.x_min, self.step, overwrite=True)

    def clipped_integral(self, x: Tensor) -> Tensor:
        r"""
        Returns :math:`\int_{x_0}^{x} \mathrm{clip}(s(t), 0, 1) \,\mathrm{d}t`, exactly.

        Clipping adds a knot wherever :math:`s` passes 0 or 1, so the integral of a
        piece whose values run from :math:`a` to :math:`b` is taken over the parts
        between and above these levels:

        .. math::
            \int_0^1 \mathrm{clip}(a + (b - a) t) \,\mathrm{d}t
            = \frac{\tfrac{1}{2} (\bar a + \bar b) |\bar b - \bar a|
            + |(b - 1)_+ - (a - 1)_+|}{|b - a|}, \qquad
            \bar a = \mathrm{clip}(a), \; \bar b = \mathrm{clip}(b).

        :param torch.Tensor x: upper limits, shape ``(B, C, ...)``.
        :return: shape of ``x``, differentiable.
        """
        c = self.coefficients
        n_splines, n_knots = c.shape
        width = (x - self.x_min) / self.step
        index = width.detach().clamp(0, n_knots - 2).long().clamp(0, n_knots - 2)
        pieces = _mean_of_clipped(c[:, :-1], c[:, 1:])
        before = nn.functional.pad(pieces.cumsum(1), (1, 0))
        offset = index
        if n_splines > 1:
            offset = index + _channel_offset(x, n_knots).long()
        start = c.reshape(-1)[offset]
        rest = _mean_of_clipped(start, self(x)) * (width - index)
        return self.step * (before.reshape(-1)[offset] + rest)


def _mean_of_clipped(a: Tensor, b: Tensor) -> Tensor:
    """Means of clip(., 0, 1) over the numbers from a to b."""
    low, high = a.clamp(0, 1), b.clamp(0, 1)
    equal = a == b
    above = (b.clamp_min(1) - a.clamp_min(1)).abs()
    area = (low + high) / 2 * (high - low).abs() + above
    return (area / (b - a).abs().where(~equal, 1)).where(~equal, low)
