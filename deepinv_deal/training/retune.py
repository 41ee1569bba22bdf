"""The weight of denoising, chosen anew after a training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deepinv_deal.models import DEAL
from deepinv_deal.priors import AttentiveQuadraticPrior
from deepinv_deal.priors.attentive_quadratic import GRAY_LEVELS
from deepinv_deal.training.data import noisy_crops
from deepinv_deal.tuning import tune


def retune_kappa(
    prior: AttentiveQuadraticPrior,
    images: Sequence[Tensor],
    levels: Sequence[float] = (5, 10, 15, 25, 50),
    *,
    size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> list[float]:
    r"""
    Chooses the weight :math:`\kappa(\sigma)` anew, for the best PSNR on some images.

    In training, :math:`\kappa` follows Jacobian-free gradients of a loss that also asks
    the mask to settle, and ends a little beside its best value. At every given noise
    level, :func:`deepinv_deal.tune` finds the best one, with all other weights as they
    are; the spline is multiplied by the quotients, linearly interpolated between the
    levels and constant beyond them.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.priors import DEALPrior
    >>> from deepinv_deal.training import retune_kappa
    >>> images = [(255 * torch.rand(1, 16, 16)).byte()]
    >>> prior = DEALPrior(num_filters=4)
    >>> len(retune_kappa(prior, images, levels=(10, 25), progress=False))
    2

    :param AttentiveQuadraticPrior prior: trained prior, modified in place.
    :param list images: 8-bit images ``(C, H, W)``, not those of the training.
    :param tuple levels: noise levels, gray levels, increasing.
    :param int size: side of the centre crops that are denoised.
    :param int seed: seed of the noise.
    :param bool progress: show a progress bar; on terminals if ``None``.
    :return: the quotients, one for each level.
    :raises ValueError: without images, or if ``levels`` do not increase from above 0.
    """
    if not images:
        raise ValueError("images must hold at least one image.")
    if not levels or min(levels) <= 0 or list(levels) != sorted(set(levels)):
        raise ValueError(
            f"levels must be positive and increasing, got {tuple(levels)}."
        )
    coefficients = prior.kappa.coefficients
    model = DEAL(pretrained=None, prior=prior, warn=False, scale=None)
    sigmas = [level / GRAY_LEVELS for level in levels]
    problems = noisy_crops(images, sigmas, size, seed)
    factors = []
    silent = None if progress is None else not progress
    for sigma, pairs in tqdm(problems, desc="kappa", unit="level", disable=silent):
        pairs = [(x.to(coefficients), y.to(coefficients)) for x, y in pairs]
        own = float(prior.default_lambda(sigma, pairs[0][0]).detach())
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a search may end early
            found = tune(
                model,
                None,
                pairs,
                sigma=sigma,
                lambda_reg=own,
                spread=1.08,
                precision=1.04,
                max_trials=6,
                progress=False,
            )
        factors.append(found.lambda_reg / own)
    with torch.no_grad():
        by_knot = np.interp(prior.kappa.knots.numpy(), levels, factors)
        coefficients.mul_(torch.from_numpy(by_knot).to(coefficients))
    return factors
