"""Images in files: what goes in comes out in the same depth, unit and layout."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepinv_deal._atomic import replacing
from deepinv_deal.files.arrays import read_array
from deepinv_deal.files.decode import (
    IMAGES,
    TIFF,
    Decoded,
    check_capability,
    decode,
    encode,
)

#: Suffixes of files to which a result can be written.
WRITABLE = (*IMAGES, ".npy", ".pt")

#: Up to this a floating-point image is taken to be one in [0, 1].
LARGEST_FLOAT = 2.0

#: A mask of two values, one of them zero, has entries below and above these fractions
#: of its largest one.
MASK_LOW, MASK_HIGH = 0.25, 0.75


@dataclass
class Picture:
    """
    An image from a file, with what is needed to write one like it.

    :param torch.Tensor x: pages ``(P, C, H, W)``, float32, white being 1.
    :param float white: what was 1 in the file: 255, 65535, 1 or what the user said.
    :param numpy.dtype dtype: of the numbers in the file.
    :param str layout: order of the axes in the file: ``"HW"``, ``"HWC"``, ``"CHW"`` or
        ``"PCHW"``; pages of picture files are none of them.
    :param numpy.ndarray alpha: opacity ``(P, H, W)`` as in the file, if there is one.
    :param dict metadata: colour profile, resolution and the like, of picture files.
    """

    x: Tensor
    white: float = 1.0
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))
    layout: str = "HW"
    alpha: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def read_picture(path: str | os.PathLike[str], white: float | None = None) -> Picture:
    """
    Reads gray or colour images: a picture file or an array of any kind.

    Arrays are ``(H, W)``, ``(H, W, 3)``, ``(1, H, W)``, ``(3, H, W)`` or ``(P, C, H,
    W)``. TIFF files may have several pages. Pictures are turned upright.

    :param str path: ``FILE`` or ``FILE:NAME``, see :func:`read_array`.
    :param float white: value that counts as 1; if ``None``, 255 or 65535 for unsigned
        integers of 8 or 16 bit, and 1 for floating point.
    :raises ValueError: for other shapes, other integers, or floating point values
        above 2 without ``white``.
    """
    if white is not None and not white > 0:
        raise ValueError(f"white must be positive, got {white}.")
    if Path(path).is_file() and Path(path).suffix.lower() in IMAGES:
        decoded = decode(Path(path))
        pixels, layout = decoded.pixels, "HW" if decoded.pixels.ndim == 3 else "HWC"
        # (P, H, W[, 3]) -> (P, C, H, W)
        pages = pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, -1, 1)
        alpha, metadata = decoded.alpha, decoded.metadata
    else:
        pages, layout = _pages_of_array(read_array(path), path)
        alpha, metadata = None, {}
    white = _white(pages, path) if white is None else white
    x = torch.from_numpy(np.ascontiguousarray(pages, dtype=np.float32)) / white
    return Picture(x, white, pages.dtype, layout, alpha, metadata)


def _pages_of_array(
    array: np.ndarray, path: str | os.PathLike[str]
) -> tuple[np.ndarray, str]:
    """Returns ``(P, C, H, W)`` and the layout of an array."""
    if array.dtype.kind == "c":
        raise ValueError(f"{path} holds complex numbers, an image was expected.")
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path} holds {array.dtype}, no numbers.")
    shape = array.shape
    first, last = array.ndim == 3 and shape[0] == 3, array.ndim == 3 and shape[-1] == 3
    if first and last:
        raise ValueError(
            f"{path} has shape {shape}: it may be (3, H, W) or (H, W, 3). Save it as "
            f"(1, 3, H, W), {(1, *shape)} or {(1, 3, *shape[:2])}."
        )
    if array.ndim == 2:
        return array[None, None], "HW"
    if last and shape[0] != 1:
        return np.moveaxis(array, -1, 0)[None], "HWC"
    if array.ndim == 3 and shape[0] in (1, 3):
        return array[None], "CHW"
    if array.ndim == 4 and shape[1] in (1, 3) and len(array):
        return array, "PCHW"
    raise ValueError(
        f"{path} has shape {shape}; an image is (H, W), (H, W, 3), (1, H, W), (3, H, W)"
        " or (P, C, H, W)."
    )


def _white(pages: np.ndarray, path: str | os.PathLike[str]) -> float:
    dtype = pages.dtype
    if dtype.kind == "b":
        return 1.0
    if dtype.kind == "f":
        top = float(np.nanmax(np.abs(pages), initial=0.0))
        if top > LARGEST_FLOAT:
            raise ValueError(
                f"{path} holds floating point numbers up to {top:g}, but 1 counts as "
                "white. Say which value is white."
            )
        return 1.0
    if dtype.kind == "u" and dtype.itemsize <= 2:
        return float(np.iinfo(dtype).max)
    raise ValueError(f"{path} holds {dtype} numbers: say which of them is white.")


# -- writing ------------------------------------------------------------------------


def check_target(path: str | os.PathLike[str], like: Picture) -> None:
    """
    Checks that a result like an image can be written, before it is computed.

    :param str path: the file to be written.
    :param Picture like: the image that it comes from.
    :raises ValueError: if its suffix is unknown, or the file would lose depth, pages or
        transparency.
    """
    file = Path(path)
    if file.suffix.lower() not in WRITABLE:
        raise ValueError(f"{file}: the result can be written as {', '.join(WRITABLE)}.")
    if file.suffix.lower() in IMAGES:
        check_capability(
            file,
            _depth(like, file)[0],
            pages=len(like.x),
            colour=like.x.shape[1] > 1,
            transparent=like.alpha is not None,
        )


def write_picture(path: str | os.PathLike[str], x: Tensor, like: Picture) -> None:
    """
    Writes images as they were read: same depth, unit, layout and pages.

    Integers are rounded and clipped to their range. Floating-point numbers are not
    clipped; in a picture file that cannot hold them, [0, 1] becomes 8 bit. Arrays of
    integers become floating point, of which nothing is rounded. An existing file is
    replaced when the new one is whole.

    :param str path: picture file, ``.npy`` or ``.pt``.
    :param torch.Tensor x: images ``(P, C, H, W)``; complex ones are allowed in arrays.
    :param Picture like: the image that it came from.
    :raises ValueError: for another suffix, or if something would be lost.
    :raises OSError: if the file cannot be written.
    """
    file = Path(path)
    check_target(file, like)
    suffix = file.suffix.lower()
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        if suffix == ".npy":
            np.save(stream, _as_array(x, like))
        elif suffix == ".pt":
            torch.save(torch.from_numpy(_as_array(x, like)).clone(), stream)
        else:
            encode(stream, suffix, _decoded(x, like, file))


def _as_array(x: Tensor, like: Picture) -> np.ndarray:
    """Returns images in the unit and the layout of the file, floating point."""
    pages = x.detach().cpu() * like.white
    if like.dtype == np.float64:
        pages = pages.to(torch.complex128 if pages.is_complex() else torch.float64)
    if like.layout == "PCHW" or len(pages) > 1:
        return np.ascontiguousarray(pages.numpy())
    image = pages[0]
    if like.layout == "HW" or (like.layout == "HWC" and len(image) == 1):
        image = image[0] if len(image) == 1 else image
    elif like.layout == "HWC":
        image = image.permute(1, 2, 0)
    return np.ascontiguousarray(image.numpy())


def _depth(like: Picture, file: Path) -> tuple[np.dtype, float]:
    """Returns the dtype of the pixels of a picture file, and which of them is white."""
    if like.dtype.kind in "ui":
        return like.dtype, like.white
    if file.suffix.lower() in TIFF:
        return np.dtype(np.float32), like.white
    return np.dtype(np.uint8), 255.0


def _decoded(x: Tensor, like: Picture, file: Path) -> Decoded:
    """Returns the pixels for a picture file, in the depth that it shall have."""
    pixels = x.detach().cpu().double().numpy()  # (P, C, H, W)
    pixels = pixels[:, 0] if pixels.shape[1] == 1 else np.moveaxis(pixels, 1, -1)
    dtype, white = _depth(like, file)
    if dtype.kind in "ui":
        limits = np.iinfo(dtype)
        pixels = np.rint(pixels * white).clip(limits.min, limits.max).astype(dtype)
    else:
        pixels = (pixels * white).astype(dtype)
    return Decoded(pixels, like.alpha, like.metadata)


# -- masks --------------------------------------------------------------------------


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """
    Reads which pixels were measured, boolean, ``(H, W)``.

    A mask has two values, zero being one of them.

    :param str path: ``FILE`` or ``FILE:NAME``, see :func:`read_array`.
    :raises ValueError: for NaN, negative or complex numbers, values in between (from a
        file that was compressed with losses), channels that differ, or zeros only.
    """
    array = read_array(path)
    if array.ndim == 3 and array.shape[-1] == 3:  # a colour picture
        if (array != array[..., :1]).any():
            raise ValueError(f"The mask {path} has channels that differ. Give one.")
        array = array[..., 0]
    if array.dtype.kind not in "buif":
        raise ValueError(f"The mask {path} holds {array.dtype}, no real numbers.")
    values = array.astype(np.float64)
    bad = int((~np.isfinite(values)).sum() + (values < 0).sum())
    if bad:
        raise ValueError(
            f"The mask {path} has {bad} entries that are negative, NaN or infinite. "
            "Give zero where nothing was measured, and one where it was."
        )
    top = values.max(initial=0.0)
    if top == 0:
        raise ValueError(f"The mask {path} is zero everywhere: nothing was measured.")
    between = int(((values > MASK_LOW * top) & (values < MASK_HIGH * top)).sum())
    if between:
        raise ValueError(
            f"The mask {path} has {between} entries between zero and its largest, "
            f"{top:g}. Give a file with two values; JPEG and resizing make others."
        )
    return torch.from_numpy(values > MASK_LOW * top)
