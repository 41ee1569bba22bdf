"""Pixels and what goes with them, from and to picture files."""

from __future__ import annotations

import math
import struct
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

TIFF = (".tif", ".tiff")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", *TIFF, ".webp")

#: Files that may be compressed with losses.
LOSSY = (".jpg", ".jpeg", ".webp")

#: What picture files other than TIFF can hold: depths for gray and colour, and whether
#: there may be transparency.
_CAPABILITIES: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    ".png": (("uint8", "uint16"), ("uint8",), True),
    ".webp": (("uint8",), ("uint8",), True),
    ".jpg": (("uint8",), ("uint8",), False),
    ".jpeg": (("uint8",), ("uint8",), False),
    ".bmp": (("uint8",), ("uint8",), False),
}

#: How lossy formats are written: with as little loss as they can.
_SAVING: dict[str, dict[str, Any]] = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True, "exact": True},  # also where it is transparent
}

_GRAY_16 = ("I;16", "I;16B", "I;16L", "I;16N")

#: Tags of TIFF files.
_ORIENTATION, _ICC_PROFILE, _X_RESOLUTION = 274, 34675, 282
_Y_RESOLUTION, _RESOLUTION_UNIT = 283, 296

#: What ImageJ says about a stack, as tifffile writes it.
_IMAGEJ = (
    *("spacing", "unit", "finterval", "fps", "loop", "mode", "min", "max"),
    *("xorigin", "yorigin", "zorigin", "Info", "Labels", "Ranges", "LUTs"),
)

#: Numbers that ImageJ knows.
_IMAGEJ_DTYPES = ("uint8", "uint16", "float32")

#: Points per inch by the unit of a TIFF file: none, inch, centimetre.
_PER_INCH = {1: None, 2: 1.0, 3: 2.54}


@dataclass(frozen=True)
class Decoded:
    """
    What a picture file holds.

    :param numpy.ndarray pixels: ``(P, H, W)`` or ``(P, H, W, 3)``, upright.
    :param numpy.ndarray alpha: opacity ``(P, H, W)``, if there is one.
    :param dict metadata: ``icc_profile``, ``dpi``, ``exif`` and ``imagej``, where there
        are any, for pixels of this size.
    :param tuple stack: sizes of the axes that the pages run through, slowest first.
    :param int depth: which of them is that of slices, ``None``: there is none.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    stack: tuple[int, ...] = ()
    depth: int | None = 0


def decode(file: Path) -> Decoded:
    """
    Reads a picture file in its own depth, upright, with all pages.

    :param pathlib.Path file: the file.
    :raises ValueError: if it is no picture, damaged, or of a kind of which something
        would be lost.
    """
    suffix = file.suffix.lower()
    try:
        if suffix in TIFF:
            decoded = _decode_tiff(file)
            if decoded is not None:
                return decoded
        return _decode_by_pillow(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is not a readable image.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{file} has more pixels than Pillow reads. Save it as TIFF or .npy, or "
            f"raise PIL.Image.MAX_IMAGE_PIXELS. ({error})"
        ) from error
    except tifffile.TiffFileError as error:  # a ValueError, without the name
        raise ValueError(f"{file} is not a readable image: {error}") from error
    except ValueError:
        raise
    except Exception as error:  # a damaged file can make its reader raise anything
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def _decode_by_pillow(file: Path) -> Decoded:
    with warnings.catch_warnings():
        # Twice as many pixels are an error; so many are a warning to web servers.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        source = Image.open(file)
    with source:
        if getattr(source, "n_frames", 1) > 1:
            raise ValueError(
                f"{file} holds {source.n_frames} frames; only TIFF files may have "  # type: ignore[attr-defined]
                "several pages. Save each as a file, or all as TIFF."
            )
        if _is_cut_by_pillow(file):
            raise ValueError(
                f"{file} has 16 bit and several channels, which Pillow would cut to 8 "
                "bit. Save it as TIFF or .npy."
            )
        kept = ("icc_profile", "dpi")
        metadata: dict[str, Any] = {k: v for k, v in source.info.items() if k in kept}
        image: Image.Image = ImageOps.exif_transpose(source) or source
        exif = image.getexif()
        exif.pop(_ORIENTATION, None)
        if len(exif) and file.suffix.lower() not in TIFF:
            metadata["exif"] = exif.tobytes()
        return _split_alpha(_pixels(image, file)[None], metadata)


def _pixels(image: Image.Image, file: Path) -> np.ndarray:
    if image.mode in ("1", "P"):
        transparent = "transparency" in image.info
        palette = "RGBA" if transparent else "RGB"
        image = image.convert("L" if image.mode == "1" else palette)
    elif image.mode == "L" and "transparency" in image.info:
        image = image.convert("LA")
    elif image.mode == "RGB" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in (*_GRAY_16, "I") and "transparency" in image.info:
        raise ValueError(
            f"{file} has 16 bit and a value that is transparent. Save it as TIFF with "
            "an opacity, or without."
        )
    if image.mode in _GRAY_16:
        return np.array(image).astype(np.uint16)
    if image.mode == "I":  # 16 bit in older versions of Pillow
        wide = np.array(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"{file} holds integers of 32 bit. Save it as .npy.")
        return wide.astype(np.uint16)
    if image.mode not in ("L", "LA", "RGB", "RGBA", "F"):
        raise ValueError(
            f"{file} has the colour mode {image.mode}. Convert it to gray or RGB."
        )
    return np.array(image)  # a copy: torch warns of arrays that cannot be written


def _is_cut_by_pillow(file: Path) -> bool:
    with open(file, "rb") as stream:
        head = stream.read(26)  # signature, then IHDR: bit depth, colour type
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24] == 16 and head[25] in (2, 4, 6)


def _split_alpha(pixels: np.ndarray, metadata: dict[str, Any]) -> Decoded:
    """Separates the opacity of ``(P, H, W, 2 or 4)``."""
    if pixels.ndim == 4 and pixels.shape[-1] in (2, 4):
        colours = pixels[..., :-1]
        colours = colours[..., 0] if colours.shape[-1] == 1 else colours
        return Decoded(colours, pixels[..., -1], metadata)
    if pixels.ndim == 4 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Decoded(pixels, None, metadata)


# -- TIFF ---------------------------------------------------------------------------


def _decode_tiff(file: Path) -> Decoded | None:
    """Reads a TIFF file; ``None`` if Pillow reads it as well and knows more."""
    with tifffile.TiffFile(file) as tiff:
        pages = list(tiff.pages)
        if _next_page(tiff):
            raise ValueError(
                f"{file} cannot be read whole: it is cut after page {len(pages)}."
            )
        axes, shape = _axes(tiff)
        first: Any = pages[0]
        if first.photometric == tifffile.PHOTOMETRIC.PALETTE:
            return None
        for page in pages:
            if (page.shape, page.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"{file} holds pages of different kinds: {first.shape} "
                    f"{first.dtype} and {page.shape} {page.dtype}. Save them apart."
                )
        try:
            parts = [
                _upright(_channels_last(page), _orientation(page)) for page in pages
            ]
        except ValueError as error:  # a compression that needs another library
            if len(pages) == 1 and first.bitspersample == 8:
                return None
            raise ValueError(
                f"{file} cannot be read: {error}. Save it without compression, or "
                "install imagecodecs."
            ) from error
        pixels = np.stack(parts)
        if math.prod(shape) > len(parts):  # ImageJ describes the first page only
            pixels = tiff.series[0].asarray().reshape(-1, *pixels.shape[1:])
        if pixels.dtype.kind == "b":
            pixels = pixels.astype(np.uint8) * 255
        if first.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            pixels = _inverted(pixels, file)
        channels = pixels.shape[-1] if pixels.ndim == 4 else 1
        known = first.photometric in (
            tifffile.PHOTOMETRIC.MINISBLACK,
            tifffile.PHOTOMETRIC.MINISWHITE,
            tifffile.PHOTOMETRIC.RGB,
        )
        if not known or channels > 4:
            raise ValueError(
                f"{file} has {channels} channels of the kind "
                f"{tifffile.PHOTOMETRIC(first.photometric).name}. Convert it to gray "
                "or RGB."
            )
        _check_extra_channels(first, pixels, file)
        metadata = _tiff_metadata(first)
        if tiff.is_imagej:
            known_to = tiff.imagej_metadata or {}
            metadata["imagej"] = {k: known_to[k] for k in _IMAGEJ if k in known_to}
            metadata["imagej"]["axes"] = axes
        elif tiff.is_ome:
            metadata["description"] = first.description
        decoded = _split_alpha(np.ascontiguousarray(pixels), metadata)
        depth = next((axes.rindex(a) for a in "ZIQT" if a in axes), None)
        return replace(decoded, stack=shape, depth=depth)


def _check_extra_channels(page: Any, pixels: np.ndarray, file: Path) -> None:
    """Checks that what follows gray or RGB is an opacity, and no other channel."""
    channels = pixels.shape[-1] if pixels.ndim == 4 else 1
    colour = page.photometric == tifffile.PHOTOMETRIC.RGB
    extra = channels - (3 if colour else 1)
    kinds = [tifffile.EXTRASAMPLE(kind) for kind in page.extrasamples]
    if extra == 0 or (extra == 1 and kinds == [tifffile.EXTRASAMPLE.UNASSALPHA]):
        return
    if extra == 1 and pixels.dtype.kind == "u":
        if (pixels[..., -1] == np.iinfo(pixels.dtype).max).all():
            return  # opaque, whatever it is meant to be
    name = "RGB" if colour else "gray"
    if extra == 1 and kinds == [tifffile.EXTRASAMPLE.ASSOCALPHA]:
        raise ValueError(
            f"{file} has colours that are multiplied by their opacity. Save it with an "
            "opacity that stands by itself (UNASSALPHA)."
        )
    raise ValueError(
        f"{file} has {channels} channels, of which {name} is known and the rest is no "
        "opacity. Save RGB as such, and other channels as pages or files."
    )


def _next_page(tiff: tifffile.TiffFile) -> int:
    """Returns where a page follows the last one that could be read, 0: nowhere."""
    layout, stream = tiff.tiff, tiff.filehandle
    last = tiff.pages[-1].offset
    stream.seek(last)
    (tags,) = struct.unpack(layout.tagnoformat, stream.read(layout.tagnosize))
    stream.seek(last + layout.tagnosize + tags * layout.tagsize)
    (following,) = struct.unpack(layout.offsetformat, stream.read(layout.offsetsize))
    return int(following)


def _axes(tiff: tifffile.TiffFile) -> tuple[str, tuple[int, ...]]:
    """Returns names and sizes of the axes that the pages run through."""
    series = tiff.series[0]
    axes = series.axes.removesuffix("S").removesuffix("YX")
    shape = tuple(series.shape[: len(axes)])
    in_order = [page.index for page in series.pages if page is not None]
    known = len(tiff.series) == 1 and len(axes) + 2 == len(series.axes.replace("S", ""))
    if tiff.is_imagej and known and math.prod(shape) >= len(tiff.pages):
        return axes, shape
    if known and math.prod(shape) == len(tiff.pages) == len(in_order):
        if in_order == sorted(in_order):
            return axes, shape
    return "I", (len(tiff.pages),)


def _channels_last(page: Any) -> np.ndarray:
    pixels: np.ndarray = page.asarray()
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    elif page.axes not in ("YX", "YXS"):
        raise ValueError(f"its axes are {page.axes}")
    return pixels


def _orientation(page: Any) -> int:
    tag = page.tags.get(_ORIENTATION)
    return 1 if tag is None else int(tag.value)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns ``(H, W, ...)`` upright: rows from the top, columns from the left."""
    # By the order of the axes in the file: which of them run backwards?
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return np.swapaxes(pixels, 0, 1) if orientation >= 5 else pixels


def _inverted(pixels: np.ndarray, file: Path) -> np.ndarray:
    if pixels.dtype.kind != "u":
        raise ValueError(f"{file}: zero is white. Convert it to a usual image.")
    return np.iinfo(pixels.dtype).max - pixels


def _tiff_metadata(page: Any) -> dict[str, Any]:
    tags = {tag.code: tag.value for tag in page.tags}
    metadata: dict[str, Any] = {}
    if _ICC_PROFILE in tags:
        metadata["icc_profile"] = bytes(tags[_ICC_PROFILE])
    factor = _PER_INCH.get(int(tags.get(_RESOLUTION_UNIT, 2)))
    if _X_RESOLUTION in tags and _Y_RESOLUTION in tags and factor is not None:
        pairs = tags[_X_RESOLUTION], tags[_Y_RESOLUTION]
        metadata["dpi"] = tuple(factor * a / b for a, b in pairs if b)
        if len(metadata["dpi"]) < 2:
            del metadata["dpi"]
    elif _X_RESOLUTION in tags and _Y_RESOLUTION in tags:  # the unit is elsewhere
        metadata["resolution"] = tags[_X_RESOLUTION], tags[_Y_RESOLUTION]
    return metadata


# -- writing ------------------------------------------------------------------------


def check_capability(
    file: Path, dtype: np.dtype, *, pages: int, colour: bool, transparent: bool
) -> None:
    """
    Checks that a picture file can hold pixels of a kind.

    :param pathlib.Path file: the file to be written.
    :param numpy.dtype dtype: of the pixels.
    :param int pages: number of pages.
    :param bool colour: whether there are three channels.
    :param bool transparent: whether there is an opacity.
    :raises ValueError: if something would be lost, with what to do.
    """
    suffix = file.suffix.lower()
    if suffix in TIFF:
        return
    gray_depths, colour_depths, transparency = _CAPABILITIES[suffix]
    lost = None
    if pages > 1:
        lost = f"{pages} pages"
    elif str(dtype) not in (colour_depths if colour else gray_depths):
        lost = f"{dtype} in colour" if colour else str(dtype)
    elif transparent and not transparency:
        lost = "transparency"
    if lost is not None:
        raise ValueError(
            f"{file}: a {suffix} file cannot hold {lost}. Give a name that ends in "
            ".tif."
        )


def resized(picture: Decoded, size: tuple[int, int]) -> Decoded:
    """
    Returns a picture whose resolution is that of its pixels.

    :param Decoded picture: pixels, with the metadata of others.
    :param tuple size: height and width of those.
    """
    height, width = picture.pixels.shape[1:3]
    factors = width / size[1], height / size[0]
    metadata = dict(picture.metadata)
    for name in ("dpi", "resolution"):
        if name in metadata and factors != (1.0, 1.0):
            pairs = zip(metadata[name], factors, strict=True)
            metadata[name] = tuple(_number(value) * by for value, by in pairs)
    return replace(picture, metadata=metadata)


def _number(value: Any) -> float:
    """Returns a number that TIFF files have as a ratio."""
    if isinstance(value, tuple):
        above, below = value
        return float(above / below) if below else 0.0
    return float(value)


def encode(stream: IO[bytes], suffix: str, picture: Decoded) -> None:
    """
    Writes pixels in their depth.

    :param IO stream: an open binary file.
    :param str suffix: which kind of file.
    :param Decoded picture: what to write, see :func:`check_capability`.
    """
    pixels, alpha, metadata = picture.pixels, picture.alpha, picture.metadata
    colour = pixels.ndim == 4
    if alpha is not None:
        pixels = np.concatenate(
            [pixels if colour else pixels[..., None], alpha[..., None]], -1
        )
    if suffix in TIFF:
        settings: dict[str, Any] = {}
        if "dpi" in metadata:
            settings |= {"resolution": metadata["dpi"], "resolutionunit": "INCH"}
        elif "resolution" in metadata:
            settings |= {"resolution": metadata["resolution"], "resolutionunit": "NONE"}
        if "icc_profile" in metadata:
            settings["iccprofile"] = metadata["icc_profile"]
        if alpha is not None:
            settings["extrasamples"] = ["UNASSALPHA"]
        described: dict[str, Any] | None = None
        if len(pixels) == 1:
            pixels = pixels[0]
        elif "imagej" in metadata and alpha is None and pixels.dtype in _IMAGEJ_DTYPES:
            described = metadata["imagej"].copy()
            described["axes"] += "YXS" if colour else "YX"
            settings["imagej"] = True
            pixels = pixels.reshape(*picture.stack, *pixels.shape[1:])
        elif "description" in metadata:
            settings["description"] = metadata["description"]
        elif len(picture.stack) > 1 and alpha is None:
            described = {}  # of tifffile: the shape
            pixels = pixels.reshape(*picture.stack, *pixels.shape[1:])
        tifffile.imwrite(
            stream,
            pixels,
            photometric="rgb" if colour else "minisblack",
            planarconfig="CONTIG" if colour or alpha is not None else None,
            metadata=described,
            **settings,
        )
        return
    metadata = {k: metadata[k] for k in ("icc_profile", "dpi", "exif") if k in metadata}
    image = Image.fromarray(pixels[0])
    kept = {k: v for k, v in metadata.items() if v is not None}
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
    image.save(stream, kinds.get(suffix, "BMP"), **_SAVING.get(suffix, {}), **kept)
