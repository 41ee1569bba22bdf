"""Per-sample arithmetic on batches of shape ``(B, ...)``."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Returns the real inner product of every sample, shape ``(B,)``."""
    product = (a * b.conj()).real if a.is_complex() else a * b
    return product.sum(_all_but_first(a))


def norm(a: Tensor) -> Tensor:
    """Returns the Euclidean norm of every sample, shape ``(B,)``."""
    return vector_norm(a, dim=_all_but_first(a))


def _all_but_first(a: Tensor) -> tuple[int, ...]:
    if a.ndim < 2:
        raise ValueError(f"A batch needs two dimensions or more, got {a.ndim}.")
    # Flattening would copy features in the channels-last layout, which is slow.
    return tuple(range(1, a.ndim))


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
