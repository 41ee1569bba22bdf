"""NIfTI files: volumes with a place in space."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepinv_deal._atomic import replacing
from deepinv_deal.files.kinds import (
    ArrayHeader,
    Kind,
    NamedError,
    Picture,
    as_numbers,
    needs,
    suffix_of,
)


@dataclass(frozen=True)
class NiftiHeader:
    """
    What a NIfTI file holds beside its numbers.

    :param type image: class of nibabel for this version of the format.
    :param object header: header of nibabel, with the extensions.
    :param float slope: what a stored number is multiplied by.
    :param float intercept: what is then added.
    :param tuple shape: of the array in the file, (column, row, slice, time, ...).
    """

    image: Any
    header: Any
    slope: float
    intercept: float
    shape: tuple[int, ...]


def read(file: Path, name: str | None = None) -> Picture:
    """
    Reads a file, one page for every third and higher index.

    Rows of a page are the second index of the file, columns the first: a page is a
    plane of the file's third index.

    :param pathlib.Path file: the file.
    :param str name: there are no names in these files.
    :raises ValueError: if it is damaged, complex or in colour.
    """
    if name is not None:
        raise NamedError(
            f"{file} holds no {name!r}: there are no names in NIfTI files."
        )
    nibabel = needs("nibabel", file)
    try:
        image = nibabel.load(file)
        stored = np.array(image.dataobj.get_unscaled())
    except Exception as error:  # a damaged file can make its reader raise anything
        raise NamedError(f"{file} cannot be read as NIfTI: {error}") from error
    if stored.dtype.names or stored.dtype.kind not in "uif":
        what = "colours" if stored.dtype.names else f"{stored.dtype} numbers"
        raise NamedError(f"{file} holds {what}; real numbers, one a voxel, are read.")
    if stored.ndim < 2 or not stored.size:
        raise NamedError(f"{file} has shape {stored.shape}, which is no image.")
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    if slope == 0:
        raise NamedError(f"{file} has a scale slope of 0.")
    header = NiftiHeader(
        type(image), image.header.copy(), slope, intercept, stored.shape
    )
    pages, dtype = np.transpose(stored), stored.dtype  # (..., slice, row, column)
    if (slope, intercept) != (1, 0):
        pages, dtype = slope * pages.astype(np.float64) + intercept, np.dtype("f4")
    stack = pages.shape[:-2]
    pages = pages.reshape(-1, 1, *pages.shape[-2:])
    return Picture(
        torch.from_numpy(np.ascontiguousarray(pages, dtype=np.float32)),
        dtype=dtype,
        layout="PHW",
        stack=stack or (1,),
        depth=len(stack) - 1 if stack else None,
        header=header,
        affine=image.affine,
        says_white=False,
    )


def check(file: Path, like: Picture) -> None:
    """
    Checks that a picture can be written.

    :param pathlib.Path file: the file to be written.
    :param Picture like: the picture.
    :raises ValueError: for colours, transparency, or if nibabel is missing.
    """
    needs("nibabel", file)
    lost = "colours" if like.x.shape[1] > 1 else "transparency"
    if like.x.shape[1] > 1 or like.alpha is not None:
        raise ValueError(f"{file}: a NIfTI file cannot hold {lost}.")


def write(file: Path, pages: Tensor, like: Picture) -> None:
    """
    Writes pages with header, scale and numbers of the file that they come from.

    What comes from another kind of file becomes a volume with the voxels that are
    known, in the same numbers if these were integers of pictures.

    :param pathlib.Path file: the file, whose end says whether it is compressed.
    :param torch.Tensor pages: real ones, ``(P, 1, H, W)``.
    :param Picture like: what they come from.
    """
    nibabel = needs("nibabel", file)
    values = pages[:, 0].double().numpy()
    own = like.header
    if isinstance(own, NiftiHeader):
        stored = values.reshape(own.shape[::-1]).T
        stored = (stored - own.intercept) / own.slope
        stored = as_numbers(stored, own.header.get_data_dtype().newbyteorder("="))
        header = own.header.copy()
        image = own.image(stored, like.affine, header)
        image.header.set_slope_inter(own.slope, own.intercept)
    else:
        shape = like.stack or (len(values),)
        stored = np.moveaxis(
            values.reshape(*shape, *values.shape[1:]),
            like.depth if like.depth is not None else len(shape) - 1,
            len(shape) - 1,
        ).T
        stored = stored[..., 0] if len(values) == 1 else stored
        dtype = np.dtype(np.float32)
        whole = like.dtype.kind in "ui" and like.dtype.itemsize <= 4
        if whole and not isinstance(own, ArrayHeader):
            dtype = like.dtype
        image = nibabel.Nifti1Image(as_numbers(stored, dtype), like.affine)
        if like.affine is not None:
            image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    if suffix_of(file) == ".nii.gz":
        # Without the time, so that equal volumes make equal files.
        stream = io.BytesIO()
        with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=6, mtime=0) as out:
            out.write(data)
        data = stream.getvalue()
    with replacing(file) as temporary:
        temporary.write_bytes(data)


NIFTI = Kind("NIfTI", (".nii", ".nii.gz"), read, check, write)
