"""Evaluation of local maps in blocks of rows: less memory, or all in the cache."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from deepinv_deal._batch import Output

#: Largest size in bytes of the features of one block, all channels of one layer.
BLOCK_BYTES = 2**26

#: The same for chains of element-wise maps, each of which is to find the last one's
#: result in the cache of the CPU.
CACHE_BYTES = 2**19


def cache_bytes(device: torch.device) -> int:
    """Returns the size of such a block; other devices take everything at once."""
    return CACHE_BYTES if device.type == "cpu" else sys.maxsize


def row_blocks(
    height: int, row_bytes: int, block_bytes: int, least: int = 1, multiple: int = 1
) -> list[slice]:
    """
    Divides rows into blocks of at most ``block_bytes``, but at least ``least`` rows.

    :param int height: number of rows.
    :param int row_bytes: size of a row.
    :param int block_bytes: size of a block.
    :param int least: smallest number of rows, except in the last block.
    :param int multiple: blocks start at multiples of so many rows.
    """
    rows = max(block_bytes // max(1, row_bytes), least)
    rows += -rows % multiple
    return [slice(i, min(i + rows, height)) for i in range(0, height, rows)]


def in_row_blocks(
    function: Callable[..., Output],
    *inputs: Tensor,
    reach: int,
    channels: int,
    block_bytes: int | None = None,
    multiple: int = 1,
) -> Output:
    """
    Evaluates ``function(*inputs)`` block by block where its features would be large.

    Every block is evaluated with ``reach`` more rows on each side, which are then cut
    off: the result is the same. It is not done where gradients are enabled, since the
    features may have to be kept for them.

    :param Callable function: maps ``(B, C, H, W)`` to ``(B, C', H, W)``, or to a tuple
        of them; an output pixel sees no further than ``reach`` rows, and rows beyond
        the inputs are zero in every layer.
    :param torch.Tensor inputs: tensors ``(B, C, H, W)`` of equal B, H and W.
    :param int reach: rows that an output pixel sees on each side.
    :param int channels: largest number of channels of the features.
    :param int block_bytes: size of a block; ``BLOCK_BYTES`` if ``None``.
    :param int multiple: blocks start at multiples of so many rows.
    """
    batch, _, height, width = inputs[0].shape
    row_bytes = batch * width * channels * inputs[0].element_size()
    size = BLOCK_BYTES if block_bytes is None else block_bytes
    # Of blocks of a few rows, most is computed to be cut off.
    blocks = row_blocks(height, row_bytes, size, max(multiple, 8 * reach), multiple)
    if len(blocks) < 2 or torch.is_grad_enabled():
        return function(*inputs)
    outputs: list[Tensor] = []
    for block in blocks:
        low = max(0, block.start - reach)
        result = function(*(t[..., low : block.stop + reach, :] for t in inputs))
        parts = (result,) if isinstance(result, Tensor) else result
        if not outputs:
            outputs = [p.new_empty(batch, p.shape[1], height, width) for p in parts]
        for out, part in zip(outputs, parts, strict=True):
            out[..., block, :] = part[..., block.start - low : block.stop - low, :]
    return outputs[0] if isinstance(result, Tensor) else cast(Output, tuple(outputs))
