"""Images and noisy patches for training, reproducible from a seed and a step number."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from deepinv_deal._batch import central
from deepinv_deal.files import as_float

# Public in deepinv_deal.training, too.
from deepinv_deal.files import load_image as load_image
from deepinv_deal.files import load_image_folder as load_image_folder
from deepinv_deal.files import load_images as load_images


def noisy_crops(
    images: Sequence[Tensor], sigmas: Sequence[float], size: int, seed: int
) -> list[tuple[float, list[tuple[Tensor, Tensor]]]]:
    """
    Returns centre crops with fixed noise, for every noise level.

    :param list images: images ``(C, H, W)``, 8 bit or in [0, 1].
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
            x = as_float(central(image[None], size))
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

    :param list images: images ``(C, H, W)``, 8 bit or in [0, 1].
    :param int patch_size: side of the square patches.
    :param float sigma_max: largest noise level ([0, 1] units).
    :param int seed: seed.
    :param float skew: noise levels are :math:`\sigma_{\max} u^{\text{skew}}` with
        :math:`u` uniform in [0, 1].
    :param list names: what to call the images in errors; ``None``: their numbers.
    :raises ValueError: if an image is smaller than a patch, or none is given.
    """

    def __init__(
        self,
        images: list[Tensor],
        patch_size: int,
        sigma_max: float,
        seed: int = 0,
        skew: float = 1.0,
        names: Sequence[str] | None = None,
    ):
        if not images:
            raise ValueError("images is empty: at least one training image is needed.")
        for i, image in enumerate(images):
            if min(image.shape[-2:]) < patch_size:
                name = f"Image {i}" if names is None else names[i]
                raise ValueError(
                    f"{name} has size {tuple(image.shape[-2:])}, smaller than "
                    f"patch_size={patch_size}. Remove it or choose a smaller "
                    "patch_size."
                )
        self.images, self.patch_size = images, patch_size
        self.sigma_max, self.seed, self.skew = sigma_max, seed, skew

    def batch(self, index: int, size: int) -> Problems:
        """Returns batch number ``index`` with ``size`` problems, on the CPU."""
        rng = numbered_generator(self.seed, index)
        x = torch.stack([as_float(self._patch(rng)) for _ in range(size)])
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


def fingerprint(images: list[Tensor]) -> str:
    """Tells lists of images apart: their number, and a checksum of what they hold."""
    total = 0
    for image in images:
        total = crc32(str(tuple(image.shape)).encode(), total)
        total = crc32(image.contiguous().numpy().data, total)
    return f"{len(images)} images, checksum {total:08x}"


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
