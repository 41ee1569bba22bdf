r"""What the mask hides from the regularizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepinv_deal.interpret._figures import TITLE, largest, new_figure, show
from deepinv_deal.interpret._models import attentive_prior
from deepinv_deal.priors import AttentiveL1Prior

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MaskedResponses:
    r"""
    Filter responses of an image before and after the mask.

    :param torch.Tensor response: :math:`W x`, ``(B, N, H, W)``.
    :param torch.Tensor mask: :math:`m(x)`, ``(B, N, H, W)``, values in [0, 1].
    """

    response: Tensor
    mask: Tensor

    @property
    def masked(self) -> Tensor:
        r"""What is penalised: :math:`m(x) \odot W x`, ``(B, N, H, W)``."""
        return self.mask * self.response

    @property
    def saved(self) -> Tensor:
        r"""
        Share of the energy of each filter's response that the mask hides, ``(B, N)``.

        :math:`1 - \|m_c \odot W_c x\|^2 / \|W_c x\|^2`.
        """
        before = self.response.square().sum((-2, -1))
        after = self.masked.square().sum((-2, -1))
        return 1 - after / before.where(before > 0, 1)


@torch.no_grad()
def masked_responses(
    model: Any, x: Tensor, sigma: float | Tensor | None = None
) -> MaskedResponses:
    r"""
    Returns filter responses, masks and masked responses of an image.

    At a solution the mask is small where a filter responds to structure, so that edges
    and texture cost little (:footcite:t:`pourya2025dealing`, Figs. 7 and 16).

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import masked_responses
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> found = masked_responses(model, torch.rand(2, 1, 16, 17), sigma=0.1)
    >>> found.masked.shape, found.saved.shape
    (torch.Size([2, 8, 16, 17]), torch.Size([2, 8]))

    :param object model: :class:`deepinv_deal.DEAL`, :class:`deepinv_deal.SAFI` or
        :class:`deepinv_deal.MMR`.
    :param torch.Tensor x: images ``(B, C, H, W)``, values about [0, 1].
    :param float, torch.Tensor sigma: noise level of the model in units of the image;
        needed by DEAL only.
    :return: (:class:`MaskedResponses`)
    :raises ValueError: if the noise level is missing.
    """
    prior = attentive_prior(model)
    if x.ndim != 4 or x.shape[1] != prior.in_channels:
        raise ValueError(
            f"x must be images (B, {prior.in_channels}, H, W), got shape "
            f"{tuple(x.shape)}. Of a volume give slices; info.mask of a "
            "reconstruction holds its masks."
        )
    if isinstance(prior, AttentiveL1Prior):
        bound = prior.bind()
        response = bound.analyse(x)
        return MaskedResponses(response, bound.mask(x, response))
    if sigma is None:
        raise ValueError("sigma is missing: the mask depends on the noise level.")
    regularizer = prior.bind(sigma, x)
    return MaskedResponses(regularizer.analyse(x), regularizer.mask(x))


def plot_masked_responses(
    responses: MaskedResponses,
    filters: Tensor,
    indices: Sequence[int] | None = None,
    x: Tensor | None = None,
) -> Figure:
    """
    Draws, for some filters: kernel, response, mask, masked response.

    Both responses are moduli and share one gray scale, so that what the mask hides is
    seen to vanish.

    :param MaskedResponses responses: from :func:`masked_responses`; the first sample is
        drawn.
    :param torch.Tensor filters: ``(N, C, n, n)``, from :func:`effective_filters`.
    :param list indices: which filters; ``None``: the four whose responses lose most
        energy to the mask.
    :param torch.Tensor x: the image ``(1, C, H, W)``, drawn beside the kernels if
        given.
    :return: the figure.
    """
    before, after = responses.response[0].abs(), responses.masked[0].abs()
    if indices is None:
        lost = (before.square() - after.square()).sum((-2, -1))
        indices = lost.argsort(descending=True)[:4].tolist()
    first = int(x is not None)
    names = ["image"] * first + [
        "filter",
        "response $|w_c * x|$",
        "mask $m_c(x)$",
        "masked response $m_c |w_c * x|$",
    ]
    figure = new_figure(2.45 * len(names) + 0.5, 2.5 * len(indices) + 0.4)
    grid = figure.subplots(len(indices), len(names), squeeze=False)
    for row, (axes, c) in enumerate(zip(grid, indices, strict=True)):
        titles = names if row == 0 else [""] * len(names)
        if x is not None:
            show(axes[0], x[0], titles[0])
            if row:
                axes[0].set_visible(False)
        kernel = filters[c].mean(0)
        top = float(before[c].flatten().quantile(0.99)) or 1.0
        peak = largest(kernel)
        show(axes[first], kernel, titles[first], limits=(-peak, peak))
        axes[first].set_ylabel(f"filter {c}", fontsize=TITLE)
        show(axes[first + 1], before[c], titles[first + 1], limits=(0, top))
        show(
            axes[first + 2],
            responses.mask[0, c],
            titles[first + 2],
            cmap="magma",
            colorbar=True,
        )
        show(axes[first + 3], after[c], titles[first + 3], limits=(0, top))
        axes[first + 3].set_xlabel(
            f"{float(responses.saved[0, c]):.0%} of the energy hidden"
        )
    return figure
