r"""What the learned filters look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from deepinv_deal.interpret._figures import (
    finish,
    largest,
    new_figure,
    show,
    show_tiles,
)
from deepinv_deal.interpret._models import analysis_operator, attentive_prior
from deepinv_deal.operators import MultiConvOperator
from deepinv_deal.priors import DEALPrior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Branch = Literal["regularizer", "mask"]


@torch.no_grad()
def effective_filters(model: Any, branch: Branch = "regularizer") -> Tensor:
    r"""
    Returns the kernels of the filters :math:`w_c`, all layers of :math:`W` merged.

    A multi-convolution without anything between its layers is one bank of filters with
    larger kernels: :math:`(W x)_c = w_c * x` away from the border. Those of DEAL are
    finite differences of all orders, directions and scales
    (:footcite:t:`pourya2025dealing`, Figs. 13 and 14).

    |sep|

    :Example:

    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import effective_filters
    >>> effective_filters(DEAL(pretrained=None, num_filters=8)).shape
    torch.Size([8, 1, 25, 25])

    :param object model: :class:`deepinv_deal.DEAL`, :class:`deepinv_deal.SAFI` or
        :class:`deepinv_deal.MMR`.
    :param str branch: ``"regularizer"`` for :math:`W`, divided by its norm, or
        ``"mask"`` for the filters of DEAL's mask network.
    :return: shape ``(N, C, n, n)``.
    :raises TypeError: for a model without such filters.
    """
    operator = _operator(model, branch)
    reach = operator.reach
    responses = operator.impulse_responses()[..., reach : 3 * reach + 1, reach:]
    return responses[..., : 2 * reach + 1].transpose(0, 1)


@torch.no_grad()
def normal_response(model: Any, size: int = 128) -> tuple[Tensor, Tensor]:
    r"""
    Returns impulse response and spectrum of :math:`W^{\top} W`.

    With a constant mask, :math:`\lambda W^{\top} W` is what the regularizer does to an
    image. The spectrum vanishes at frequency zero, so constant images are free, and its
    largest value is :math:`\|W\|_2^2 \approx 1`
    (:footcite:t:`pourya2025dealing`, Fig. 6).

    |sep|

    :Example:

    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import normal_response
    >>> impulse, spectrum = normal_response(DEAL(pretrained=None, num_filters=8))
    >>> impulse.shape, spectrum.shape, round(float(spectrum.max()), 1)
    (torch.Size([49, 49]), torch.Size([128, 128]), 1.0)

    :param object model: :class:`deepinv_deal.DEAL`, :class:`deepinv_deal.SAFI` or
        :class:`deepinv_deal.MMR`.
    :param int size: number of frequencies per direction.
    :return: the response to a Dirac ``(n, n)``, and the spectrum ``(size, size)``,
        frequency zero in the middle. With colour images, both are the mean over the
        channels of the diagonal entries.
    """
    kernel = _operator(model, "regularizer").normal_kernel()
    impulse = kernel.diagonal().mean(-1)
    spectrum = torch.fft.fft2(impulse, s=(size, size)).abs()
    return impulse, torch.fft.fftshift(spectrum)


def _operator(model: Any, branch: str) -> MultiConvOperator:
    prior = attentive_prior(model)
    if branch == "mask":
        if not isinstance(prior, DEALPrior):
            raise TypeError(
                f"branch='mask': the mask of {type(model).__name__} has no "
                "multi-convolution of its own. Use branch='regularizer'."
            )
        return prior.mask_network.W.operator()
    if branch != "regularizer":
        raise ValueError(f"branch must be 'regularizer' or 'mask', got {branch!r}.")
    return analysis_operator(model)


def plot_filters(
    filters: Tensor,
    num_filters: int = 48,
    columns: int = 12,
    title: str = "Effective filters, strongest first",
) -> Figure:
    """
    Draws filters, each on its own scale: gray is zero, white positive.

    :param torch.Tensor filters: ``(N, C, n, n)``, from :func:`effective_filters`.
    :param int num_filters: how many, those of largest norm.
    :param int columns: filters per row.
    :param str title: title of the figure.
    :return: the figure.
    """
    norms = filters.flatten(1).norm(dim=1)
    order = norms.argsort(descending=True)[:num_filters]
    share = float(norms[order].square().sum() / norms.square().sum())
    title = (
        f"{title}\n{len(order)} of {len(filters)}, {share:.0%} of the energy; each on "
        "its own scale"
    )
    rows = -(-len(order) // columns)
    figure = new_figure(0.85 * columns, 0.85 * rows + 0.6)
    show_tiles(figure.subplots(), filters[order].mean(1), columns, title)
    return figure


def plot_normal_response(impulse: Tensor, spectrum: Tensor) -> Figure:
    r"""
    Draws the impulse response and the spectrum of :math:`W^{\top} W`.

    :param torch.Tensor impulse: ``(n, n)``, from :func:`normal_response`.
    :param torch.Tensor spectrum: ``(size, size)``, frequency zero in the middle.
    :return: the figure.
    """
    figure = new_figure(12.5, 3.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
    centre = len(impulse) // 2
    radius = min(10, centre)
    near = slice(centre - radius, centre + radius + 1)
    others = impulse[near, near].clone()
    others[radius, radius] = 0
    peak = largest(others)
    show(
        left,
        impulse[near, near],
        "impulse response of $W^T W$\n"
        f"the pixel itself: {float(impulse[centre, centre]):.2f}",
        cmap="RdBu_r",
        limits=(-peak, peak),
        colorbar=True,
    )
    extent = (-0.5, 0.5, 0.5, -0.5)
    show(
        middle,
        spectrum.clamp_min(1e-5).log10(),
        "its spectrum, log10\nconstants are free",
        cmap="magma",
        limits=None,
        colorbar=True,
        extent=extent,
    )
    middle.set_xticks([-0.5, 0, 0.5])
    middle.set_yticks([-0.5, 0, 0.5])
    middle.set_xlabel("cycles per pixel")
    half = len(spectrum) // 2
    frequency = torch.arange(half) / len(spectrum)
    right.plot(frequency, spectrum[half, half:].cpu(), label="horizontal")
    right.plot(frequency, spectrum[half:, half].cpu(), label="vertical")
    diagonal = spectrum.diagonal()[half:].cpu()
    right.plot(2**0.5 * frequency, diagonal, label="diagonal")
    title = "sections of the spectrum\n0: free, 1: penalised most"
    finish(right, title, "cycles per pixel", legend=True)
    right.set_ylim(0, None)
    return figure
