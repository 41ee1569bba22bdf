"""DICOM: single files, and series of slices in a folder."""

from __future__ import annotations

import copy
import datetime
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepinv_deal._atomic import replacing
from deepinv_deal.files.decode import IMAGES
from deepinv_deal.files.kinds import Kind, NamedError, Picture, needs

SUFFIXES = (".dcm", ".dicom", ".ima")

#: What is needed to read an image and to derive another one from it.
_NEEDED = (
    *("SOPClassUID", "SOPInstanceUID", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation"),
)

#: Slices this fraction of their distance off a regular grid are not equally spaced.
SPACING_TOLERANCE = 0.02

#: Patients' axes of DICOM are left, back and top; those of affine matrices right, front
#: and top.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class DicomHeader:
    """
    What a DICOM file or series holds beside its numbers.

    :param list datasets: of pydicom, without pixels, in the order of the pages; one if
        it has all pages.
    :param list names: names of the files.
    :param list scales: rescale slope and intercept of every dataset.
    :param list padding: for every dataset, what is stored where its pixels are none, a
        masked array, if there are such pixels.
    """

    datasets: list[Any]
    names: list[str]
    scales: list[tuple[float, float]]
    padding: list[Any]


def is_dicom(path: Path) -> bool:
    """
    Whether a file is a DICOM file, by its name or its first bytes.

    :param pathlib.Path path: the file.
    """
    if not path.is_file() or path.name.startswith("._") or path.name == "DICOMDIR":
        return False
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in IMAGES:
        return suffix in SUFFIXES
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def is_series(path: Path) -> bool:
    """
    Whether a folder holds DICOM files.

    :param pathlib.Path path: the folder.
    """
    return path.is_dir() and any(is_dicom(p) for p in path.iterdir())


# -- reading ------------------------------------------------------------------------


def read(path: Path, name: str | None = None) -> Picture:
    """
    Reads a file, or a series from a folder, in the unit of its rescale slope.

    :param pathlib.Path path: a file or a folder.
    :param str name: number or UID of the series, if a folder has several.
    :raises ValueError: for colours, compression that cannot be read, functional groups,
        tables instead of slopes, slices of different sizes, several series, or pictures
        beside them.
    """
    needs("pydicom", path)
    if path.is_dir():
        pictures = [p.name for p in path.iterdir() if p.suffix.lower() in IMAGES]
        if pictures:
            raise NamedError(
                f"{path} holds DICOM files and pictures, as {min(pictures)}. Give a "
                "folder of one kind."
            )
        files = sorted(p for p in path.iterdir() if is_dicom(p))
        datasets = [(p, _dataset(p)) for p in files]
        datasets = [(p, d) for p, d in datasets if "Rows" in d]  # no reports
        datasets = _one_series(path, datasets, name)
    else:
        datasets = [(path, _dataset(path))]
    if len(datasets) == 1:
        return _read_one(*datasets[0])
    return _read_series(path, datasets)


def _dataset(file: Path) -> Any:
    pydicom = needs("pydicom", file)
    try:
        return pydicom.dcmread(file)
    except Exception as error:  # a damaged file can make its reader raise anything
        raise NamedError(f"{file} cannot be read as DICOM: {error}") from error


def _one_series(
    path: Path, datasets: list[tuple[Path, Any]], name: str | None
) -> list[tuple[Path, Any]]:
    series: dict[str, list[tuple[Path, Any]]] = {}
    for file, dataset in datasets:
        series.setdefault(str(dataset.get("SeriesInstanceUID")), []).append(
            (file, dataset)
        )
    if not series:
        raise NamedError(f"{path} holds no DICOM file with pixels.")
    if name is None and len(series) == 1:
        return datasets
    numbers = {
        uid: str(found[0][1].get("SeriesNumber")) for uid, found in series.items()
    }
    asked = [uid for uid in series if name in (uid, numbers[uid])]
    if len(asked) == 1:
        return series[asked[0]]
    known = ", ".join(
        f"{numbers[uid]} ({len(found)} files, {uid})" for uid, found in series.items()
    )
    what = "holds several series" if name is None else f"has no one series {name!r}"
    raise NamedError(
        f"{path} {what}. Give {path}:SERIES, a number or UID of these: {known}."
    )


def _read_one(file: Path, dataset: Any) -> Picture:
    stored, scale, padding = _pixels(file, dataset)
    frames = stored if stored.ndim == 3 else stored[None]
    spacing = _number_list(dataset, "PixelSpacing", 2)
    affine = None
    if len(frames) == 1 and spacing is not None:
        thickness = _number_list(dataset, "SliceThickness", 1) or [1.0]
        affine = _affine(dataset, spacing, None, thickness[0])
    header = DicomHeader([dataset], [file.name], [scale], [padding])
    picture = _picture(frames, header, [scale] * len(frames), affine)
    if len(frames) == 1:
        picture.depth = None
    return picture


def _read_series(path: Path, datasets: list[tuple[Path, Any]]) -> Picture:
    for file, dataset in datasets:
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise NamedError(
                f"{file} has several frames beside other files of its series. Denoise "
                "it as a file."
            )
    for what in ("Rows", "Columns"):
        sizes = sorted({int(dataset.get(what)) for _, dataset in datasets})
        if len(sizes) > 1:
            raise NamedError(
                f"{path} holds slices of different sizes ({what.lower()}: {sizes}). "
                "Keep them in folders of their own."
            )
    datasets, steps, notes = _in_order(path, datasets)
    read = [_pixels(file, dataset) for file, dataset in datasets]
    header = DicomHeader(
        [dataset for _, dataset in datasets],
        [file.name for file, _ in datasets],
        [scale for _, scale, _ in read],
        [padding for _, _, padding in read],
    )
    first = datasets[0][1]
    spacing = _number_list(first, "PixelSpacing", 2)
    affine = None
    if steps is not None and spacing is not None and not notes:
        affine = _affine(first, spacing, datasets[-1][1], len(datasets) - 1)
    stored = np.stack([pixels for pixels, _, _ in read])
    picture = _picture(stored, header, header.scales, affine)
    picture.notes += notes
    if steps is None:
        picture.depth = None
    return picture


def _picture(
    stored: np.ndarray,
    header: DicomHeader,
    scales: list[tuple[float, float]],
    affine: np.ndarray | None,
) -> Picture:
    values, dtype = stored, stored.dtype
    if any(scale != (1.0, 0.0) for scale in scales):
        slopes, intercepts = (np.array(part) for part in zip(*scales, strict=True))
        values = slopes[:, None, None] * stored + intercepts[:, None, None]
        dtype = np.dtype(np.float32)
    return Picture(
        torch.from_numpy(np.ascontiguousarray(values[:, None], dtype=np.float32)),
        dtype=dtype,
        layout="PHW",
        header=header,
        affine=affine,
        says_white=False,
    )


def _pixels(file: Path, dataset: Any) -> tuple[np.ndarray, tuple[float, float], Any]:
    """Returns what is stored, the scale, and where there is nothing."""
    missing = [tag for tag in _NEEDED if tag not in dataset]
    if missing:
        raise NamedError(f"{file} is no whole DICOM image: no {', '.join(missing)}.")
    if "PixelData" not in dataset:
        raise NamedError(
            f"{file} has no pixels of integers, which alone are read of DICOM files."
        )
    colour = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if (
        not colour.startswith("MONOCHROME")
        or int(dataset.get("SamplesPerPixel", 1)) > 1
    ):
        raise NamedError(f"{file} is in colour ({colour}). Gray DICOM files are read.")
    if "PerFrameFunctionalGroupsSequence" in dataset:
        raise NamedError(
            f"{file} is an enhanced file, whose frames have headers of their own. "
            "Convert it to one file for every frame (emf2sf of dcm4che)."
        )
    if "ModalityLUTSequence" in dataset:
        raise NamedError(f"{file} has a modality lookup table instead of a slope.")
    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if syntax is None:
        raise NamedError(f"{file} does not say how its pixels are stored.")
    if not syntax.is_little_endian:  # retired, and not to be converted by pydicom
        raise NamedError(f"{file} is stored big end first. Convert it (dcmconv +te).")
    try:
        # The function, not the attribute, which would keep the pixels with the header.
        stored = np.array(needs("pydicom.pixels", file).pixel_array(dataset))
    except Exception as error:  # decoders raise anything
        if not syntax.is_compressed:
            raise NamedError(f"{file} cannot be read as DICOM: {error}") from error
        raise NamedError(
            f"{file} is compressed as {syntax.name}, which nothing installed reads. "
            "Install pylibjpeg[all], or decompress it (dcmdjpeg, gdcmconv --raw). "
            f"({' '.join(str(error).split())})"
        ) from error
    if int(dataset.BitsAllocated) == 1:
        raise NamedError(f"{file} holds one bit a pixel, which is a mask and no image.")
    slope = _number_list(dataset, "RescaleSlope", 1) or [1.0]
    intercept = _number_list(dataset, "RescaleIntercept", 1) or [0.0]
    if slope[0] == 0:
        raise NamedError(f"{file} has a rescale slope of 0.")
    padding = None
    if "PixelPaddingValue" in dataset:
        low = high = int(dataset.PixelPaddingValue)
        if "PixelPaddingRangeLimit" in dataset:
            low, high = sorted((low, int(dataset.PixelPaddingRangeLimit)))
        outside = (stored >= low) & (stored <= high)
        if outside.any():
            padding = np.ma.masked_array(stored, ~outside)
    del dataset.PixelData  # a derived image has others
    return stored, (slope[0], intercept[0]), padding


def _number_list(dataset: Any, tag: str, length: int) -> list[float] | None:
    value = dataset.get(tag)
    if value is None or value == "":
        return None
    numbers = [float(v) for v in (value if length > 1 else [value])]
    return numbers if len(numbers) == length else None


# -- geometry -----------------------------------------------------------------------


def _in_order(
    path: Path, datasets: list[tuple[Path, Any]]
) -> tuple[list[tuple[Path, Any]], np.ndarray | None, list[str]]:
    """
    Returns slices along their normal, their distances, and what to know. If they are no
    volume, there are no distances.
    """
    by_number = sorted(datasets, key=lambda d: int(d[1].get("InstanceNumber") or 0))
    places = [_place(dataset) for _, dataset in datasets]
    if any(place is None for place in places):
        note = f"{path}: some slices do not say where they are; in order of number"
        return by_number, None, [note]
    turns = np.array([place[0] for place in places if place is not None])
    if np.abs(turns - turns[0]).max() > 1e-3:
        note = f"{path}: slices are not parallel; in order of number"
        return by_number, None, [note]
    normal = np.cross(turns[0][:3], turns[0][3:])
    numbers = [int(dataset.get("InstanceNumber") or 0) for _, dataset in datasets]
    heights = [float(normal @ place[1]) for place in places if place is not None]
    order = sorted(range(len(datasets)), key=lambda i: (heights[i], numbers[i]))
    steps = np.diff([heights[i] for i in order])
    ordered = [datasets[i] for i in order]
    usual = float(np.sort(steps)[(len(steps) - 1) // 2])  # the lower median
    if steps.min() <= 1e-3:
        note = f"{path}: several slices have one place, as those of several times"
        return by_number, None, [note]
    off = np.abs(steps - usual)
    if off.max() > SPACING_TOLERANCE * usual:
        i = int(off.argmax())
        note = (
            f"{path}: slices are not equally spaced: {steps[i]:.4g} mm between "
            f"{ordered[i][0].name} and {ordered[i + 1][0].name}, {usual:.4g} mm as a "
            "rule. Is one missing?"
        )
        return ordered, steps, [note]
    return ordered, steps, []


def _place(dataset: Any) -> tuple[np.ndarray, np.ndarray] | None:
    turn = _number_list(dataset, "ImageOrientationPatient", 6)
    corner = _number_list(dataset, "ImagePositionPatient", 3)
    if turn is None or corner is None:
        return None
    return np.array(turn), np.array(corner)


def _affine(
    first: Any, spacing: list[float], last: Any, steps: float
) -> np.ndarray | None:
    """
    Returns the affine matrix from (column, row, slice) to millimetres.

    There are ``steps`` steps to the last slice; of one slice alone, these are its
    thickness.
    """
    place, end = _place(first), None if last is None else _place(last)
    if place is None:
        return None
    turn, corner = place
    affine = np.eye(4)
    affine[:3, 0] = turn[:3] * spacing[1]  # along a row: the distance of columns
    affine[:3, 1] = turn[3:] * spacing[0]
    if end is None:
        affine[:3, 2] = np.cross(turn[:3], turn[3:]) * steps
    else:
        affine[:3, 2] = (end[1] - corner) / steps
    affine[:3, 3] = corner
    return _LPS_TO_RAS @ affine


# -- writing ------------------------------------------------------------------------


def check(path: Path, like: Picture) -> None:
    """
    Checks that a derived series can be written.

    :param pathlib.Path path: file, or folder for a series.
    :param Picture like: the picture.
    :raises ValueError: if it comes from no DICOM file, is a series and the target a
        file, or other files are in the folder.
    """
    header = like.header
    if not isinstance(header, DicomHeader):
        raise ValueError(
            f"{path}: a DICOM file is written from one only, whose patient and study "
            "it names. Give a name that ends in .nii.gz, .tif or .npy."
        )
    several = len(header.datasets) > 1
    if several and (path.is_file() or path.suffix.lower() in SUFFIXES):
        raise ValueError(
            f"{path}: a series of {len(header.datasets)} files is written to a folder."
        )
    if path.is_dir():
        others = {p.name for p in path.iterdir() if is_dicom(p)} - set(_names(header))
        if others:
            raise ValueError(
                f"{path} holds {len(others)} DICOM files already, as {min(others)}, "
                "that would be mixed with the result. Give another folder."
            )


def _names(header: DicomHeader) -> list[str]:
    return [
        name if Path(name).suffix.lower() in SUFFIXES else f"{name}.dcm"
        for name in header.names
    ]


def write(path: Path, pages: Tensor, like: Picture) -> None:
    """
    Writes a derived series: other pixels, other UIDs, the rest as it was.

    Numbers are stored in the same bits, with the same rescale slope and intercept, and
    without compression. Pixels that were marked as padding stay as they were. The image
    type says DERIVED, and every file names the one that it comes from.

    :param pathlib.Path path: file, or folder for a series, whose files keep their
        names.
    :param torch.Tensor pages: real ones, ``(P, 1, H, W)``, in the unit of the file.
    :param Picture like: what they come from.
    """
    pydicom = needs("pydicom", path)
    header = like.header
    several = len(header.datasets) > 1
    into_folder = several or path.is_dir() or path.suffix == ""
    values = pages[:, 0].double().numpy()
    parts = values[:, None] if several else [values]
    series = pydicom.uid.generate_uid()
    now = datetime.datetime.now()
    for source, name, (slope, intercept), padding, part in zip(
        header.datasets,
        _names(header),
        header.scales,
        header.padding,
        parts,
        strict=True,
    ):
        stored = _stored((part - intercept) / slope, source, padding)
        dataset = _derived(pydicom, source, stored, series, now)
        target = path / name if into_folder else path
        with replacing(target) as temporary:
            dataset.save_as(temporary, enforce_file_format=True)


def _stored(values: np.ndarray, source: Any, padding: Any) -> np.ndarray:
    signed, bits = bool(source.PixelRepresentation), int(source.BitsStored)
    low, high = (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    )
    dtype = np.dtype(f"{'i' if signed else 'u'}{int(source.BitsAllocated) // 8}")
    stored: np.ndarray = np.rint(values).clip(low, high).astype(dtype)
    if padding is not None:
        outside = ~np.ma.getmaskarray(padding)
        stored = np.where(outside, padding.data, stored).astype(dtype)
    return stored if len(stored) > 1 else stored[0]


def _derived(
    pydicom: Any, source: Any, stored: np.ndarray, series: str, now: datetime.datetime
) -> Any:
    """Returns a dataset like another one with other pixels, see part 3, C.7.6.1.1.2."""
    dataset = copy.deepcopy(source)
    frames = dataset.get("NumberOfFrames")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    for tag in ("SmallestImagePixelValue", "LargestImagePixelValue"):
        if tag in dataset:
            del dataset[tag]
    dataset.set_pixel_data(
        stored, str(dataset.PhotometricInterpretation), int(dataset.BitsStored)
    )
    if frames is not None:
        dataset.NumberOfFrames = frames
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SeriesInstanceUID = series
    kind = [str(v) for v in source.get("ImageType") or ["ORIGINAL", "PRIMARY"]]
    dataset.ImageType = ["DERIVED", *kind[1:]]
    reference = pydicom.Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    dataset.SourceImageSequence = pydicom.Sequence([reference])
    dataset.DerivationDescription = (
        f"Processed by deepinv-deal {version('deepinv-deal')}"
    )
    described = str(source.get("SeriesDescription") or "")
    dataset.SeriesDescription = f"{described[:51]} deepinv-deal".strip()
    dataset.InstanceCreationDate = now.strftime("%Y%m%d")
    dataset.InstanceCreationTime = now.strftime("%H%M%S")
    return dataset


DICOM = Kind("DICOM", SUFFIXES, read, check, write)
