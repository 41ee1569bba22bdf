"""Images, kernels, masks and measurements in files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

__all__ = [
    "Picture",
    "load_image",
    "load_image_folder",
    "load_images",
    "read_array",
    "read_picture",
    "write_picture",
]

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
ARRAYS = (".npy", ".npz", ".pt", ".h5", ".hdf5", ".mat")

#: MATLAB's rgb2gray, by which the gray BSD68 was made.
_RGB_TO_GRAY = np.array([0.298936021, 0.587043074, 0.114020904])


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """
    Reads an array from a file, by its suffix.

    ``.npy``, ``.npz``, ``.pt``, ``.h5`` (needs h5py), ``.mat`` (needs SciPy) and
    images. Where a file holds several arrays, ``FILE:NAME`` says which; in a cell
    array of MATLAB, ``FILE:NAME/INDEX``, counted from 0. Nothing in a file is executed.

    :param str path: ``FILE`` or ``FILE:NAME``.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is of another kind, damaged, or the name is missing.
    """
    file, name = _split(path)
    suffix = file.suffix.lower()
    try:
        if suffix in IMAGES:
            return _decode(file)
        if suffix == ".npy":
            return np.load(file, allow_pickle=False)
        if suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return arrays[_choose(file, name, list(arrays.files))]
        if suffix == ".pt":
            data = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(data, dict):
                data = data[_choose(file, name, list(data))]
            return _as_tensor(file, data).detach().numpy()
        if suffix in (".h5", ".hdf5"):
            return _read_hdf5(file, name)
        if suffix == ".mat":
            return _read_matlab(file, name)
    except (OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
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
    raise ValueError(f"{file} {asked}. Give {file}:NAME, NAME being one of {names}.")


def _as_tensor(file: Path, data: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError(f"{file} holds a {type(data).__name__}, not a tensor.")
    return data


def _read_hdf5(file: Path, name: str | None) -> np.ndarray:
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
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
            raise ValueError(
                f"{file} holds a cell array of {array.size}: give {file}:NAME/INDEX."
            )
        array = array.flat[int(index)]
    return array


def _decode(file: Path) -> np.ndarray:
    """Returns ``(H, W)`` or ``(H, W, 3)`` without transparency, 8 or 16 bit."""
    try:
        with Image.open(file) as image:
            if _is_16_bit_colour(file):
                raise ValueError(
                    f"{file} is a colour image with 16 bit, which Pillow would cut to "
                    "8. Save it as .npy."
                )
            if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
                return np.asarray(image).astype(np.uint16)
            if image.mode == "F":
                return np.array(image)
            gray = image.mode in ("1", "L", "LA")
            # A copy: torch warns of arrays that cannot be written.
            return np.array(image.convert("L" if gray else "RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is not a readable image.") from error


def _is_16_bit_colour(file: Path) -> bool:
    with open(file, "rb") as stream:
        head = stream.read(26)  # signature, then IHDR: bit depth, colour type
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24] == 16 and head[25] in (2, 6)


@dataclass
class Picture:
    """
    An image from a file, with what is needed to write one like it.

    :param torch.Tensor x: image ``(1, C, H, W)``, float32, white being 1.
    :param float white: what was 1 in the file: 255, 65535 or 1.
    :param bool channels_last: whether the array in the file was ``(H, W, C)``.
    """

    x: Tensor
    white: float
    channels_last: bool = True


def read_picture(path: str | os.PathLike[str], white: float | None = None) -> Picture:
    """
    Reads a gray or colour image: a picture file or an array of any kind.

    Arrays are ``(H, W)``, ``(H, W, 3)``, ``(C, H, W)`` or ``(1, C, H, W)``.

    :param str path: ``FILE`` or ``FILE:NAME``, see :func:`read_array`.
    :param float white: value that counts as 1; if ``None``, 255 or 65535 for integers
        of 8 or 16 bit, and 1 for floating point.
    :raises ValueError: for other shapes, other integers, or floating point values
        above 2 without ``white``.
    """
    array = read_array(path)
    if white is None:
        if array.dtype.kind == "b":
            white = 1.0
        elif array.dtype.kind in "iu":
            if array.dtype.itemsize > 2:
                raise ValueError(
                    f"{path} holds {array.dtype} numbers: say which of them is white."
                )
            white = 255.0 if array.dtype.itemsize == 1 else 65535.0
        else:
            white = 1.0
            if array.size and np.abs(array).max() > 2:
                raise ValueError(
                    f"{path} holds floating point numbers up to "
                    f"{np.abs(array).max():g}, but 1 counts as white. Say which value "
                    "is white."
                )
    if array.dtype.kind == "c":
        raise ValueError(f"{path} holds complex numbers, an image was expected.")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    channels_last = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)
    if array.ndim == 2:
        image = array[None]
    elif array.ndim == 3 and array.shape[-1] == 3:
        image = array.transpose(2, 0, 1)
    elif array.ndim == 3 and array.shape[0] in (1, 3):
        image = array
    else:
        raise ValueError(
            f"{path} has shape {array.shape}; an image is (H, W), (H, W, 3), (1, H, W) "
            "or (3, H, W)."
        )
    x = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)) / white
    return Picture(x[None], white, channels_last)


def write_picture(path: str | os.PathLike[str], x: Tensor, like: Picture) -> None:
    """
    Writes an image, as it was read: same depth, and for arrays same layout and unit.

    Picture files are clipped to what they can hold; arrays are not clipped.

    :param str path: picture file, ``.npy`` or ``.pt``.
    :param torch.Tensor x: image ``(1, C, H, W)``; complex images are allowed in arrays.
    :param Picture like: the image that it came from.
    :raises ValueError: for another suffix.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in (*IMAGES, ".npy", ".pt"):
        raise ValueError(
            f"{file}: the result can be written as .npy, .pt or {', '.join(IMAGES)}."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    image = x[0].detach().cpu()
    if len(image) == 1:
        image = image[0]
    elif like.channels_last:
        image = image.permute(1, 2, 0)
    if suffix == ".npy":
        np.save(file, (image * like.white).numpy())
    elif suffix == ".pt":
        torch.save((image * like.white).clone(), file)
    else:
        deep = like.white > 255 and image.ndim == 2 and suffix in (".png", ".tif")
        top, kind = (65535, np.uint16) if deep else (255, np.uint8)
        levels = (image.clamp(0, 1) * top).round().numpy().astype(kind)
        Image.fromarray(levels).save(file)


# -- 8-bit images for training and evaluation --------------------------------------


def load_image(path: str | os.PathLike[str], channels: int) -> Tensor:
    """
    Reads an image file as ``(channels, H, W)``, 8 bit.

    Colour turns gray by the weights of MATLAB's ``rgb2gray``, gray turns colour by
    repetition.

    :param str path: image file.
    :param int channels: 1 (gray) or 3 (colour).
    :raises ValueError: if the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            if channels == 1 and image.mode in ("L", "1", "P", "LA"):
                gray = np.asarray(image.convert("L"))
            else:
                rgb = np.asarray(image.convert("RGB"))
                if channels == 3:
                    return torch.from_numpy(rgb.copy()).permute(2, 0, 1).contiguous()
                gray = np.rint(rgb.astype(np.float64) @ _RGB_TO_GRAY).astype(np.uint8)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return torch.from_numpy(gray.copy())[None]


def load_image_folder(
    folder: str | os.PathLike[str], channels: int, *, progress: bool | None = None
) -> list[tuple[str, Tensor]]:
    """
    Reads all images of a folder and its subfolders, in the order of their paths.

    :param str folder: folder with image files.
    :param int channels: 1 (gray) or 3 (colour).
    :param bool progress: show a progress bar; on terminals if ``None``.
    :return: pairs of path below ``folder`` and image ``(channels, H, W)``, 8 bit.
    :raises FileNotFoundError: if the folder does not exist or holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"The data folder {str(root)!r} does not exist. Give a folder of images."
        )
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGES)
    if not paths:
        raise FileNotFoundError(
            f"No image found in {str(root)!r} (looked for {', '.join(IMAGES)})."
        )
    bar = tqdm(
        paths, "Reading images", disable=None if progress is None else not progress
    )
    return [(str(path.relative_to(root)), load_image(path, channels)) for path in bar]


def load_images(folder: str | os.PathLike[str], channels: int) -> list[Tensor]:
    """Reads the images of :func:`load_image_folder` without their names."""
    return [image for _, image in load_image_folder(folder, channels)]
