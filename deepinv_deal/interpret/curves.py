r"""The learned one-dimensional functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepinv_deal.interpret._models import attentive_prior
from deepinv_deal.priors import DEALPrior
from deepinv_deal.priors.attentive_quadratic import GRAY_LEVELS
from deepinv_deal.priors.deal import MASK_MAX, MASK_MIN
from deepinv_deal.splines import LinearSpline


class Curve(NamedTuple):
    """
    One learned spline, or a family of them.

    :param str name: its place in the model.
    :param torch.Tensor t: arguments, the knots, ``(K,)``.
    :param torch.Tensor values: values, one row per spline, ``(n, K)``.
    """

    name: str
    t: Tensor
    values: Tensor


#: Names of DEAL's splines as in the paper.
PAPER_NAMES = {
    "mask_network.phi1": "$\\varphi_1$\nfirst activation of the mask",
    "mask_network.phi2": "$\\varphi_2$\nsecond activation of the mask",
    "mask_network.phi3": "$\\varphi_3$\nthird: strong signals, small mask",
    "mask_network.scaling": "$s_c(\\sigma)$: log scale of the signal\n"
    "over $\\sigma$ in gray levels",
    "kappa": "$\\lambda = \\kappa(\\sigma)$: weight of denoising\n"
    "over $\\sigma$ in gray levels",
}


@torch.no_grad()
def learned_splines(model: Any) -> list[Curve]:
    r"""
    Returns all learned splines of a model, with their constraints met.

    Those of DEAL are the activations :math:`\varphi_1, \varphi_2, \varphi_3` of the
    mask network, the scalings :math:`s_c(\sigma)` and the weight
    :math:`\kappa(\sigma)` (:footcite:t:`pourya2025dealing`, Fig. 15), the last two with
    :math:`\sigma` in gray levels, 0 to 255.

    |sep|

    :Example:

    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import learned_splines
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> [tuple(curve.values.shape) for curve in learned_splines(model)]
    [(1, 31), (1, 31), (1, 31), (8, 14), (1, 53)]

    :param object model: :class:`deepinv_deal.DEAL`, :class:`deepinv_deal.SAFI` or
        :class:`deepinv_deal.MMR`.
    :return: list of :class:`Curve`, in the order of the model.
    """
    curves = []
    for name, module in attentive_prior(model).named_modules():
        if isinstance(module, LinearSpline):
            values = module.constrained_coefficients().detach()
            t = torch.linspace(
                module.x_min, module.x_max, values.shape[1], dtype=values.dtype
            )
            curves.append(Curve(PAPER_NAMES.get(name, name), t.to(values), values))
    return curves


@torch.no_grad()
def mask_curves(
    model: Any,
    sigmas: Sequence[float],
    *,
    t_max: float | None = None,
    num_points: int = 601,
) -> list[Curve]:
    r"""
    Returns the last activation of DEAL's mask network for some noise levels.

    .. math::
        \phi_{\sigma, c}(t) = \mathrm{clip}\big( \varphi_3(\alpha_c(\sigma) |t|), 0.01,
        1 \big), \qquad \alpha_c(\sigma) = \frac{e^{s_c(\sigma)}}{\sigma + 10^{-5}}

    They resemble threshold functions: a strong signal gives a small mask, and the more
    noise, the stronger it must be (:footcite:t:`pourya2025dealing`, Eq. (10), Fig. 15).

    |sep|

    :Example:

    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import mask_curves
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> [curve.values.shape for curve in mask_curves(model, [0.05, 0.1])]
    [torch.Size([8, 601]), torch.Size([8, 601])]

    :param object model: :class:`deepinv_deal.DEAL`.
    :param list sigmas: noise levels in units of the image, [0, 1].
    :param float t_max: largest argument; ``None``: the end of the knots of most filters
        at the largest noise level.
    :param int num_points: number of arguments.
    :return: one :class:`Curve` per noise level, one row per filter.
    :raises TypeError: for another model.
    """
    prior = attentive_prior(model)
    if not isinstance(prior, DEALPrior):
        raise TypeError(
            f"mask_curves needs DEAL, got {type(model).__name__}; see learned_splines."
        )
    like = prior.W.weight[0]
    network = prior.mask_network
    levels = torch.tensor([GRAY_LEVELS * sigma for sigma in sigmas]).to(like)
    bound = network.bind(levels)
    if t_max is None:
        t_max = network.phi3.x_max / float(bound.alpha[:, :, 0, 0].amin(0).median())
    t = torch.linspace(0, t_max, num_points, dtype=like.dtype, device=like.device)
    curves = []
    for sigma, alpha in zip(sigmas, bound.alpha[..., 0], strict=True):
        values = bound.phi[2]((alpha * t)[None]).clamp(MASK_MIN, MASK_MAX)[0]
        curves.append(Curve(rf"$\sigma$ = {GRAY_LEVELS * sigma:.3g}/255", t, values))
    return curves
