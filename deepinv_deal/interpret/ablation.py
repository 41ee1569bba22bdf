r"""Models with a part taken out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepinv_deal.interpret._models import (
    AttentiveModel,
    analysis_operator,
    attentive,
    attentive_prior,
)
from deepinv_deal.priors import AttentiveQuadratic, AttentiveQuadraticPrior


def without_mask(model: Any) -> AttentiveModel:
    r"""
    Returns a copy of a model whose mask is 1 everywhere.

    What remains of DEAL is linear, the same smoothing everywhere:

    .. math::
        \hat x = \underset{x}{\arg\min} \; \tfrac12 \|A x - y\|_2^2 + \tfrac{\lambda}{2}
        \|W x\|_2^2.

    The learned :math:`\lambda` was meant for a mask: give another ``lambda_reg``, or
    :func:`deepinv_deal.tune` it, before comparing.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import without_mask
    >>> model = without_mask(DEAL(pretrained=None, num_filters=8))
    >>> _, info = model(torch.rand(1, 1, 16, 17), sigma=0.1, return_info=True)
    >>> float(info.mask.min()), float(info.mask.max())
    (1.0, 1.0)

    :param object model: :class:`deepinv_deal.DEAL`, :class:`deepinv_deal.SAFI` or
        :class:`deepinv_deal.MMR`. Not changed.
    :return: a model of the same class; that of MMR has no energy.
    :raises TypeError: for a model without mask.
    """
    return _with_mask_rule(model, torch.ones_like)


def with_filters(model: Any, indices: Sequence[int]) -> AttentiveModel:
    r"""
    Returns a copy of a model that uses only some of its filters.

    The masks of the others are set to zero. Nothing is trained again, and the norm of
    :math:`W` stays: this tells what filters do in this model, not what a smaller model
    could do.

    :param object model: as for :func:`without_mask`.
    :param list indices: filters to keep, for example the strongest ones.
    :return: a model of the same class.
    :raises IndexError: for a filter that does not exist.
    """
    number = analysis_operator(model).out_channels
    if not all(0 <= i < number for i in indices):
        raise IndexError(
            f"indices must lie between 0 and {number - 1}, got {list(indices)}."
        )
    keep = torch.zeros(number, 1, 1)
    keep[list(indices)] = 1.0
    return _with_mask_rule(model, lambda mask: mask * keep.to(mask))


#: What to make of the masks ``(B, N, H, W)``.
MaskRule = Callable[[Tensor], Tensor]


def _with_mask_rule(model: Any, rule: MaskRule) -> AttentiveModel:
    changed = copy.deepcopy(attentive(model))
    prior: Any = attentive_prior(changed)
    if isinstance(prior, AttentiveQuadraticPrior):
        changed.prior = _ChangedPrior(prior, rule)
    else:
        name = "mask_network" if hasattr(prior, "mask_network") else "potential"
        setattr(prior, name, _ChangedNetwork(getattr(prior, name), rule))
    return changed


class _ChangedPrior(AttentiveQuadraticPrior):
    """A prior of whose masks something else is made."""

    def __init__(self, prior: AttentiveQuadraticPrior, rule: MaskRule):
        super().__init__(prior.in_channels)
        self.unchanged, self.rule, self.kappa = prior, rule, prior.kappa

    def regularizer(self, sigma: Tensor) -> AttentiveQuadratic:
        """Returns the filters, and the changed mask as a function."""
        regularizer = self.unchanged.regularizer(sigma)
        attention = _ChangedMask(regularizer.attention, self.rule)
        # A rule may look at the whole image.
        return replace(regularizer, attention=attention, reach=None)


class _ChangedNetwork(nn.Module):
    """A mask network of which something else is made."""

    def __init__(self, network: nn.Module, rule: MaskRule):
        super().__init__()
        self.network, self.rule = network, rule

    def bind(self, *arguments: Any) -> Any:
        """Fixes the weights."""
        bound = self.network.bind(*arguments)  # type: ignore[operator]
        return _ChangedMask(bound, self.rule)


@dataclass(frozen=True)
class _ChangedMask:
    bound: Callable[..., Tensor]
    rule: MaskRule

    def __call__(self, *arguments: Tensor) -> Tensor:
        return self.rule(self.bound(*arguments))
