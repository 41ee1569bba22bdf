"""What all kinds of files have in common: what is read, and how a kind is described."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Name of an array in a file that has names, if it comes from one that has none.
NAME = "x"


@dataclass(frozen=True)
class ArrayHeader:
    """
    What a file holds beside an array.

    :param str name: name of the array.
    :param dict attributes: of the array and of the groups that it is in, by their names
        (HDF5).
    """

    name: str = NAME
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Picture:
    """
    An image, a stack of pages or a volume from a file, with what is needed to write one
    like it.

    :param torch.Tensor x: pages ``(P, C, H, W)``, float32, white being 1 and black 0.
    :param float white: what was 1 in the file: 255, 65535, 1 or what the user said.
    :param numpy.dtype dtype: of the numbers in the file.
    :param str layout: order of the axes in the file: ``"HW"``, ``"HWC"``, ``"CHW"``,
        ``"PHW"``, ``"HWP"`` (MATLAB) or ``"PCHW"``; pages of picture files are none of
        them.
    :param numpy.ndarray alpha: opacity ``(P, H, W)`` as in the file, if there is one.
    :param dict metadata: colour profile, resolution and the like, of picture files.
    :param float black: what was 0 in the file.
    :param tuple stack: sizes of the axes that the pages run through, slowest first, as
        times and slices; ``(P,)`` if empty.
    :param int depth: which axis of ``stack`` is that of slices; ``None`` if the pages
        are no volume.
    :param object header: header of the file, of a type of its own for every kind.
    :param numpy.ndarray affine: ``(4, 4)``, from (column, row, slice) to millimetres to
        the right, front and top of the patient, if the file says so.
    :param bool says_white: whether unsigned integers are meant to use their range.
    :param tuple size: height and width for which the resolution of the file is, where
        what is written shows the same in another number of pixels; ``None``: its pixels
        have the size of those in the file.
    :param list notes: what the user should know about the file.
    """

    x: Tensor
    white: float = 1.0
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))
    layout: str = "HW"
    alpha: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    black: float = 0.0
    stack: tuple[int, ...] = ()
    depth: int | None = 0
    header: Any = None
    affine: np.ndarray | None = None
    says_white: bool = True
    size: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    def values(self, x: Tensor) -> Tensor:
        """
        Returns images in the unit of the file, in double precision.

        :param torch.Tensor x: images like ``self.x``; complex ones are allowed.
        """
        x = x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64)
        return x * (self.white - self.black) + self.black

    def volumes(self, name: str = "The file") -> Tensor:
        """
        Returns the pages as volumes ``(V, C, D, H, W)``.

        :param str name: what to call the file in errors.
        :raises ValueError: if the pages are no volume.
        """
        if self.depth is None or len(self.x) < 2:
            why = self.notes[-1] if self.notes and self.depth is None else "one page"
            raise ValueError(f"{name} is no volume ({why}). Leave --slices out.")
        shape = self.stack or (len(self.x),)
        pages = self.x.reshape(*shape, *self.x.shape[1:])
        pages = pages.movedim(self.depth, len(shape) - 1)
        pages = pages.reshape(-1, *pages.shape[len(shape) - 1 :])  # (V, D, C, H, W)
        return pages.movedim(1, 2)

    def pages(self, volumes: Tensor) -> Tensor:
        """
        Returns volumes as pages, in the order of the file; see :meth:`volumes`.

        :param torch.Tensor volumes: shape ``(V, C, D, H, W)``.
        """
        assert self.depth is not None
        shape = list(self.stack or (len(self.x),))
        depth = shape.pop(self.depth)
        pages = volumes.movedim(2, 1)
        pages = pages.reshape(*shape, depth, *pages.shape[2:])
        return pages.movedim(len(shape), self.depth).flatten(0, len(shape))


@dataclass(frozen=True)
class Kind:
    """
    A kind of file. A new one is one of these in ``deepinv_deal.files.pictures.KINDS``.

    :param str name: what it is called.
    :param tuple suffixes: how the names of its files end, in lower case.
    :param Callable read: from file and name within it to a :class:`Picture` whose
        ``white`` is 1: in the unit of the file.
    :param Callable check: raises ``ValueError`` if a picture cannot be written to a
        file, from the two.
    :param Callable write: writes pages ``(P, C, H, W)`` in the unit of the file, from
        file, pages and the picture that they come from.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, str | None], Picture]
    check: Callable[[Path, Picture], None]
    write: Callable[[Path, Tensor, Picture], None]


def suffix_of(path: str | os.PathLike[str]) -> str:
    """
    Returns how a file name ends, in lower case, with both parts of ``.nii.gz``.

    :param str path: the file.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "".join(suffixes[-2 if suffixes[-1:] == [".gz"] else -1 :])


def split_name(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """
    Returns the file, or folder, of ``FILE:NAME``, and the name if there is one.

    :param str path: ``FILE`` or ``FILE:NAME``.
    :raises FileNotFoundError: if there is no such file.
    """
    if Path(path).exists():
        return Path(path), None
    file, _, name = os.fspath(path).rpartition(":")
    if file and Path(file).exists():
        return Path(file), name
    raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")


class NamedError(ValueError):
    """An error that names the file already."""


def needs(module: str, file: str | os.PathLike[str]) -> Any:
    """
    Imports the library that reads a kind of file.

    :param str module: the library.
    :param str file: the file.
    :raises ValueError: if it is not installed, with what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NamedError(
            f"{file} needs the package {module.partition('.')[0]}: pip install "
            "deepinv-deal[files]"
        ) from error


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """
    Makes errors of readers name the file: a damaged one makes them raise anything.

    :param str path: the file.
    :raises ValueError: for other errors than those that name it already.
    """
    try:
        yield
    except (NamedError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and os.fspath(path) in str(error):
            raise
        # Not the rest, which suggests to read the file without protection.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} cannot be read: {reason[0]}") from error


def without_parts(values: np.ndarray) -> np.ndarray:
    """
    Returns complex numbers for pairs named ``real`` and ``imag``, as MATLAB has them.

    :param numpy.ndarray values: anything else stays as it is.
    """
    if values.dtype.names != ("real", "imag"):
        return values
    return values["real"] + 1j * values["imag"]


def as_numbers(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """
    Returns numbers of a dtype: integers are rounded and clipped to their range.

    :param numpy.ndarray values: real numbers.
    :param numpy.dtype dtype: what to make of them.
    """
    if dtype.kind not in "ui":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    rounded = np.rint(values.astype(np.float64))
    return rounded.clip(limits.min, limits.max).astype(dtype)
