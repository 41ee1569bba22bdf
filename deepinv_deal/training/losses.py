"""The training loss of DEAL."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from deepinv_deal.splines import LinearSpline

#: Factor of the logarithm of the errors, which gives it about the same influence beside
#: the other terms as the weighted errors have.
LOG_WEIGHT = 20.0


def mask_drift(mask: Tensor, previous_mask: Tensor) -> Tensor:
    r"""
    Returns :math:`\|m - m_{\mathrm{previous}}\|_2^2 / N_C` of each sample, ``(B,)``.

    This is the second term of Eq. (12) of :footcite:t:`pourya2025dealing`, without its
    weight.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.training import mask_drift
    >>> mask_drift(torch.ones(1, 8, 3, 2), torch.zeros(1, 8, 3, 2))
    tensor([6.])

    :param torch.Tensor mask: mask at an iterate, shape ``(B, N_C, H, W)``.
    :param torch.Tensor previous_mask: mask one iteration earlier.
    """
    return (mask - previous_mask).square().flatten(1).sum(1) / mask.shape[1]


def deal_loss(
    x_hat: Tensor,  # (B, C, H, W)
    x: Tensor,  # (B, C, H, W)
    mask: Tensor,  # (B, N, H, W)
    previous_mask: Tensor,  # (B, N, H, W)
    splines: Iterable[LinearSpline],
    *,
    gamma: float = 1e-4,
    drift: float = 1e-4,
    weights: Tensor | None = None,  # (B,)
    logarithmic: bool = False,
) -> Tensor:
    r"""
    Returns the training loss of DEAL, averaged over the batch.

    This is Eq. (12) of :footcite:t:`pourya2025dealing`, which has
    :math:`\delta = \gamma = 10^{-4}`:

    .. math::
        \|x_K - x\|_2^2 + \frac{\delta}{N_C} \|M(x_K) - M(x_{K-1})\|_2^2
        + \gamma \sum_i \mathrm{TV}^{(2)}(\varphi_i)

    :param torch.Tensor x_hat: reconstruction :math:`x_K`.
    :param torch.Tensor x: ground truth.
    :param torch.Tensor mask: mask at :math:`x_K`.
    :param torch.Tensor previous_mask: mask one iteration earlier.
    :param Iterable splines: splines whose second-order total variation is penalised.
    :param float gamma: weight :math:`\gamma` of the splines' total variation.
    :param float drift: weight :math:`\delta` of the change of the mask.
    :param torch.Tensor weights: weights of the samples' squared errors; ones if
        ``None``.
    :param bool logarithmic: take 20 times the logarithm of each sample's squared error
        instead: its mean is, up to a factor and a constant, the mean PSNR.
    """
    error = (x_hat - x).square().flatten(1).sum(1)
    if logarithmic:
        error = LOG_WEIGHT * error.clamp_min(torch.finfo(error.dtype).tiny).log()
    if weights is not None:
        error = weights * error
    change = mask_drift(mask, previous_mask)
    tv2 = torch.stack([spline.tv2() for spline in splines]).sum()
    return error.mean() + drift * change.mean() + gamma * tv2
