r"""Which unit measurements are in: intensity, pedestal, sign, guessed from the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from deepinv_deal._batch import expand, inner, norm, quantile
from deepinv_deal.solvers import conjugate_gradient

if TYPE_CHECKING:
    from deepinv_deal.problems.data_term import DataTerm

#: Intensities that are left alone.
SMALLEST_INTENSITY, LARGEST_INTENSITY = 0.25, 2.5

#: The others are divided by 10^k or 2.5 10^k, the first up to this multiple of 10^k:
#: noise makes the brightest pixels brighter.
LARGEST_ROUND = 1.3

#: How an image is guessed, and the quantile of its absolute values that counts as its
#: intensity. A few hot pixels are no image.
GUESS_RTOL, GUESS_MAX_ITER, GUESS_QUANTILE = 1e-2, 8, 0.999

#: An image is one on a pedestal if what a constant does not explain of the data is less
#: than this, relative to the constant.
PEDESTAL = 0.03

#: Pedestals are multiples of this, relative to the scale of what stands on them.
PEDESTAL_STEP = 1 / 8

#: An image has values beyond zero and one if means over so many pixels squared are, of
#: this share of them: by the margin and three times their noise. Where the image is
#: guessed from other measurements, it may ring, and the margin is larger.
BEYOND_SIDE, BEYOND_QUANTILE, BEYOND_NOISE = 5, 0.02, 3.0
DENOISING_MARGIN, MARGIN = 0.03, 0.15

#: Single pixels beyond this many times the intensity of the others are hot.
HOT = 10.0


@dataclass(frozen=True)
class Unit:
    """
    What was guessed of the unit of the data.

    :param torch.Tensor scale: intensity of the images, ``(B,)``; 1 where it is usual.
    :param torch.Tensor offset: pedestal on which the images stand, ``(B,)``, in the
        unit of the data; ``None``: there is none.
    :param torch.Tensor signed: samples with negative values, boolean, ``(B,)``.
    :param torch.Tensor bright: samples with values above 1 after the division.
    :param int hot: number of pixels of all images that stand out as hot ones.
    """

    scale: Tensor
    offset: Tensor | None
    signed: Tensor
    bright: Tensor
    hot: int


@torch.no_grad()
def guess_unit(data: DataTerm, *, pedestal: bool = True) -> Unit:
    """
    Guesses the unit of the measurements of a data term that has none yet.

    :param DataTerm data: the data term.
    :param bool pedestal: whether real images may stand on a pedestal.
    """
    x = _rough_image(data, data.b)
    size, offset = quantile(x.abs(), GUESS_QUANTILE), None
    # Images of usual intensity have none, which saves an application of the physics.
    may_stand = pedestal and not data.complex_pair
    if may_stand and bool((size > LARGEST_INTENSITY).any()):
        shadow = data.normal(torch.ones_like(x))
        offset = _pedestal(data.b, shadow)
    if offset is not None:
        rest = _rough_image(data, data.b - expand(offset, x) * shadow)
        low, high = quantile(rest, 1 - GUESS_QUANTILE), quantile(rest, GUESS_QUANTILE)
        stands = offset != 0
        size = torch.where(stands, high - low, size)
    scale = torch.tensor([_rung(s) for s in size.tolist()], dtype=x.dtype, device="cpu")
    scale = scale.to(x.device)
    if offset is not None:
        # Round, as the scale is: it does not move with the data then, so that its
        # derivative is zero, as implicit differentiation has it.
        step = PEDESTAL_STEP * scale
        rounded = ((offset + low) / step).floor() * step
        x = torch.where(expand(stands, x), rest - expand(rounded - offset, x), x)
        offset = torch.where(stands, rounded, 0)
    x = x / expand(scale, x)
    side = min(BEYOND_SIDE, *x.shape[-2:])
    margin = DENOISING_MARGIN if data.identity else MARGIN
    margin = margin + BEYOND_NOISE * _rough_noise(x) / side
    means = F.avg_pool2d(x, side, 1)
    signed = quantile(means, BEYOND_QUANTILE) < -margin
    bright = quantile(means, 1 - BEYOND_QUANTILE) > 1 + margin
    # Where the image is guessed from other measurements, they are spread out.
    hot = int((x.abs() > HOT).sum()) if data.identity else 0
    return Unit(scale, offset, signed, bright, hot)


def _rough_image(data: DataTerm, b: Tensor) -> Tensor:
    """
    A few conjugate gradients: not the back-projection itself, which is much darker than
    the image where A blurs, as in tomography.
    """
    if data.H is None:
        return b.detach()
    return conjugate_gradient(
        data.normal,
        b.detach(),
        rtol=GUESS_RTOL,
        max_iter=GUESS_MAX_ITER,
        verify=False,
    ).x


def _pedestal(b: Tensor, shadow: Tensor) -> Tensor | None:
    """
    The constants that explain the right-hand side nearly, zero elsewhere; ``None``:
    nowhere. ``shadow`` is that of the constant 1.
    """
    ones = torch.ones_like(b)
    gain = inner(ones, shadow)
    level = (inner(ones, b) / gain.where(gain > 0, 1)).where(gain > 0, 0)
    rest = norm(b - expand(level, b) * shadow)
    # Usual intensities are left alone, and so are constant images, which have no unit.
    usual = level.abs() <= LARGEST_INTENSITY
    constant = rest <= 1e3 * torch.finfo(b.dtype).eps * norm(b)
    stands = (rest < PEDESTAL * norm(expand(level, b) * shadow)) & ~usual & ~constant
    return level.where(stands, 0) if bool(stands.any()) else None


def _rung(size: float) -> float:
    """The number by which images of this intensity are divided."""
    if not 0 < size < math.inf or SMALLEST_INTENSITY < size <= LARGEST_INTENSITY:
        return 1.0
    power = math.floor(math.log10(size / LARGEST_ROUND)) + 1
    half = 0.25 * 10.0**power
    # 10^(power - 1) < size / LARGEST_ROUND <= 10^power.
    return half if size <= 1.6 * half else 10.0**power


def _rough_noise(x: Tensor) -> Tensor:
    """
    Returns a rough, robust noise level of images ``(B, C, H, W)``, ``(B,)``: the median
    of the mixed second differences.
    """
    if min(x.shape[-2:]) < 2:
        return x.new_zeros(len(x))
    d = x[..., 1:, 1:] - x[..., :-1, 1:] - x[..., 1:, :-1] + x[..., :-1, :-1]
    return d.abs().flatten(1).median(1).values / (2 * 0.6745)
