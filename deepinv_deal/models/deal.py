"""DEAL, deep attentive least squares: reconstruction model and denoiser in one."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from deepinv_deal.models.base import ReconstructionModel, checked_prior
from deepinv_deal.operators.multi_conv import Normalization
from deepinv_deal.priors import AttentiveQuadraticPrior, DEALPrior
from deepinv_deal.problems import DataTerm
from deepinv_deal.weights import load

#: Noise level of the model for inverse problems, as published.
DEFAULT_SIGMA = 15 / 255

#: Weight for inverse problems if none is given.
DEFAULT_LAMBDA = 1.0


class DEAL(ReconstructionModel):
    r"""
    Deep attentive least squares.

    The method is that of :footcite:t:`pourya2025dealing`. The reconstruction is a fixed
    point :math:`\hat x = T(\hat x)` of

    .. math::
        T(z) = \underset{x}{\arg\min} \; \tfrac{1}{2} \|A x - y\|_2^2
        + \tfrac{\lambda}{2} \|M_\sigma(z) \odot W x\|_2^2,

    where :math:`W` are learned filters and :math:`M_\sigma` a small network that lowers
    the penalty where the image has structure. Each update is one linear system, solved
    by conjugate gradients. There is no energy that :math:`\hat x` minimises.

    The calls are those of every :class:`ReconstructionModel`, which also says what
    noise level, weight, intensity and complex images mean. DEAL's weights serve all
    noise levels, its default level for inverse problems is ``15/255`` and its default
    weight 1, which should be tuned on a few images.

    **Accuracy.** The iteration stops when the forces of data and regularizer balance:

    .. math::
        \| A^{\top} (y - A \hat x) - \lambda G_\sigma(\hat x) \|
        \leq \mathrm{rtol} \, \| \lambda G_\sigma(\hat x) \|, \qquad
        G_\sigma(x) = W^{\top} \big( M_\sigma(x)^2 \odot W x \big)

    (the right-hand side is at least :math:`10^{-4} \, \mathrm{rtol} \,
    \|A^{\top} y\|`). A residual that is small against :math:`A^{\top} y` alone would
    mean little where much was not measured.

    **Bounds.** Without ``bounds`` the result is never clipped. With them, the problems
    with frozen masks have them, too, and are solved by ADMM.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> x_hat, info = model(torch.rand(2, 1, 16, 17), sigma=0.1, return_info=True)
    >>> x_hat.shape, info.converged
    (torch.Size([2, 1, 16, 17]), tensor([True, True]))

    :param int in_channels: image channels, 1 (gray) or 3 (colour); 1 if ``None``,
        unless the weights say otherwise.
    :param int num_filters: number of filters for ``pretrained=None``.
    :param str normalization: norm rule of the filters for ``pretrained=None``,
        ``"published"`` if ``None``. Weights decide if given.
    :param AttentiveQuadraticPrior prior: use this prior instead of ``pretrained``.
    :param str pretrained: ``"bundled"`` (the default: ``"deal_gray"``, or
        ``"deal_color"`` if ``in_channels=3``), a bundled name, ``"download"`` (official
        weights, needs network), the path of a ``.safetensors`` or authors' ``.pth``
        file, or ``None`` for random weights.
    :param object settings: see :class:`ReconstructionModel`.
    :raises ValueError: for bad settings, damaged or unknown weights.
    :raises FileNotFoundError: for a missing weights file.
    """

    prior: AttentiveQuadraticPrior

    def __init__(
        self,
        in_channels: int | None = None,
        num_filters: int | None = None,
        *,
        normalization: Normalization | None = None,
        prior: AttentiveQuadraticPrior | None = None,
        pretrained: str | os.PathLike[str] | None = "bundled",
        **settings: Any,
    ):
        if prior is None and pretrained is None:
            prior = DEALPrior(
                in_channels or 1, num_filters or 128, normalization or "published"
            )
        elif prior is None and pretrained is not None:
            prior = load(pretrained, DEALPrior, in_channels=in_channels or 1)
        prior = checked_prior(prior, AttentiveQuadraticPrior)
        for name, asked in (
            ("in_channels", in_channels),
            ("num_filters", num_filters),
            ("normalization", normalization),
        ):
            has = getattr(prior, name, None)
            if asked is not None and asked != has:
                raise ValueError(
                    f"{name}={asked} was asked for, but the weights "
                    f"{str(pretrained)!r} have {name}={has}. Leave {name} out, or give "
                    "pretrained=None or other weights."
                )
        super().__init__(prior, **settings)

    def _learned_weight(self, data: DataTerm) -> float | None:
        return None if data.identity else DEFAULT_LAMBDA

    def _default_level(self, data: DataTerm) -> Tensor | None:
        if data.identity:
            raise ValueError(
                "sigma is missing: give the noise level, in units of the image, as "
                "model(y, sigma=...), or sigma='estimate'."
            )
        return torch.full_like(data.b[:, 0, 0, 0], DEFAULT_SIGMA)
