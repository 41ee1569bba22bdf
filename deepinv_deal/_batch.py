"""Per-sample arithmetic on batches ``(B, ...)``, and crops of image batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.linalg import vector_norm

#: Numbers that a core computes at a time: what comes between stays in its cache.
PART = 2**17


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Returns the real inner product of every sample, shape ``(B,)``."""
    product = (a * b.conj()).real if a.is_complex() else a * b
    return product.sum(_all_but_first(a))


def norm(a: Tensor) -> Tensor:
    """Returns the Euclidean norm of every sample, shape ``(B,)``."""
    return vector_norm(a, dim=_all_but_first(a))


def quantile(x: Tensor, q: float) -> Tensor:
    """
    Returns a quantile of every sample, ``(B,)``: one of its values, for any size.

    :param torch.Tensor x: batch ``(B, ...)``.
    :param float q: share of the values below, in [0, 1].
    """
    flat = x.flatten(1)
    return flat.kthvalue(max(1, int(q * flat.shape[1]))).values


def joint_norm(
    parts: Iterable[Tensor], weights: Iterable[float | Tensor] | None = None
) -> Tensor:
    r"""
    Returns the norm of several tensors together, ``(B,)``.

    :param list parts: tensors :math:`v_i` of shape ``(B, ...)``.
    :param list weights: numbers or ``(B,)`` tensors :math:`w_i` of
        :math:`(\sum_i w_i \|v_i\|_2^2)^{1/2}`; ones if ``None``.
    """
    squares = [norm(v).square() for v in parts]
    if weights is not None:
        squares = [w * s for w, s in zip(weights, squares, strict=True)]
    return torch.stack(squares).sum(0).sqrt()


def _all_but_first(a: Tensor) -> tuple[int, ...]:
    if a.ndim < 2:
        raise ValueError(f"A batch needs two dimensions or more, got {a.ndim}.")
    # Flattening would copy features in the channels-last layout, which is slow.
    return tuple(range(1, a.ndim))


def as_batch(values: float | Tensor, like: Tensor) -> Tensor:
    """
    Returns one value per sample of ``like``, ``(B,)``, in its dtype and on its device.

    :param float, torch.Tensor values: one, or one per sample.
    :param torch.Tensor like: any batch ``(B, ...)``.
    """
    values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return values.reshape(-1).expand(len(like))


def expand(values: Tensor, like: Tensor) -> Tensor:
    """
    Views one value per sample ``(B,)`` as ``(B, 1, ..., 1)`` to multiply ``like``.
    """
    return values.reshape(-1, *[1] * (like.ndim - 1))


def select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """
    Takes whole samples from ``a`` where ``condition (B,)`` holds, else from ``b``.
    """
    return a.where(expand(condition, a), b)


def read_counts(flags: Iterable[Tensor]) -> list[int]:
    """
    Returns for how many samples each of several flags ``(B,)`` holds.

    The host waits for the device once, however many flags there are.
    """
    counts: list[int] = torch.stack(list(flags)).sum(1).tolist()
    return counts


def read_any(flags: Iterable[Tensor]) -> list[bool]:
    """Returns whether each of several flags ``(B,)`` holds anywhere, as above."""
    return [count > 0 for count in read_counts(flags)]


def central(x: Tensor, side: int) -> Tensor:
    """Crops images to their central square; smaller ones stay as they are."""
    height, width = x.shape[-2:]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    return x[..., top : top + side, left : left + side]


def in_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """
    Evaluates an element-wise function of large tensors part by part.

    What comes between is not written to memory, where it would take longer than the
    arithmetic. With gradients, on accelerators, and for tensors in different layouts,
    all is evaluated at once.

    :param Callable function: maps tensors ``(B, ...)`` of one shape, any, to one of it.
    :param torch.Tensor tensors: its arguments, of equal shape.
    """
    size = PART * torch.get_num_threads()
    small = tensors[0].numel() <= size or tensors[0].device.type != "cpu"
    order = None if small or torch.is_grad_enabled() else _memory_order(tensors)
    if order is None:
        return function(*tensors)
    size = max(1, size // len(tensors[0]))
    parts = [t.permute(order).flatten(1).split(size, 1) for t in tensors]
    out: Tensor | None = None
    for i, part in enumerate(zip(*parts, strict=True)):
        result = function(*part)
        if out is None:
            out = torch.empty_like(tensors[0], dtype=result.dtype)
            targets = out.permute(order).flatten(1).split(size, 1)
        targets[i].copy_(result)
    assert out is not None
    return out


def _memory_order(tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """Returns dimensions in an order in which all are contiguous, ``None`` if none."""
    ndim = tensors[0].ndim
    orders = [tuple(range(ndim))]
    if ndim == 4:
        orders.append((0, 2, 3, 1))  # channels last
    for order in orders:
        if all(t.permute(order).is_contiguous() for t in tensors):
            return order
    return None
