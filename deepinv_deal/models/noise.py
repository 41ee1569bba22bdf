"""The noise level of the data to denoise, where it has to be estimated."""

from __future__ import annotations

import torch
from deepinv.models.noise_level_estimation import PatchCovarianceNoiseEstimator
from torch import Tensor

from deepinv_deal._batch import expand, quantile

#: On images with a smaller side, deepinv's estimate of the noise is useless. On 40 x 40
#: pixels it is up to 40 % too low, on 64 x 64 up to 10 %.
SMALLEST_ESTIMATE = 40

#: Channels are estimated together if there are as many patches for each entry of one;
#: with fewer, the estimate would be lower than that of each channel alone.
PATCHES_PER_ENTRY = 8

#: Pixels that are this many times farther from the median than this quantile of them
#: are outliers, as hot pixels of a camera.
OUTLIER_QUANTILE, OUTLIER_REACH = 0.995, 3.0


def estimated_level(b: Tensor) -> Tensor:
    """
    Estimates the noise levels of some images, ``(B,)``.

    :param torch.Tensor b: noisy images ``(B, C, H, W)``.
    :raises ValueError: if they are too small, or have no noise.
    """
    if min(b.shape[-2:]) < SMALLEST_ESTIMATE:
        raise ValueError(
            "sigma='estimate': the noise level cannot be estimated from images of "
            f"{b.shape[-2]} x {b.shape[-1]} pixels, which are fewer than "
            f"{SMALLEST_ESTIMATE} on a side. Give it as a number."
        )
    b = _without_outliers(b)
    estimator = PatchCovarianceNoiseEstimator()
    # It takes the covariance of patches of 8 x 8 pixels, 3 pixels apart. Those of all
    # channels together have more entries, and need more patches, than those of one.
    height, width = ((n - 8) // 3 + 1 for n in b.shape[-2:])
    if height * width >= PATCHES_PER_ENTRY * 64 * b.shape[1]:
        levels = estimator(b.float())
    else:
        levels = estimator(b.float().flatten(0, 1)[:, None]).view(b.shape[:2]).mean(1)
    if not levels.isfinite().all():
        raise ValueError(
            "sigma='estimate': the noise level cannot be estimated from these images, "
            "which may have no noise. Give it as a number."
        )
    return levels.to(b.dtype)


def _without_outliers(b: Tensor) -> Tensor:
    """
    Clips pixels far beyond all but a few of them: hot ones are no noise of this kind.
    """
    quantiles = (1 - OUTLIER_QUANTILE, 0.5, OUTLIER_QUANTILE)
    low, middle, high = (quantile(b, q) for q in quantiles)
    reach = OUTLIER_REACH * torch.maximum(high - middle, middle - low)
    low, high = (expand(v, b) for v in (middle - reach, middle + reach))
    return torch.minimum(torch.maximum(b, low), high)
