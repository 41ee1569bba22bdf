"""Physics whose buffers fit the measurements and deepinv's convolutions."""

from __future__ import annotations

import copy
from typing import Any

from deepinv.physics import Blur, Downsampling
from torch import Tensor, nn
from torch.nn import functional as F

#: Paddings with which deepinv 0.5 transposes a convolution wrongly, or not at all, if a
#: side of the kernel is 1 or, for some, 2.
_MENDED_PADDINGS = ("circular", "reflect", "replicate")
_SHORTEST_SIDE = 3


def fitted(physics: Any, y: Any) -> Any:
    """
    Returns a physics for measurements in the given precision, or the same if it fits.

    Masks, kernels and maps in another precision than the measurements, as NumPy makes
    them, are converted. A kernel with a side of 1 or 2 (binning, motion along an axis)
    is enlarged by zeros to one of at least 3, with the same centre, index ``n // 2``:
    deepinv's transposed convolution fails for it, or is no transpose without a word.
    The physics itself is not changed.

    :param deepinv.physics.LinearPhysics physics: forward operator.
    :param torch.Tensor y: measurements.
    """
    if not isinstance(physics, nn.Module):
        return physics
    parts = [y] if isinstance(y, Tensor) else list(y)
    changed = {
        name: value
        for name, buffer in physics.named_buffers(recurse=False)
        if not name.startswith("_")  # deepinv's own
        and (value := _in_precision_of(buffer, parts[0])) is not buffer
    }
    if isinstance(physics, (Blur, Downsampling)) and _is_short(physics):
        changed["filter"] = _enlarged(changed.get("filter", physics.filter))
    if not changed:
        return physics
    physics = copy.copy(physics)
    for members in ("_buffers", "_parameters"):
        kept = {k: v for k, v in getattr(physics, members).items() if k not in changed}
        physics.__dict__[members] = kept
    physics._buffers.update(changed)
    return physics


def _in_precision_of(buffer: Tensor, y: Tensor) -> Tensor:
    dtype = y.dtype.to_real()
    if not y.is_floating_point() and not y.is_complex():
        return buffer  # an error, elsewhere
    if buffer.is_complex():
        return buffer.to(dtype.to_complex())
    return buffer.to(dtype) if buffer.is_floating_point() else buffer


def _is_short(physics: Blur | Downsampling) -> bool:
    kernel = physics.filter
    return (
        isinstance(kernel, Tensor)
        and physics.padding in _MENDED_PADDINGS
        and min(kernel.shape[-2:]) < _SHORTEST_SIDE
    )


def _enlarged(kernel: Tensor) -> Tensor:
    """Adds zeros, so that index ``n // 2`` remains the centre."""
    height, width = kernel.shape[-2:]
    sides = {1: (1, 1), 2: (0, 1)}
    return F.pad(kernel, (*sides.get(width, (0, 0)), *sides.get(height, (0, 0))))
