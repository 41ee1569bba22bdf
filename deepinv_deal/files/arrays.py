"""Arrays of any kind in files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepinv_deal.files.decode import IMAGES, decode

ARRAYS = (".npy", ".npz", ".pt", ".h5", ".hdf5", ".mat")


class _NamedError(ValueError):
    """An error that names the file already."""


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """
    Reads an array from a file, by its suffix.

    ``.npy``, ``.npz``, ``.pt``, ``.h5`` (needs h5py), ``.mat`` and images, without
    their transparency. Where a file holds several arrays, ``FILE:NAME`` says which; in
    a cell array of MATLAB, ``FILE:NAME/INDEX``, counted from 0. Nothing in a file is
    executed.

    :param str path: ``FILE`` or ``FILE:NAME``.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is of another kind, damaged, or the name is missing.
    """
    file, name = _split(path)
    suffix = file.suffix.lower()
    if suffix in IMAGES:
        pixels = decode(file).pixels
        if len(pixels) > 1:
            raise ValueError(f"{file} has {len(pixels)} pages, one was expected.")
        return pixels[0]
    try:
        if suffix == ".npy":
            return np.load(file, allow_pickle=False)
        if suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return arrays[_choose(file, name, list(arrays.files))]
        if suffix == ".pt":
            data = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(data, dict):
                data = data[_choose(file, name, list(data))]
            array: np.ndarray = _as_tensor(file, data).detach().numpy()
            return array
        if suffix in (".h5", ".hdf5"):
            return _read_hdf5(file, name)
        if suffix == ".mat":
            return _read_matlab(file, name)
    except _NamedError:
        raise
    except Exception as error:  # a damaged file can make its reader raise anything
        # Not the rest, which suggests to read the file without protection.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{file} cannot be read: {reason[0]}") from error
    raise ValueError(
        f"{file} is of an unknown kind. Give one of {', '.join(ARRAYS + IMAGES)}."
    )


def _split(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    if Path(path).is_file():
        return Path(path), None
    file, _, name = os.fspath(path).rpartition(":")
    if file and Path(file).is_file():
        return Path(file), name
    raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")


def _choose(file: Path, name: str | None, names: list[str]) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        assert name is not None
        return name
    asked = "holds several arrays" if name is None else f"has no {name!r}"
    raise _NamedError(f"{file} {asked}. Give {file}:NAME, NAME being one of {names}.")


def _as_tensor(file: Path, data: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise _NamedError(f"{file} holds a {type(data).__name__}, not a tensor.")
    return data


def _read_hdf5(file: Path, name: str | None) -> np.ndarray:
    try:
        import h5py
    except ImportError as error:
        raise _NamedError(
            f"{file}: install h5py to read HDF5 files, or save the array as .npy."
        ) from error
    with h5py.File(file) as root:
        found: list[str] = []
        root.visititems(
            lambda key, item: (
                found.append(key) if isinstance(item, h5py.Dataset) else None
            )
        )
        return np.asarray(root[_choose(file, name, found)])


def _read_matlab(file: Path, name: str | None) -> np.ndarray:
    from scipy.io import loadmat

    arrays = {k: v for k, v in loadmat(file).items() if not k.startswith("__")}
    name, _, index = (name or "").partition("/")
    array = arrays[_choose(file, name or None, list(arrays))]
    if array.dtype == object:
        if not index.isdecimal() or int(index) >= array.size:
            raise _NamedError(
                f"{file} holds a cell array of {array.size}: give {file}:NAME/INDEX."
            )
        array = array.flat[int(index)]
    return array
