"""The weight of denoising, chosen anew after a training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from deepinv_deal._batch import central
from deepinv_deal.models import DEAL
from deepinv_deal.priors import AttentiveQuadraticPrior
from deepinv_deal.priors.attentive_quadratic import GRAY_LEVELS
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
    clean = [central(image[None], size).to(coefficients) / 255 for image in images]
    factors = []
    silent = None if progress is None else not progress
    for level in tqdm(levels, desc="kappa", unit="level", disable=silent):
        sigma = level / GRAY_LEVELS
        rng = torch.Generator().manual_seed(seed)
        pairs = [
            (x, x + sigma * torch.randn(x.shape, generator=rng).to(x)) for x in clean
        ]
        own = float(prior.default_lambda(sigma, clean[0]).detach())
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
        coefficients.mul_(_interpolated(prior.kappa.knots, levels, factors))
    return factors


def _interpolated(
    at: Tensor, levels: Sequence[float], values: Sequence[float]
) -> Tensor:
    """Linear interpolation, constant beyond the outer levels."""
    x, y = (at.new_tensor(list(v)) for v in (levels, values))
    if len(x) == 1:
        return y.expand_as(at)
    at = at.clamp(x[0], x[-1])
    i = torch.searchsorted(x, at, right=True).clamp(1, len(x) - 1)
    f = (at - x[i - 1]) / (x[i] - x[i - 1])
    return (1 - f) * y[i - 1] + f * y[i]
