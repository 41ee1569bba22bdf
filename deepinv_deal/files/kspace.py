"""K-space in files: arrays, fastMRI and ISMRMRD."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deepinv_deal.files.arrays import HDF5, read_array
from deepinv_deal.files.kinds import (
    NamedError,
    named,
    needs,
    split_name,
    suffix_of,
    without_parts,
)

#: Bits of ISMRMRD, counted from 1, of lines that are no measurements of the image.
_NO_IMAGE = (
    19,  # noise
    20,  # calibration of parallel imaging that is no part of the image
    23,  # navigator
    24,  # correction of the phase
    *range(26, 32),  # feedback, dummy scans, other corrections
)

#: Counters of ISMRMRD of which one value is read.
_ONE_OF = ("contrast", "phase", "repetition", "set")


@dataclass
class KSpace:
    """
    Cartesian k-space, its zero frequency in the middle.

    :param numpy.ndarray y: complex, ``([D,] [N,] H, W)``, as in the file.
    :param numpy.ndarray mask: where it was measured, ``(H, W)`` or ``(W,)``, if the
        file says so; otherwise it was where ``y`` is not zero.
    :param tuple image_size: height and width that the image shall have at the end, if
        the file says so: readouts are often longer.
    :param numpy.ndarray affine: ``(4, 4)``, lengths of the voxels in millimetres.
    :param list notes: what the user should know about the file.
    """

    y: np.ndarray
    mask: np.ndarray | None = None
    image_size: tuple[int, int] | None = None
    affine: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)


def read_k_space(path: str | os.PathLike[str]) -> KSpace:
    """
    Reads k-space from an array of any kind, an HDF5 file of fastMRI or one of ISMRMRD.

    In files of fastMRI, columns are the lines that were measured or not. In those of
    ISMRMRD, rows are: their readouts become rows ``(D, N, H, W)``, repeated lines are
    averaged, and lines that are missing are zero.

    :param str path: ``FILE`` or ``FILE:NAME``, see :func:`read_array`; for ISMRMRD,
        ``FILE:contrast=0,repetition=2`` chooses what is read.
    :raises ValueError: if it holds no complex numbers, or lines that are not Cartesian.
    """
    file, name = split_name(path)
    if suffix_of(file) in HDF5:
        h5py = needs("h5py", file)
        with named(file), h5py.File(file) as root:
            group = next((g for g in root.values() if _is_ismrmrd(g)), None)
            if group is not None and (name is None or "=" in name):
                return _read_ismrmrd(file, group, name)
            if "kspace" in root and name is None:
                return _read_fastmri(file, root)
    y = without_parts(read_array(path))
    if y.dtype.kind != "c":
        raise NamedError(f"{path} must hold complex numbers, got {y.dtype}.")
    return KSpace(y)


# -- fastMRI ------------------------------------------------------------------------


def _read_fastmri(file: Path, root: Any) -> KSpace:
    y = np.asarray(root["kspace"])
    if y.dtype.kind != "c" or y.ndim not in (3, 4):
        raise NamedError(
            f"{file}: 'kspace' is {y.dtype} of shape {y.shape}; that of fastMRI is "
            "complex, (slices, [coils,] H, W)."
        )
    mask = np.asarray(root["mask"]).astype(bool) if "mask" in root else None
    size, affine = None, None
    if "ismrmrd_header" in root:
        header = root["ismrmrd_header"][()]
        # Rows are along the readout.
        size, affine = _recon_space(file, header, ("x", "y"))
    images = [key for key in root if key.startswith("reconstruction_")]
    if size is None and images:
        height, width = root[images[0]].shape[-2:]
        size = int(height), int(width)
    return KSpace(y, mask, size, affine)


# -- ISMRMRD ------------------------------------------------------------------------


def _is_ismrmrd(group: Any) -> bool:
    return hasattr(group, "keys") and "xml" in group and "data" in group


def _read_ismrmrd(file: Path, group: Any, name: str | None) -> KSpace:
    header = _parse(file, group["xml"][0])
    trajectory = header.findtext("{*}encoding/{*}trajectory")
    if trajectory != "cartesian":
        raise NamedError(f"{file} has a {trajectory} trajectory; cartesian is read.")
    lines = group["data"][()]
    heads = lines["head"]
    flags = heads["flags"]
    no_image = np.zeros(len(lines), bool)
    for bit in _NO_IMAGE:
        no_image |= (flags >> np.uint64(bit - 1)) & np.uint64(1) > 0
    keep = ~no_image & (heads["encoding_space_ref"] == 0)
    left_out = int((~keep).sum())
    for counter, value in _chosen(file, heads["idx"][keep], name).items():
        keep &= heads["idx"][counter] == value
    if not keep.any():
        raise NamedError(f"{file} holds no line of the image that was asked for.")
    lines, heads = lines[keep], heads[keep]
    if ((heads["flags"] >> np.uint64(21)) & np.uint64(1)).any():
        raise NamedError(f"{file} has reversed lines (EPI), which are not read.")
    width, height = (
        int(
            header.findtext(
                f"{{*}}encoding/{{*}}encodedSpace/{{*}}matrixSize/{{*}}{a}", "0"
            )
        )
        for a in "xy"
    )
    if (heads["idx"]["kspace_encode_step_2"] != 0).any():
        raise NamedError(
            f"{file} is encoded in three dimensions; slices are read. Transform it "
            "along the partitions and save them as (D, N, H, W)."
        )
    y = _sorted(file, header, lines, (height, width))
    size, affine = _recon_space(file, group["xml"][0], ("y", "x"))
    notes = []
    if left_out:
        notes.append(f"{file}: {left_out} lines are no part of the image (noise, ...)")
    return KSpace(y, None, size, affine, notes)


def _sorted(
    file: Path, header: Any, lines: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Puts lines ``(N, samples)`` at their places in ``(D, N, H, W)``."""
    heads = lines["head"]
    height, width = size
    limits = "{*}encoding/{*}encodingLimits/{*}kspace_encoding_step_1/{*}center"
    centre = int(header.findtext(limits, str(height // 2)))
    coils = {int(n) for n in heads["active_channels"]}
    if len(coils) > 1:
        raise NamedError(f"{file} has lines of {sorted(coils)} coils.")
    slices = np.unique(heads["idx"]["slice"])
    y = np.zeros((len(slices), coils.pop(), height, width), np.complex64)
    count = np.zeros((len(slices), 1, height, width), np.float32)
    for line in lines:
        head = line["head"]
        samples = int(head["number_of_samples"])
        data = line["data"].view(np.complex64).reshape(-1, samples)
        row = int(head["idx"]["kspace_encode_step_1"]) - centre + height // 2
        start, end = int(head["discard_pre"]), samples - int(head["discard_post"])
        left = width // 2 - int(head["center_sample"])  # where sample 0 lies
        if not (0 <= row < height and 0 <= left + start and left + end <= width):
            raise NamedError(
                f"{file}: a line (row {row}, columns {left + start} to {left + end}) "
                f"is outside of its k-space of {height} x {width}."
            )
        d = int(np.searchsorted(slices, head["idx"]["slice"]))
        columns = slice(left + start, left + end)
        y[d, :, row, columns] += data[:, start:end]
        count[d, :, row, columns] += 1
    return y / np.maximum(count, 1)


def _chosen(file: Path, counters: np.ndarray, name: str | None) -> dict[str, int]:
    """Returns which contrast, phase, repetition and set is read."""
    try:
        pairs = [part.split("=") for part in name.split(",")] if name else []
        chosen = {counter: int(value) for counter, value in pairs}
    except ValueError as error:
        raise NamedError(
            f"{file}:{name} is to be {file}:COUNTER=NUMBER, as in contrast=0,set=1."
        ) from error
    for counter in chosen:
        if counter not in _ONE_OF:
            raise NamedError(f"{file} has no {counter!r}: give {', '.join(_ONE_OF)}.")
    for counter in _ONE_OF:
        found = np.unique(counters[counter]).tolist()
        if counter not in chosen and len(found) > 1:
            raise NamedError(
                f"{file} holds several of {counter!r}: give {file}:{counter}=NUMBER, "
                f"NUMBER being one of {found}."
            )
    return chosen


def _parse(file: Path, text: bytes | str) -> Any:
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise NamedError(f"{file}: its header is no XML: {error}") from error


def _recon_space(
    file: Path, text: bytes | str, axes: tuple[str, str]
) -> tuple[tuple[int, int] | None, np.ndarray | None]:
    """Returns size of the image and lengths of voxels along rows' and columns' axes."""
    header = _parse(file, text)
    space = header.find("{*}encoding/{*}reconSpace")
    if space is None:
        return None, None
    size, length = {}, {}
    for axis in "xyz":
        size[axis] = int(space.findtext(f"{{*}}matrixSize/{{*}}{axis}", "0"))
        field_of_view = float(space.findtext(f"{{*}}fieldOfView_mm/{{*}}{axis}", "0"))
        length[axis] = field_of_view / (size[axis] or 1)
    rows, columns = axes
    affine = np.diag([length[columns], length[rows], length["z"], 1.0])
    return (
        (size[rows], size[columns]) if size[rows] else None,
        affine if min(length.values()) > 0 else None,
    )
