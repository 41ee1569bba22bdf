"""The published protocols: how images are cropped, measured and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from deepinv.physics import (
    MRI,
    Blur,
    Denoising,
    Downsampling,
    GaussianNoise,
    LinearPhysics,
    MultiCoilMRI,
)
from deepinv.physics.functional import gaussian_blur
from deepinv.physics.generator import MotionBlurGenerator
from torch import Tensor

from deepinv_deal._batch import central
from deepinv_deal.files import as_float, read_array

#: Standard deviations of the blurs before downsampling.
BLURS = (0.7, 1.2, 1.6, 2.0)

#: Noise of the published MRI protocol, for each of real and imaginary part.
MRI_NOISE = 0.002


@dataclass(frozen=True)
class Condition:
    """
    One operator and noise level.

    :param str setting: what tells it from the other operators of the task.
    :param float noise: noise level in gray levels.
    :param Callable physics: makes the operator for an image ``(1, C, H, W)``.
    :param float lambda_reg: weight; the published one of DEAL unless ``tuned``;
        ``None`` if there is none, and for denoising, where it is learned.
    :param bool tuned: whether ``lambda_reg`` was chosen by ``tune_task``.
    :param float beta: coupling of a dictionary that was chosen with it.
    """

    setting: str
    noise: float
    physics: Callable[[Tensor], LinearPhysics]
    lambda_reg: float | None = None
    tuned: bool = False
    beta: float | None = None

    def measure(self, x: Tensor) -> tuple[Tensor, LinearPhysics]:
        """
        Returns the measurements of one image, with always the same noise, and physics.

        Noise is drawn as ``np.random.seed(0); np.random.normal(0, sigma, shape)``
        without the batch dimension and without touching NumPy's global state; nothing
        is clipped.
        """
        physics = self.physics(x)
        y = physics.A(x)
        # In MRI the adjoint ignores noise where nothing is sampled.
        noise = np.random.RandomState(0).normal(0, self.noise / 255, y.shape[1:])
        return y + torch.from_numpy(noise).to(y), physics


@dataclass(frozen=True)
class Task:
    """
    A published protocol.

    :param str name: name of the task.
    :param tuple conditions: what is measured of every image.
    :param float sigma: noise level of the model in gray levels; ``None`` for denoising.
    :param int side: images are cropped to their central square of this side.
    :param int multiple: then, to multiples of this many pixels, at the end.
    :param bool mri: images are divided by their maximum and have an imaginary part,
        which is zero; the published model knows that it is (``complex_mode="real"``).
    :param int compared: PSNR and SSIM are those of a central square of this side.
    """

    name: str
    conditions: tuple[Condition, ...]
    sigma: float | None = 15.0
    side: int | None = None
    multiple: int = 1
    mri: bool = False
    compared: int | None = None

    def ground_truth(self, image: Tensor) -> Tensor:
        """
        Turns an image ``(C, H, W)``, 8 bit or in [0, 1], into what is to be
        reconstructed.
        """
        x = as_float(image[None]).float()
        if self.side is not None:
            x = central(x, self.side)
        height, width = (n - n % self.multiple for n in x.shape[-2:])
        x = x[..., :height, :width]
        if self.mri:
            x = x / x.max().clamp_min(1e-12)
            x = torch.cat([x, torch.zeros_like(x)], 1)
        return x

    def compare(self, x: Tensor) -> Tensor:
        """Returns what is compared of an estimate or the ground truth."""
        x = x[:, :1] if self.mri else x
        return x if self.compared is None else central(x, self.compared)


def denoising(noise: Sequence[float] | None = None) -> Task:
    """Denoising: BSD68 gray, or the central 256 x 256 pixels of CBSD68."""
    return Task(
        "denoising",
        tuple(
            Condition("", s, lambda _, s=s: Denoising(GaussianNoise(s / 255)))  # type: ignore[misc]
            for s in noise or (5, 15, 25)
        ),
        sigma=None,
    )


def super_resolution(factor: int, noise: Sequence[float] | None = None) -> Task:
    """
    Super-resolution: circular Gaussian blur, every ``factor``-th pixel, noise.

    :param int factor: 2, 3, or 4, for which no weights were published.
    :param tuple noise: noise levels in gray levels.
    """

    def physics(x: Tensor, std: float) -> LinearPhysics:
        kernel = gaussian_blur(psf_size=(25, 25), sigma=(std, std))
        return Downsampling(
            tuple(x.shape[1:]), filter=kernel, factor=factor, padding="circular"
        )

    published = {2.55: 0.28, 7.65: 2.5, 12.75: 5.5}
    return Task(
        f"super-resolution-x{factor}",
        tuple(
            # Between the published levels, the rule of the authors' code.
            Condition(
                f"blur {std}",
                s,
                partial(physics, std=std),
                published.get(s, 0.1 + 0.035 * s**2) if factor < 4 else None,
            )
            for s in noise or published
            for std in BLURS
        ),
        side=256,
        multiple=factor,
    )


def deblurring(
    kernels: Sequence[str] | None = None, noise: Sequence[float] | None = None
) -> Task:
    """
    Deblurring: circular convolution with given kernels, noise.

    The published kernels are two of Levin's, of 17 x 17 and 27 x 27 pixels, which are
    not part of this package.

    :param list kernels: see :func:`make_kernel`.
    :param tuple noise: noise levels in gray levels.
    """
    published = {2.55: 0.5, 7.65: 2.5}
    made = [make_kernel(text) for text in kernels or ("gaussian:1.6", "motion:17")]
    return Task(
        "deblurring",
        tuple(
            Condition(
                label,
                s,
                lambda x, k=kernel: Blur(k.to(x), padding="circular"),  # type: ignore[misc]
                published.get(s),
            )
            for s in noise or published
            for label, kernel in made
        ),
    )


def mri(coils: int, acceleration: int, noise: Sequence[float] | None = None) -> Task:
    """
    Cartesian MRI: Fourier transform, random lines, noise, on the whole field of view.

    The published multi-coil data have maps estimated by ESPIRiT; here they are
    simulated by :func:`birdcage_maps`.

    :param int coils: number of coils; 1 for no sensitivity maps.
    :param int acceleration: 4 or 8; the centre is 8 % of the lines below 8, else 4 %.
    :param tuple noise: noise levels of real and imaginary part, in gray levels.
    """

    def physics(x: Tensor) -> LinearPhysics:
        size = (int(x.shape[-2]), int(x.shape[-1]))
        mask = line_mask(size, acceleration, 0.08 if acceleration < 8 else 0.04)
        if coils == 1:
            return MRI(mask=mask, img_size=size)
        return MultiCoilMRI(
            mask=mask, coil_maps=birdcage_maps(coils, size), img_size=size
        )

    kind = "single" if coils == 1 else "multi"
    levels = noise or (round(255 * MRI_NOISE, 2),)
    return Task(
        f"mri-{kind}-coil-{acceleration}x",
        tuple(
            Condition("" if coils == 1 else f"{coils} coils", s, physics)
            for s in levels
        ),
        mri=True,
        compared=320,
    )


#: Makers of the tasks, by name; each takes ``noise``, and deblurring ``kernels`` too.
TASKS: dict[str, Callable[..., Task]] = {
    "denoising": denoising,
    "super-resolution-x2": partial(super_resolution, 2),
    "super-resolution-x3": partial(super_resolution, 3),
    "super-resolution-x4": partial(super_resolution, 4),
    "deblurring": deblurring,
    "mri-single-coil-4x": partial(mri, 1, 4),
    "mri-single-coil-8x": partial(mri, 1, 8),
    "mri-multi-coil-8x": partial(mri, 15, 8),
}


def make_kernel(text: str) -> tuple[str, Tensor]:
    """
    Returns name and values ``(1, 1, H, W)`` of a blur kernel, which sum to one.

    :param str text: ``gaussian:STD``, ``motion:SIZE``, ``square:SIZE``, or a file as in
        :func:`deepinv_deal.files.read_array`.
    :raises ValueError: for other words, or values that are no kernel.
    """
    kind, _, value = text.partition(":")
    if kind in ("gaussian", "motion", "square"):
        try:
            number = float(value)
            whole = kind == "gaussian" or number.is_integer()
            if not (0 < number < 1000 and whole):
                raise ValueError
        except ValueError as error:
            what = "positive number" if kind == "gaussian" else "number of pixels"
            raise ValueError(
                f"Kernel {text!r}: a {what} must follow, as in {kind}:2."
            ) from error
        size = round(number)
        if kind == "gaussian":
            kernel = gaussian_blur(sigma=(number, number))
        elif kind == "square":
            kernel = torch.ones(1, 1, size, size)
        else:
            rng = torch.Generator().manual_seed(0)
            kernel = MotionBlurGenerator((size, size), rng=rng).step()["filter"]
        name = text
    else:
        array = read_array(text)
        if array.ndim == 3 and array.shape[-1] in (3, 4):  # a colour picture
            array = array[..., :3].mean(-1)
        if array.ndim != 2 or not np.isrealobj(array) or not np.isfinite(array).all():
            raise ValueError(
                f"Kernel {text!r} must be a real matrix, got shape {array.shape}, "
                f"{array.dtype}."
            )
        kernel = torch.from_numpy(array.astype(np.float32))[None, None]
        name = Path(text).name
    if not float(kernel.sum()) > 0:
        raise ValueError(f"Kernel {text!r} must have a positive sum.")
    height, width = kernel.shape[-2:]
    return f"{name} {height}x{width}", kernel / kernel.sum()


def line_mask(
    size: tuple[int, int], acceleration: float, center_fraction: float
) -> Tensor:
    """
    Draws the vertical lines of fastMRI's ``RandomMaskFunc``, always the same.

    :param tuple size: height and width.
    :param float acceleration: expected number of lines per line that is kept.
    :param float center_fraction: share of the lines that are kept around the centre.
    :return: mask ``(H, W)``, zero frequency in the middle.
    """
    width = size[1]
    center = round(width * center_fraction)
    chance = (width / acceleration - center) / (width - center)
    lines = np.random.RandomState(0).uniform(size=width) < chance
    start = (width - center + 1) // 2
    lines[start : start + center] = True
    return torch.from_numpy(lines).float().expand(size).contiguous()


def birdcage_maps(coils: int, size: tuple[int, int], radius: float = 1.5) -> Tensor:
    """
    Simulates coils on a circle around the image, as in a birdcage.

    The sensitivity falls with the inverse distance and turns in phase; at every pixel
    the squares sum to one.

    :param int coils: number of coils.
    :param tuple size: height and width.
    :param float radius: of the circle, in halves of the image's side.
    :return: complex maps ``(N, H, W)``.
    """
    rows, columns = (torch.linspace(-1, 1, n) for n in size)
    angles = 2 * torch.pi * torch.arange(coils) / coils
    dx = columns - radius * torch.cos(angles)[:, None, None]
    dy = rows[:, None] - radius * torch.sin(angles)[:, None, None]
    maps = torch.polar(
        1 / torch.hypot(dx, dy), torch.atan2(dy, dx) - angles[:, None, None]
    )
    return maps / maps.abs().square().sum(0).sqrt()
