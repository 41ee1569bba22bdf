"""Bounds on the values of an image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.solvers import LocalProx

#: Smallest and largest value: numbers, or tensors that expand to the image.
Bounds = tuple[float | Tensor, float | Tensor]


def check_bounds(bounds: Any) -> None:
    """
    Checks bounds that a caller gives.

    :param tuple bounds: the argument; ``None`` for none.
    :raises ValueError: if it is not a pair of numbers, smallest first.
    """
    if bounds is None:
        return
    try:
        low, high = (float(value) for value in bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise ValueError(
            "bounds must be None or (smallest, largest) with smallest < largest, got "
            f"{bounds!r}. For a nonnegative image give (0, float('inf'))."
        )


def clamp(x: Tensor, bounds: Bounds | None) -> Tensor:
    """Projects an image on the bounds."""
    if bounds is None:
        return x
    low, high = bounds
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in bounds)
    return torch.clamp(x, low, high)  # type: ignore[arg-type]


def projection(bounds: Bounds | None) -> LocalProx:
    """Returns the projection of images on the bounds, for a split of ADMM."""
    # Bounds of samples, (B, 1, 1, 1), fit whole images only, not parts of them.
    return LocalProx(lambda x: clamp(x, bounds), evaluate=lambda f, *t: f(*t))


def divided(
    bounds: Bounds | None,
    scale: Tensor | None,
    like: Tensor,
    offset: Tensor | None = None,
) -> Bounds | None:
    """
    Returns bounds for an image of which ``offset (B,)`` was subtracted, and which was
    then divided by ``scale (B,)``.
    """
    if bounds is None:
        return None
    if offset is not None:
        low, high = (v - expand(offset, like) for v in bounds)
        bounds = low, high
    if scale is not None:
        low, high = (v / expand(scale, like) for v in bounds)
        bounds = low, high
    return bounds


def projected_descent(
    x: Tensor, descent: Tensor, step: Tensor, bounds: Bounds | None
) -> Tensor:
    r"""
    Returns :math:`\tfrac1t (P(x + t d) - x)`, the part of a direction of descent
    :math:`d` that the bounds allow; without bounds, :math:`d` itself.

    :param torch.Tensor x: images ``(B, ...)``.
    :param torch.Tensor descent: directions, shape of ``x``.
    :param torch.Tensor step: :math:`t` per sample, ``(B,)``.
    :param tuple bounds: smallest and largest value, or ``None``.
    """
    if bounds is None:
        return descent
    t = expand(step, x)
    return (clamp(x + t * descent, bounds) - x) / t
