"""Per-sample arithmetic on batches ``(B, ...)``, and crops of image batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.linalg import vector_norm

#: What a function of tensors returns.
Output = TypeVar("Output", Tensor, tuple[Tensor, Tensor])

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


def in_parts(function: Callable[..., Output], *tensors: Tensor) -> Output:
    """
    Evaluates an element-wise function of large tensors part by part.

    The function sees parts ``(B, n)``; constants of samples, ``(B, 1, 1, 1)``, must be
    expanded to its arguments, see ``expand``.

    What comes between is not written to memory, where it would take longer than the
    arithmetic. With gradients, on accelerators, and for tensors in different layouts or
    of different shapes, all is evaluated at once.

    :param Callable function: maps tensors ``(B, ...)`` of one shape, any, to one of the
        same shape, or to a tuple of them.
    :param torch.Tensor tensors: its arguments, of equal shape.
    """
    order = _memory_order(tensors)
    if order is None:
        return function(*tensors)
    outputs: list[Tensor] = []
    targets: list[tuple[Tensor, ...]] = []
    for i, part in enumerate(_parts(tensors, order)):
        result = function(*part)
        results = (result,) if isinstance(result, Tensor) else result
        if not outputs:
            outputs = [torch.empty_like(tensors[0], dtype=r.dtype) for r in results]
            targets = list(_parts(outputs, order))
        for target, r in zip(targets[i], results, strict=True):
            target.copy_(r)
    return outputs[0] if isinstance(result, Tensor) else cast(Output, tuple(outputs))


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Returns the norm of the difference of every sample, ``(B,)``, part by part."""
    order = _memory_order((a, b))
    if order is None:
        return norm(a - b)
    squares = [norm(v - w).square() for v, w in _parts((a, b), order)]
    return torch.stack(squares).sum(0).sqrt()


def _parts(
    tensors: Sequence[Tensor], order: tuple[int, ...]
) -> Iterable[tuple[Tensor, ...]]:
    """Views tensors part by part, ``(B, n)``."""
    size = max(1, PART * torch.get_num_threads() // len(tensors[0]))
    views = [t.permute(order).flatten(1).split(size, 1) for t in tensors]
    return zip(*views, strict=True)


def _memory_order(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """
    Returns dimensions in an order in which all tensors are contiguous; ``None`` if
    there is none, or if they are not to be taken apart.
    """
    small = tensors[0].numel() <= PART * torch.get_num_threads()
    if any(t.shape != tensors[0].shape for t in tensors):
        return None
    if small or tensors[0].device.type != "cpu" or torch.is_grad_enabled():
        return None
    ndim = tensors[0].ndim
    orders = [tuple(range(ndim))]
    if ndim == 4:
        orders.append((0, 2, 3, 1))  # channels last
    for order in orders:
        if all(t.permute(order).is_contiguous() for t in tensors):
            return order
    return None
