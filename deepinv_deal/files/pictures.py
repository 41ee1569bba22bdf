"""Images in files: what goes in comes out in the same depth, unit and layout."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepinv_deal._atomic import check_writable, replacing
from deepinv_deal.files import arrays
from deepinv_deal.files.arrays import ARRAY, read_array
from deepinv_deal.files.decode import (
    IMAGES,
    LOSSY,
    TIFF,
    Decoded,
    check_capability,
    decode,
    encode,
    resized,
)
from deepinv_deal.files.dicom import DICOM, DicomHeader, is_dicom
from deepinv_deal.files.kinds import (
    Kind,
    Picture,
    as_numbers,
    named,
    split_name,
    suffix_of,
)
from deepinv_deal.files.nifti import NIFTI, NiftiHeader

#: Up to this a floating-point image is taken to be one in [0, 1].
LARGEST_FLOAT = 2.0

#: Entries of a mask of two values, one of them zero, differ from these by at most the
#: first fraction of the larger one; the second if compression has moved them.
MASK_MARGIN, LOSSY_MARGIN = 0.01, 0.25


# -- reading ------------------------------------------------------------------------


def read_picture(
    path: str | os.PathLike[str],
    white: float | str | None = None,
    *,
    black: float = 0.0,
    volume: bool = False,
) -> Picture:
    """
    Reads gray or colour images: a file of any kind, or a folder with a DICOM series.

    Arrays are ``(H, W)``, ``(H, W, 3)``, ``(1, H, W)``, ``(3, H, W)``, ``(P, H, W)``,
    in files of MATLAB ``(H, W, P)``, or ``(P, C, H, W)``. TIFF files may have several
    pages, and pages of NIfTI files and of DICOM series are slices. Pictures are turned
    upright.

    :param str path: ``FILE`` or ``FILE:NAME``, see :func:`read_array`; for one of
        several DICOM series ``FOLDER:NUMBER``.
    :param float white: value that counts as 1, or ``"max"``: the largest one; if
        ``None``, 255 or 65535 for unsigned integers of 8 or 16 bit, and 1 for floating
        point.
    :param float black: value that counts as 0.
    :param bool volume: whether arrays with three axes are ``(D, H, W)``, even with 3 as
        the first or last side.
    :raises ValueError: for other shapes, other integers, integers of 16 bit in NIfTI or
        DICOM files or floating point values above 2 without ``white``, or a library
        that is missing.
    """
    if isinstance(white, float | int) and not black < white < math.inf:
        what = "positive" if black == 0 else f"greater than black, {black:g}"
        raise ValueError(f"white must be {what}, got {white}.")
    file, name = split_name(path)
    kind = _kind_to_read(file)
    with named(path):
        if kind is ARRAY:
            picture = arrays.read(file, name, volume=volume)
        else:
            picture = kind.read(file, name)
    picture.white = _white(picture, path, white)
    picture.black = black
    if not picture.white > black:
        raise ValueError(f"{path} has no value above black, {black:g}.")
    picture.x = (picture.x - black) / (picture.white - black)
    return picture


def _kind_to_read(file: Path) -> Kind:
    if file.is_dir():
        return DICOM
    kind = _BY_SUFFIX.get(suffix_of(file))
    if kind is None:
        kind = DICOM if is_dicom(file) else ARRAY  # which knows what to say
    return kind


def _white(
    picture: Picture, path: str | os.PathLike[str], asked: float | str | None
) -> float:
    values, dtype = picture.x, picture.dtype
    if asked == "max":
        return float(values.nan_to_num(-torch.inf, -torch.inf, -torch.inf).max())
    if asked is not None:
        return float(asked)
    if dtype.kind == "b":
        return 1.0
    if dtype.kind == "f":
        top = float(np.nanmax(values.abs().numpy(), initial=0.0))
        if top == math.inf:
            raise ValueError(f"{path} holds infinite numbers. Remove them.")
        if top > LARGEST_FLOAT:
            raise ValueError(
                f"{path} holds floating point numbers up to {top:g}, but 1 counts as "
                "white. Say which value is white."
            )
        return 1.0
    full = dtype.itemsize <= 2 if picture.says_white else dtype.itemsize == 1
    if dtype.kind == "u" and full:
        return float(np.iinfo(dtype).max)
    raise ValueError(
        f"{path} holds {dtype} numbers: say which of them is white. They go up to "
        f"{float(values.max()):g}."
    )


def _read_image(file: Path, name: str | None) -> Picture:
    if name is not None:
        raise ValueError(f"{file} holds no {name!r}: pictures have no names.")
    decoded = decode(file)
    pixels = decoded.pixels
    # (P, H, W[, 3]) -> (P, C, H, W)
    pages = pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, -1, 1)
    return Picture(
        torch.from_numpy(np.ascontiguousarray(pages, dtype=np.float32)),
        dtype=pixels.dtype,
        layout="HW" if pixels.ndim == 3 else "HWC",
        alpha=decoded.alpha,
        metadata=decoded.metadata,
        stack=decoded.stack or (len(pages),),
        depth=decoded.depth,
    )


# -- writing ------------------------------------------------------------------------


def check_target(path: str | os.PathLike[str], like: Picture) -> None:
    """
    Checks that a result like an image can be written, before it is computed.

    :param str path: the file to be written, or a folder for a DICOM series.
    :param Picture like: the image that it comes from; the size of the result, if that
        is another one, is that of ``like.x``.
    :raises ValueError: if its suffix is unknown, the file would lose depth, pages,
        transparency or other arrays, a header does not fit, or a library is missing.
    :raises OSError: if no file can be written there.
    """
    _check_kept(path, like)
    check_writable(path)


def _check_kept(path: str | os.PathLike[str], like: Picture) -> None:
    """Checks that nothing would be lost in a file."""
    kind = _kind_to_write(Path(path), like)
    kind.check(Path(path), like)
    size, source = tuple(like.x.shape[-2:]), _size_of_source(like)
    if kind in (NIFTI, DICOM) and source not in (None, size):
        raise ValueError(
            f"{path}: the image has {size} pixels and its source {source}, so that its "
            "header does not fit. Give a name that ends in .tif or .npy."
        )


def _size_of_source(like: Picture) -> tuple[int, int] | None:
    """Returns the height and width that a header is for."""
    header = like.header
    if isinstance(header, NiftiHeader):
        return header.shape[1], header.shape[0]
    if isinstance(header, DicomHeader):
        return int(header.datasets[0].Rows), int(header.datasets[0].Columns)
    return None


def write_picture(path: str | os.PathLike[str], x: Tensor, like: Picture) -> None:
    """
    Writes images as they were read: same depth, unit, layout and pages.

    Integers are rounded and clipped to their range. Floating-point numbers are not
    clipped; in a picture file that cannot hold them, [0, 1] becomes 8 bit. Arrays of
    integers become floating point, of which nothing is rounded. Header and scale of
    NIfTI and DICOM files are kept in files of the same kind. An existing file is
    replaced when the new one is whole.

    :param str path: the file, or a folder for a DICOM series.
    :param torch.Tensor x: images ``(P, C, H, W)``; complex ones are allowed in arrays.
    :param Picture like: the image that it came from.
    :raises ValueError: for another suffix, or if something would be lost.
    :raises OSError: if the file cannot be written.
    """
    _check_kept(path, replace(like, x=x))
    _kind_to_write(Path(path), like).write(Path(path), like.values(x), like)


def forgets_place(path: str | os.PathLike[str], like: Picture) -> bool:
    """
    Whether a result is written without the place in space that its source has.

    :param str path: the file to be written.
    :param Picture like: the image that it comes from.
    """
    return like.affine is not None and _kind_to_write(Path(path), like) not in (
        NIFTI,
        DICOM,
    )


def _kind_to_write(path: Path, like: Picture) -> Kind:
    kind = _BY_SUFFIX.get(suffix_of(path))
    if isinstance(like.header, DicomHeader) and (
        kind is None and (path.is_dir() or path.suffix == "")
    ):
        return DICOM
    if kind is None:
        raise ValueError(f"{path}: the result can be written as {', '.join(WRITABLE)}.")
    return kind


def _check_image(file: Path, like: Picture) -> None:
    if like.alpha is not None and like.alpha.shape[-2:] != like.x.shape[-2:]:
        raise ValueError(
            f"{file}: the image has {tuple(like.x.shape[-2:])} pixels and its opacity "
            f"{like.alpha.shape[-2:]}. Save the input without opacity."
        )
    check_capability(
        file,
        _depth(like, file)[0],
        pages=len(like.x),
        colour=like.x.shape[1] > 1,
        transparent=like.alpha is not None,
    )


def _write_image(file: Path, pages: Tensor, like: Picture) -> None:
    dtype, in_unit = _depth(like, file)
    pixels = pages.double().numpy()  # (P, C, H, W)
    pixels = pixels[:, 0] if pixels.shape[1] == 1 else np.moveaxis(pixels, 1, -1)
    if not in_unit:
        pixels = 255 * (pixels - like.black) / (like.white - like.black)
    decoded = Decoded(
        as_numbers(pixels, dtype),
        like.alpha,
        like.metadata,
        like.stack or (len(pixels),),
        like.depth,
    )
    if like.size is not None:
        decoded = resized(decoded, like.size)
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        encode(stream, file.suffix.lower(), decoded)


def _depth(like: Picture, file: Path) -> tuple[np.dtype, bool]:
    """Returns the dtype for a picture file, and whether the unit stays as it was."""
    if like.dtype.kind in "ui":
        return like.dtype, True
    if file.suffix.lower() in TIFF:
        double = like.dtype == np.float64
        return np.dtype(np.float64 if double else np.float32), True
    return np.dtype(np.uint8), False


#: All kinds of files. A new one is one entry.
KINDS = (
    Kind("picture", IMAGES, _read_image, _check_image, _write_image),
    ARRAY,
    NIFTI,
    DICOM,
)

_BY_SUFFIX = {suffix: kind for kind in KINDS for suffix in kind.suffixes}

#: Suffixes of files to which a result can be written.
WRITABLE = tuple(_BY_SUFFIX)

#: Suffixes of the images of a folder. Other files of arrays are masks and the like.
IN_FOLDERS = (*IMAGES, ".npy", ".pt", *NIFTI.suffixes)
NOT_IN_FOLDERS = tuple(suffix for suffix in WRITABLE if suffix not in IN_FOLDERS)


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
    # Compression with losses moves zero and white a bit, rounding much less.
    lossy = suffix_of(split_name(path)[0]) in LOSSY
    margin = top * (LOSSY_MARGIN if lossy else MASK_MARGIN)
    between = int(((values > margin) & (values < top - margin)).sum())
    if between:
        raise ValueError(
            f"The mask {path} has {between} entries between zero and its largest, "
            f"{top:g}. Give a file with two values; JPEG and resizing make others."
        )
    return torch.from_numpy(values > margin)
