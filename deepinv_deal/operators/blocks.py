"""Evaluation of local maps in blocks: less memory, or all in the cache."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import product
from typing import cast

import torch
from torch import Tensor

from deepinv_deal._batch import Output

#: Largest size in bytes of the features of one block, all channels of one layer, per
#: sample: a batch needs as many times that as its images need anyway.
BLOCK_BYTES = 2**26

#: The same for chains of element-wise maps, each of which is to find the last one's
#: result in the cache of the CPU.
CACHE_BYTES = 2**19

#: Blocks have about so many times the rows and columns that a pixel sees, or more: of
#: smaller ones, most would be computed to be cut off.
LEAST_REACHES = 8


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


def in_blocks(
    function: Callable[..., Output],
    *inputs: Tensor,
    reach: int,
    channels: int,
    block_bytes: int | None = None,
    multiple: int = 1,
) -> Output:
    """
    Evaluates ``function(*inputs)`` block by block where its features would be large.

    Every block is evaluated with ``reach`` more rows and columns on each side, which
    are then cut off: the result is the same. Blocks are whole rows, or squares where
    too few rows fit in, most of which would be computed to be cut off. It is not done
    where gradients are enabled, since the features may have to be kept for them.

    :param Callable function: maps ``(B, C, H, W)`` to ``(B, C', H, W)``, or to a tuple
        of them; an output pixel sees no further than ``reach`` rows and columns, and
        what is beyond the inputs is zero in every layer.
    :param torch.Tensor inputs: tensors ``(B, C, H, W)`` of equal B, H and W.
    :param int reach: rows and columns that an output pixel sees on each side.
    :param int channels: largest number of channels of the features.
    :param int block_bytes: size of a block and what it sees in one sample, as far as
        possible; ``BLOCK_BYTES`` if ``None``.
    :param int multiple: blocks start at multiples of so many rows.
    """
    batch, _, height, width = inputs[0].shape
    pixel_bytes = channels * inputs[0].element_size()
    size = BLOCK_BYTES if block_bytes is None else block_bytes
    least, side = max(multiple, LEAST_REACHES * reach), width
    if reach and (least + 2 * reach) * width * pixel_bytes > size:
        side = max(least, math.isqrt(size // max(1, pixel_bytes)) - 2 * reach)
        side = math.ceil(width / math.ceil(width / side))  # equal ones
    row_bytes = min(width, side + 2 * reach) * pixel_bytes
    across = row_blocks(
        height, row_bytes, size - 2 * reach * row_bytes, least, multiple
    )
    blocks = list(product(across, row_blocks(width, 1, side)))
    if len(blocks) < 2 or torch.is_grad_enabled():
        return function(*inputs)
    outputs: list[Tensor] = []
    for rows, columns in blocks:
        top, left = max(0, rows.start - reach), max(0, columns.start - reach)
        seen = slice(top, rows.stop + reach), slice(left, columns.stop + reach)
        result = function(*(t[..., seen[0], seen[1]] for t in inputs))
        parts = (result,) if isinstance(result, Tensor) else result
        if not outputs:
            outputs = [p.new_empty(batch, p.shape[1], height, width) for p in parts]
        inner_rows = slice(rows.start - top, rows.stop - top)
        inner_columns = slice(columns.start - left, columns.stop - left)
        for out, part in zip(outputs, parts, strict=True):
            out[..., rows, columns] = part[..., inner_rows, inner_columns]
    return outputs[0] if isinstance(result, Tensor) else cast(Output, tuple(outputs))
