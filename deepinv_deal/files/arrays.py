"""Arrays of any kind in files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch
from torch import Tensor

from deepinv_deal._atomic import replacing
from deepinv_deal.files import nifti
from deepinv_deal.files.decode import IMAGES, decode
from deepinv_deal.files.kinds import (
    NAME,
    ArrayHeader,
    Kind,
    NamedError,
    Picture,
    named,
    needs,
    split_name,
    suffix_of,
    without_parts,
)

HDF5 = (".h5", ".hdf5")
ARRAYS = (".npy", ".npz", ".pt", *HDF5, ".mat")


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """
    Reads an array from a file, by its suffix.

    ``.npy``, ``.npz``, ``.pt``, ``.h5`` (needs h5py), ``.mat``, ``.nii`` and
    ``.nii.gz`` (need nibabel, slices first) and images, without their transparency.
    Where a file holds several arrays, ``FILE:NAME`` says which; in a cell array of
    MATLAB, ``FILE:NAME/INDEX``, counted from 0. Nothing in a file is executed.

    :param str path: ``FILE`` or ``FILE:NAME``.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is of another kind, damaged, or the name is missing.
    """
    file, name = split_name(path)
    suffix = suffix_of(file)
    if suffix in IMAGES:
        pixels = decode(file).pixels
        if len(pixels) > 1:
            raise ValueError(f"{file} has {len(pixels)} pages, one was expected.")
        return pixels[0]
    if suffix in nifti.NIFTI.suffixes:
        pages: np.ndarray = nifti.read(file).x[:, 0].numpy()
        return pages if len(pages) > 1 else pages[0]
    return read_with_header(file, name)[0]


def read_with_header(file: Path, name: str | None) -> tuple[np.ndarray, ArrayHeader]:
    """
    Reads an array and what is beside it.

    :param pathlib.Path file: one of :data:`ARRAYS`.
    :param str name: which array.
    :raises ValueError: if it is of another kind, damaged, or the name is missing.
    """
    suffix = suffix_of(file)
    if suffix not in ARRAYS:
        known = ", ".join(ARRAYS + IMAGES + nifti.NIFTI.suffixes)
        raise ValueError(f"{file} is of an unknown kind. Give one of {known}.")
    with named(file):
        if suffix == ".npy":
            return np.load(file, allow_pickle=False), ArrayHeader()
        if suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                name = _choose(file, name, list(arrays.files))
                return arrays[name], ArrayHeader(name)
        if suffix == ".pt":
            data = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(data, dict):
                data = data[_choose(file, name, list(data))]
            return _as_tensor(file, data).detach().numpy(), ArrayHeader()
        if suffix in HDF5:
            return _read_hdf5(file, name)
        return _read_matlab(file, name)


def _choose(file: Path, name: str | None, names: list[str]) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        assert name is not None
        return name
    asked = "holds several arrays" if name is None else f"has no {name!r}"
    raise NamedError(f"{file} {asked}. Give {file}:NAME, NAME being one of {names}.")


def _as_tensor(file: Path, data: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise NamedError(f"{file} holds a {type(data).__name__}, not a tensor.")
    return data


def _read_hdf5(file: Path, name: str | None) -> tuple[np.ndarray, ArrayHeader]:
    h5py = needs("h5py", file)
    name = _choose(file, name and name.strip("/"), _names_hdf5(file))
    with h5py.File(file) as root:
        parts = name.split("/")
        paths = ["/", *("/".join(parts[: i + 1]) for i in range(len(parts)))]
        attributes = {path: dict(root[path].attrs) for path in paths}
        return np.asarray(root[name]), ArrayHeader(name, attributes)


def _read_matlab(file: Path, name: str | None) -> tuple[np.ndarray, ArrayHeader]:
    from scipy.io import loadmat

    name, _, index = (name or "").partition("/")
    try:
        arrays = {k: v for k, v in loadmat(file).items() if not k.startswith("__")}
    except NotImplementedError:  # version 7.3, which is HDF5
        return _read_matlab_hdf5(file, name or None)
    name = _choose(file, name or None, list(arrays))
    array = arrays[name]
    if array.dtype == object:
        if not index.isdecimal() or int(index) >= array.size:
            raise NamedError(
                f"{file} holds a cell array of {array.size}: give {file}:NAME/INDEX."
            )
        array = array.flat[int(index)]
    return array, ArrayHeader(name)


def _read_matlab_hdf5(file: Path, name: str | None) -> tuple[np.ndarray, ArrayHeader]:
    h5py = needs("h5py", file)
    with h5py.File(file) as root:
        found = [key for key in root if isinstance(root[key], h5py.Dataset)]
        name = _choose(file, name, found)
        array = without_parts(np.asarray(root[name]).T)  # columns first
    if array.dtype.kind not in "buifc":
        raise NamedError(f"{file}:{name} is no array of numbers.")
    return array, ArrayHeader(name)


# -- pictures in arrays -------------------------------------------------------------


def read(file: Path, name: str | None = None, *, volume: bool = False) -> Picture:
    """
    Reads a picture, a stack or a volume from an array.

    :param pathlib.Path file: the file.
    :param str name: which array.
    :param bool volume: whether three axes are ``(D, H, W)``, or ``(H, W, D)`` in files
        of MATLAB, whatever their sizes.
    :raises ValueError: for other shapes or numbers.
    """
    array, header = read_with_header(file, name)
    path = f"{file}:{name}" if name else str(file)
    stack = "HWP" if suffix_of(file) == ".mat" else "PHW"
    pages, layout = _pages_of_array(array, path, volume, stack)
    x = torch.from_numpy(np.ascontiguousarray(pages, dtype=np.float32))
    picture = Picture(x, dtype=pages.dtype, layout=layout, header=header)
    if layout == stack:  # the user may have meant another order
        rows, columns = pages.shape[-2:]
        picture.notes.append(
            f"{path} has shape {array.shape}: {len(pages)} pages of {rows} x {columns}."
        )
    return picture


def _pages_of_array(
    array: np.ndarray, path: str, volume: bool, stack: str
) -> tuple[np.ndarray, str]:
    """
    Returns ``(P, C, H, W)`` and the layout of an array. That of three axes which are no
    colours is ``stack``: MATLAB has pages last.
    """
    if array.dtype.kind == "c":
        raise ValueError(f"{path} holds complex numbers, an image was expected.")
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path} holds {array.dtype}, no numbers.")
    shape = array.shape
    pages = np.moveaxis(array, -1, 0) if stack == "HWP" else array
    if array.ndim == 3 and volume and len(pages):
        return pages[:, None], stack
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
    if array.ndim == 3 and len(pages) and (stack == "HWP" or shape[-1] > 4):
        return pages[:, None], stack
    if array.ndim == 4 and shape[1] in (1, 3) and len(array):
        return array, "PCHW"
    raise ValueError(
        f"{path} has shape {shape}; an image is (H, W), (H, W, 3), (1, H, W), (3, H, W)"
        f", ({', '.join(stack)}) or (P, C, H, W)."
    )


def check(file: Path, like: Picture) -> None:
    """
    Checks that a picture can be written: no other array is lost, the library is there.

    :param pathlib.Path file: the file to be written.
    :param Picture like: the picture.
    :raises ValueError: if the file holds other arrays, or h5py is missing.
    """
    if suffix_of(file) in HDF5:
        needs("h5py", file)
    others = sorted(set(_names(file)) - {_name(file, like)})
    if others:
        raise ValueError(
            f"{file} holds other arrays ({', '.join(others)}), which would be lost. "
            "Give another name."
        )


def _names(file: Path) -> list[str]:
    """Returns the names of the arrays of a file, none if it has none or is damaged."""
    suffix = suffix_of(file)
    if suffix not in (".npz", ".mat", *HDF5) or not file.is_file():
        return []
    try:
        if suffix == ".npz":
            with ZipFile(file) as archive:
                return [name.removesuffix(".npy") for name in archive.namelist()]
        if suffix in HDF5:
            return _names_hdf5(file)
        from scipy.io import whosmat

        try:
            return [name for name, *_ in whosmat(file)]
        except NotImplementedError:  # version 7.3, which is HDF5
            return _names_hdf5(file)
    except Exception:  # a damaged file, of which nothing can be lost
        return []


def _names_hdf5(file: Path) -> list[str]:
    h5py = needs("h5py", file)
    found: list[str] = []
    with h5py.File(file) as root:
        root.visititems(
            lambda key, item: (
                found.append(key) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


def _name(file: Path, like: Picture) -> str:
    """Returns the name under which a file gets its array."""
    header = like.header if isinstance(like.header, ArrayHeader) else ArrayHeader()
    if suffix_of(file) in HDF5:
        return header.name
    name = header.name.replace("/", "_")
    if suffix_of(file) == ".mat":  # names of MATLAB begin with a letter
        name = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_0123456789") or NAME
    return name


def write(file: Path, pages: Tensor, like: Picture) -> None:
    """
    Writes an array in the layout that was read, in floating point, under its name.

    :param pathlib.Path file: the file.
    :param torch.Tensor pages: shape ``(P, C, H, W)``, complex ones, too.
    :param Picture like: what they come from.
    """
    array = as_array(pages, like)
    header = like.header if isinstance(like.header, ArrayHeader) else ArrayHeader()
    suffix = suffix_of(file)
    with replacing(file) as temporary:
        if suffix in HDF5:
            _write_hdf5(temporary, array, header)
            return
        name = _name(file, like)
        with open(temporary, "wb") as stream:
            if suffix == ".npy":
                np.save(stream, array)
            elif suffix == ".npz":
                # As NumPy does, which has arguments that no array can be named like.
                with ZipFile(stream, "w", ZIP_DEFLATED) as archive:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, array)
            elif suffix == ".pt":
                torch.save(torch.from_numpy(array).clone(), stream)
            else:
                from scipy.io import savemat

                savemat(stream, {name: array})


def _write_hdf5(file: Path, array: np.ndarray, header: ArrayHeader) -> None:
    h5py = needs("h5py", file)
    with h5py.File(file, "w") as root:
        root.create_dataset(header.name, data=array)
        for path, attributes in header.attributes.items():
            for key, value in attributes.items():
                # Not references to objects that are not in this file.
                kind = getattr(value, "dtype", None)
                if not (isinstance(value, h5py.Reference) or (kind and kind.hasobject)):
                    root[path].attrs[key] = value


def as_array(pages: Tensor, like: Picture) -> np.ndarray:
    """
    Returns pages in the layout of the file, floating point.

    :param torch.Tensor pages: shape ``(P, C, H, W)``, in the unit of the file.
    :param Picture like: what they come from.
    """
    if like.dtype == np.float64:
        pages = pages.to(torch.complex128 if pages.is_complex() else torch.float64)
    else:
        pages = pages.to(torch.complex64 if pages.is_complex() else torch.float32)
    if like.layout in ("PHW", "HWP"):
        pages = pages[:, 0]
        if like.layout == "HWP":
            return np.ascontiguousarray(np.moveaxis(pages.numpy(), 0, -1))
        if len(pages) == 1 and like.depth is None:
            return np.ascontiguousarray(pages[0].numpy())
        shape = like.stack or (len(pages),)
        return np.ascontiguousarray(pages.reshape(*shape, *pages.shape[1:]).numpy())
    if like.layout == "PCHW" or len(pages) > 1:
        return np.ascontiguousarray(pages.numpy())
    image = pages[0]
    if like.layout == "HW" or (like.layout == "HWC" and len(image) == 1):
        image = image[0] if len(image) == 1 else image
    elif like.layout == "HWC":
        image = image.permute(1, 2, 0)
    return np.ascontiguousarray(image.numpy())


ARRAY = Kind("array", ARRAYS, read, check, write)
