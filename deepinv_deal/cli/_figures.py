"""Reconstructions at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from deepinv_deal._atomic import replacing
from deepinv_deal.interpret._figures import TITLE, new_figure, show
from deepinv_deal.models import ReconstructionInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Panel:
    """
    One row of :func:`plot_reconstructions`.

    :param str title: name of the problem.
    :param torch.Tensor x: ground truth ``(1, C, H, W)``; ``None`` if there is none.
    :param torch.Tensor y: measurement as an image ``(1, C, H, W)``.
    :param torch.Tensor x_hat: reconstruction ``(1, C, H, W)``.
    :param ReconstructionInfo info: from ``model(..., return_info=True)``.
    :param str measured: caption of the measurement, e.g. its PSNR.
    :param str reconstructed: caption of the reconstruction.
    """

    title: str
    x: Tensor | None
    y: Tensor
    x_hat: Tensor
    info: ReconstructionInfo
    measured: str = ""
    reconstructed: str = ""


def plot_reconstructions(panels: Sequence[Panel]) -> Figure:
    """
    Draws ground truth, measurement, reconstruction, mean mask and convergence.

    The mean mask shows where the model lowers the penalty: dark means that filter
    responses are left alone (edges, texture), bright that they are suppressed (flat
    regions). Several samples of one panel are its channels, solved one by one, or real
    and imaginary part: the mask is their mean, the residual that of the worst. Models
    with a dictionary have no mask.

    :param list panels: one :class:`Panel` per row.
    :return: the figure; ``figure.savefig(path)`` writes it.
    """
    truth = int(any(panel.x is not None for panel in panels))  # a column for it?
    masks = int(any(panel.info.has_mask for panel in panels))
    figure = new_figure(9 + 3.5 * (truth + masks), 3.6 * len(panels))
    grid = figure.subplots(
        len(panels),
        3 + truth + masks,
        squeeze=False,
        width_ratios=[1] * (2 + truth) + [1.12] * masks + [1.25],
    )
    for axes, panel in zip(grid, panels, strict=True):
        pictures = [
            ("ground truth", panel.x),
            (f"measurement\n{panel.measured}", panel.y),
            (f"reconstruction\n{panel.reconstructed}", panel.x_hat),
        ][1 - truth :]
        for axis, (title, image) in zip(axes, pictures, strict=False):
            if image is None:
                axis.set_axis_off()
                continue
            show(axis, image[0], title)
        if panel.info.has_mask:
            show(
                axes[-2],
                panel.info.mask.mean((0, 1)),
                "mean mask\n1: smoothed, 0: left alone",
                cmap="magma",
                colorbar=True,
            )
        elif masks:
            axes[-2].set_axis_off()
        axes[0].set_ylabel(panel.title, fontsize=TITLE)
        history = panel.info.history.amax(1).cpu().numpy()
        axes[-1].semilogy(range(len(history)), history, "o-", markersize=3)
        # The tolerance refers to the force of the regularizer on the last images.
        force = panel.info.residual / panel.info.criterion
        tolerance = panel.info.rtol * float(force.nan_to_num(1.0).min())
        axes[-1].axhline(tolerance, color="gray", linestyle="--", linewidth=1)
        axes[-1].annotate(
            "tolerance",
            (0, tolerance),
            textcoords="offset points",
            xytext=(2, 4),
            color="gray",
        )
        steps = int(panel.info.inner_iter.sum())
        axes[-1].set_xlabel("outer iteration")
        title = "relative nonlinear residual"
        axes[-1].set_title(
            f"{title}\n{steps} inner iterations" if steps else title, fontsize=TITLE
        )
        axes[-1].grid(alpha=0.3)
    return figure


def save(figure: Figure, path: str) -> None:
    """
    Writes a figure, whole or not at all.

    :param matplotlib.figure.Figure figure: the figure.
    :param str path: the file, whose suffix says of which kind.
    :raises ValueError: if there are no files of this kind.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(
            f"{path}: a figure can be written as .png, .pdf, .svg or .jpg."
        )
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=110)
