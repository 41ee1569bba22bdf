"""Images and noisy patches for training, reproducible from a seed and a step number."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from deepinv_deal._batch import central

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

#: MATLAB's rgb2gray, by which the gray BSD68 was made.
_RGB_TO_GRAY = np.array([0.298936021, 0.587043074, 0.114020904])


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
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"No image found in {str(root)!r} (looked for {', '.join(IMAGE_SUFFIXES)})."
        )
    bar = tqdm(
        paths, "Reading images", disable=None if progress is None else not progress
    )
    return [(str(path.relative_to(root)), load_image(path, channels)) for path in bar]


def load_images(folder: str | os.PathLike[str], channels: int) -> list[Tensor]:
    """Reads the images of :func:`load_image_folder` without their names."""
    return [image for _, image in load_image_folder(folder, channels)]


def noisy_crops(
    images: Sequence[Tensor], sigmas: Sequence[float], size: int, seed: int
) -> list[tuple[float, list[tuple[Tensor, Tensor]]]]:
    """
    Returns centre crops with fixed noise, for every noise level.

    :param list images: 8-bit images ``(C, H, W)``.
    :param list sigmas: noise levels in [0, 1] units.
    :param int size: side of the crops.
    :param int seed: seed of the noise, the same for every level.
    :return: pairs of noise level and pairs of clean and noisy crop, of at most ``(1,
        C, size, size)``, in [0, 1] units.
    """
    problems = []
    for sigma in sigmas:
        rng = torch.Generator().manual_seed(seed)
        pairs = []
        for image in images:
            x = central(image[None], size).float() / 255
            noise = torch.randn(x.shape, generator=rng, device="cpu")
            pairs.append((x, x + sigma * noise))
        problems.append((sigma, pairs))
    return problems


def numbered_generator(seed: int, index: int) -> torch.Generator:
    """
    Returns the random generator of step ``index`` of a run with ``seed``.

    :param int seed: seed of the run.
    :param int index: number of the step.
    """
    # The CPU generator uses the lower 32 bits only, so the seed has to enter these: it
    # shifts the sequence of steps by a multiple of a large odd number.
    return torch.Generator().manual_seed((index + 2654435761 * seed) % 2**32)


@dataclass
class Problems:
    """
    A batch of denoising problems.

    :param torch.Tensor x: clean patches, shape ``(B, C, P, P)``, in [0, 1].
    :param torch.Tensor y: noisy patches, shape of ``x``, not clipped.
    :param torch.Tensor sigma: noise levels ``(B,)`` in [0, 1] units.
    """

    x: Tensor
    y: Tensor
    sigma: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Problems:
        """Moves all tensors to a device; ``non_blocking`` as in torch."""
        parts = (self.x, self.y, self.sigma)
        return Problems(*(part.to(device, non_blocking=non_blocking) for part in parts))

    def pin_memory(self) -> Problems:
        """Copies all tensors to memory from which a GPU reads without waiting."""
        parts = (self.x, self.y, self.sigma)
        return Problems(*(part.pin_memory() for part in parts))


class DenoisingSampler:
    r"""
    Draws noisy patches: batch number ``i`` depends on ``(seed, i)`` and nothing else.

    A training that is killed and resumed at step ``i`` therefore sees the same data.

    :param list images: images ``(C, H, W)``, 8 bit.
    :param int patch_size: side of the square patches.
    :param float sigma_max: largest noise level ([0, 1] units).
    :param int seed: seed.
    :param float skew: noise levels are :math:`\sigma_{\max} u^{\text{skew}}` with
        :math:`u` uniform in [0, 1].
    :raises ValueError: if an image is smaller than a patch, or none is given.
    """

    def __init__(
        self,
        images: list[Tensor],
        patch_size: int,
        sigma_max: float,
        seed: int = 0,
        skew: float = 1.0,
    ):
        if not images:
            raise ValueError("images is empty: at least one training image is needed.")
        for i, image in enumerate(images):
            if min(image.shape[-2:]) < patch_size:
                raise ValueError(
                    f"Image {i} has size {tuple(image.shape[-2:])}, smaller than "
                    f"patch_size={patch_size}. Remove it or choose a smaller "
                    "patch_size."
                )
        self.images, self.patch_size = images, patch_size
        self.sigma_max, self.seed, self.skew = sigma_max, seed, skew

    def batch(self, index: int, size: int) -> Problems:
        """Returns batch number ``index`` with ``size`` problems, on the CPU."""
        rng = numbered_generator(self.seed, index)
        patches = torch.stack([self._patch(rng) for _ in range(size)])
        x = patches.to(torch.get_default_dtype()) / 255
        level = torch.rand(size, generator=rng, device="cpu")
        sigma = self.sigma_max * level**self.skew
        noise = torch.randn(x.shape, generator=rng, device="cpu")
        return Problems(x, x + sigma[:, None, None, None] * noise, sigma)

    def _patch(self, rng: torch.Generator) -> Tensor:
        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=rng, device="cpu"))

        image = self.images[draw(len(self.images))]
        p = self.patch_size
        top, left = (draw(n - p + 1) for n in image.shape[-2:])
        patch = image[:, top : top + p, left : left + p]
        patch = patch.rot90(draw(4), (1, 2))
        return patch.flip(-1) if draw(2) else patch


class Prefetched:
    """
    The batches of a sampler, of which a background thread draws the next one.

    They are those of the sampler. A GPU need not wait while a batch is drawn, nor while
    it is copied.

    :param DenoisingSampler sampler: draws the batches, on the CPU.
    :param int size: problems of a batch.
    :param torch.device device: where the batches go.
    """

    def __init__(self, sampler: DenoisingSampler, size: int, device: torch.device):
        self.sampler, self.size, self.device = sampler, size, device
        self._next: tuple[int, Future[Problems]] | None = None
        self._executor: ThreadPoolExecutor | None = None

    def batch(self, index: int) -> Problems:
        """Returns batch number ``index``, on the CPU."""
        expected, self._next = self._next, None
        if expected is not None and expected[0] == index:
            return expected[1].result()
        return self._draw(index)

    def prepare(self, index: int) -> None:
        """Begins to draw batch number ``index``, unless that has begun."""
        if self._next is not None and self._next[0] == index:
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "batches")
        self._next = index, self._executor.submit(self._draw, index)

    def _draw(self, index: int) -> Problems:
        problems = self.sampler.batch(index, self.size)
        if self.device.type != "cuda":
            return problems
        with torch.cuda.device(self.device):  # each thread has a current GPU of its own
            return problems.pin_memory()
