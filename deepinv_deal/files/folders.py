"""Folders of images, for training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deepinv_deal._warnings import warn
from deepinv_deal.files.decode import IMAGES
from deepinv_deal.files.kinds import suffix_of
from deepinv_deal.files.pictures import read_picture

#: MATLAB's rgb2gray, by which the gray BSD68 was made.
_RGB_TO_GRAY = (0.298936021, 0.587043074, 0.114020904)


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """
    Returns the files of a folder and its subfolders with these suffixes, in order.

    Links are followed. Files of macOS that only describe others, ``._NAME``, are left
    out.

    :param pathlib.Path folder: the folder.
    :param list suffixes: the suffixes, with their dots, in lower case.
    """
    return sorted(
        path
        for path in _all_below(folder, set())
        if suffix_of(path) in suffixes and not path.name.startswith("._")
    )


def _all_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Gives all files of a folder and its subfolders, of links to folders, too."""
    links: list[Path] = []
    yield from _own_below(folder, seen, links)
    for link in links:  # last: what they lead to may be there under its own name
        yield from _all_below(link, seen)


def _own_below(folder: Path, seen: set[Path], links: list[Path]) -> Iterator[Path]:
    """Does the same without links, which are collected."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    try:
        paths = sorted(folder.iterdir())
    except PermissionError:
        warn(f"The folder {folder} cannot be read and is left out.")
        return
    for path in paths:
        if path.is_dir() and path.is_symlink():
            links.append(path)
        elif path.is_dir():
            yield from _own_below(path, seen, links)
        elif path.is_file():
            yield path


def load_image(path: str | os.PathLike[str], channels: int) -> Tensor:
    """
    Reads an image file as ``(channels, H, W)``: 8 bit, or floating point in [0, 1] if
    it is deeper; see :func:`as_float`.

    Colour turns gray by the weights of MATLAB's ``rgb2gray``, gray turns colour by
    repetition. Transparency is left out.

    :param str path: image file.
    :param int channels: 1 (gray) or 3 (colour).
    :raises ValueError: if the file is no readable image, has several pages, or does not
        say what is white.
    """
    picture = read_picture(path)
    if len(picture.x) > 1:
        raise ValueError(f"{path} has {len(picture.x)} pages. Save them as files.")
    eight_bit = picture.dtype == np.uint8
    image = picture.x[0].double()
    image = (image * 255).round() if eight_bit else image
    if channels == 1 and len(image) == 3:
        weights = torch.tensor(_RGB_TO_GRAY, dtype=image.dtype)
        image = torch.tensordot(weights, image, 1)[None]
    elif channels == 3 and len(image) == 1:
        image = image.expand(3, -1, -1)
    if eight_bit:
        return image.round().to(torch.uint8).contiguous()
    return image.float().contiguous()


def as_float(image: Tensor) -> Tensor:
    """
    Returns an image of :func:`load_image` in [0, 1], in the default precision.

    :param torch.Tensor image: 8 bit, or floating point in [0, 1] already.
    """
    dtype = torch.get_default_dtype()
    return image.to(dtype) / 255 if image.dtype == torch.uint8 else image.to(dtype)


def load_image_folder(
    folder: str | os.PathLike[str],
    channels: int,
    *,
    leave_out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> list[tuple[str, Tensor]]:
    """
    Reads all images of a folder and its subfolders, in the order of their paths.

    :param str folder: folder with image files.
    :param int channels: 1 (gray) or 3 (colour).
    :param str leave_out: a file that does not count, if it is there.
    :param bool progress: show a progress bar; on terminals if ``None``.
    :return: pairs of path below ``folder`` and image ``(channels, H, W)``, see
        :func:`load_image`.
    :raises FileNotFoundError: if the folder does not exist or holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"The data folder {str(root)!r} does not exist. Give a folder of images."
        )
    paths = files_below(root, IMAGES)
    if leave_out is not None:
        own = Path(leave_out).resolve()
        paths = [path for path in paths if path.resolve() != own]
    if not paths:
        raise FileNotFoundError(
            f"No image found in {str(root)!r} (looked for {', '.join(IMAGES)})."
        )
    bar = tqdm(
        paths, "Reading images", disable=None if progress is None else not progress
    )
    return [(str(path.relative_to(root)), load_image(path, channels)) for path in bar]


def load_images(
    folder: str | os.PathLike[str], channels: int, **options: Any
) -> list[Tensor]:
    """Reads the images of :func:`load_image_folder` without their names."""
    return [image for _, image in load_image_folder(folder, channels, **options)]
