r"""Which data a pixel of the reconstruction is an average of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from deepinv_deal.interpret._figures import TITLE, new_figure, show
from deepinv_deal.interpret.linearization import Linearization

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def averaging_kernels(
    at: Linearization, pixels: Sequence[tuple[int, int]], channel: int = 0
) -> Tensor:
    r"""
    Returns rows of :math:`B^{-1}`, the weights with which pixels average the data.

    At the fixed point :math:`\hat x = B^{-1} A^{\top} y` with the mask frozen, so that

    .. math::
        \hat x_n = \langle B^{-1} e_n, \, A^{\top} y \rangle ,

    and in denoising each pixel is a weighted average of the noisy image. The weights
    follow edges and lines and spread where the image is flat
    (:footcite:t:`pourya2025dealing`, Section 6 and Fig. 8). They sum to about 1, since
    :math:`W` annihilates constants.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import averaging_kernels, linearize
    >>> y = torch.rand(1, 1, 16, 17)
    >>> at = linearize(DEAL(pretrained=None, num_filters=8), y, sigma=0.1)
    >>> kernels = averaging_kernels(at, [(8, 8), (3, 10)])
    >>> average = (kernels[0] * y).sum()
    >>> kernels.shape, torch.allclose(average, at.image[0, 0, 8, 8], rtol=1e-3)
    (torch.Size([2, 1, 16, 17]), True)

    :param Linearization at: from :func:`linearize`, of :class:`deepinv_deal.DEAL`.
    :param list pixels: pairs (row, column).
    :param int channel: channel of the pixels.
    :return: shape ``(K, C, H, W)``.
    :raises IndexError: for a pixel outside the image.
    """
    units = at.x.new_zeros(len(pixels), *at.x.shape[1:])
    height, width = at.x.shape[-2:]
    for unit, (row, column) in zip(units, pixels, strict=True):
        if not (0 <= row < height and 0 <= column < width):
            raise IndexError(
                f"pixels must lie in the image of {height} x {width}, got "
                f"({row}, {column})."
            )
        unit[channel, row, column] = 1.0
    return at.solve(units)


def plot_averaging_kernels(
    kernels: Tensor,
    pixels: Sequence[tuple[int, int]],
    data: Tensor,
    x_hat: Tensor,
    radius: int = 12,
) -> Figure:
    """
    Draws data, reconstruction and kernel around some pixels, one row for each.

    Each kernel is shown in shades of red (positive) and blue (negative weights) on its
    own scale, which ends at the second largest weight, and as contour over the
    reconstruction where it falls to a tenth of the largest.

    :param torch.Tensor kernels: ``(K, C, H, W)``, from :func:`averaging_kernels`.
    :param list pixels: the pairs (row, column).
    :param torch.Tensor data: what is averaged, as an image ``(1, C, H, W)``.
    :param torch.Tensor x_hat: reconstruction ``(1, C, H, W)``.
    :param int radius: half the side of the windows, in pixels.
    :return: the figure.
    """
    figure = new_figure(11.0, 2.75 * len(pixels) + 0.3)
    grid = figure.subplots(len(pixels), 4, squeeze=False)
    titles = [
        "reconstruction",
        "data $A^T y$",
        "reconstruction, magnified",
        "weights $B^{-1} e_n$",
    ]
    height, width = data.shape[-2:]
    for index, (axes, kernel, pixel) in enumerate(
        zip(grid, kernels, pixels, strict=True)
    ):
        row, column = pixel
        # Windows of one size, inside the image.
        top = max(min(row - radius, height - 2 * radius - 1), 0)
        left = max(min(column - radius, width - 2 * radius - 1), 0)
        bottom = min(top + 2 * radius + 1, height)
        right = min(left + 2 * radius + 1, width)
        window = (..., slice(top, bottom), slice(left, right))
        names = titles if index == 0 else [""] * 4
        weights = kernel.mean(0)
        second, peak = weights.abs().flatten().topk(2).values.flip(0).tolist()
        show(axes[0], x_hat[0], names[0])
        axes[0].plot(
            [left, right - 1, right - 1, left, left],
            [top, top, bottom - 1, bottom - 1, top],
            color="tab:red",
            linewidth=1.4,
        )
        show(axes[1], data[0][window], names[1])
        show(axes[2], x_hat[0][window], names[2])
        axes[2].contour(
            weights[window].cpu().numpy(),
            levels=[0.1 * peak],
            colors="tab:red",
            linewidths=1.2,
        )
        show(
            axes[3],
            weights[window],
            names[3],
            cmap="RdBu_r",
            limits=(-second, second),
            colorbar=True,
        )
        for axis in axes[1:3]:
            axis.plot(column - left, row - top, "+", color="tab:red", markersize=9)
        # White noise falls by the norm of the weights, as in a flat average of so many.
        number = 1 / float(kernel.square().sum())
        axes[0].set_ylabel(f"pixel ({row}, {column})", fontsize=TITLE)
        axes[3].set_xlabel(
            f"sum {float(kernel.sum()):.3f}, centre {peak:.2f}\n"
            f"averages {number:.0f} pixels"
        )
    return figure
