"""Parts of figures: images without ticks, tiles of filters or atoms, line plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Size of titles, and of remarks below them.
TITLE, SMALL = 11, 9

#: One colour for each kind of thing in line plots.
BLUE, ORANGE, GRAY = "#1f6fb4", "#e07b00", "0.45"

#: Between tiles: neither black nor white nor gray.
FRAME = "#b8cfe6"


def new_figure(width: float, height: float) -> Figure:
    """
    Returns an empty figure of a size in inches.

    A Figure of its own needs no display and leaves pyplot's state alone.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def show(
    axis: Axes,
    image: Tensor,  # (H, W), (1, H, W) or (3, H, W)
    title: str = "",
    *,
    cmap: str = "gray",
    limits: tuple[float, float] | None = (0.0, 1.0),
    colorbar: bool = False,
    **kwargs: Any,
) -> None:
    """
    Draws an image without ticks, colours for ``limits`` (``None``: its own range).
    """
    from matplotlib import colormaps

    picture = image.detach().cpu()
    if limits is not None:
        picture = picture.clamp(*limits)
    if picture.ndim == 3:
        picture = picture.permute(1, 2, 0).squeeze(-1)
    low, high = limits if limits is not None else (None, None)
    colours = colormaps[cmap].with_extremes(bad=FRAME)  # NaN, between tiles
    shown = axis.imshow(
        picture.numpy(),
        cmap=colours,
        vmin=low,
        vmax=high,
        interpolation="nearest",
        **kwargs,
    )
    if title:
        axis.set_title(title, fontsize=TITLE)
    axis.set_xticks([])
    axis.set_yticks([])
    if colorbar:
        # Beside the axis, so that images with and without one have the same size.
        axis.figure.colorbar(shown, cax=axis.inset_axes((1.04, 0.0, 0.05, 1.0)))


def finish(
    axis: Axes, title: str, xlabel: str = "", ylabel: str = "", *, legend: bool = False
) -> None:
    """
    Puts title, labels, a grid and on request a legend on a line plot.
    """
    axis.set_title(title, fontsize=TITLE)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=SMALL)


def largest(image: Tensor) -> float:
    """Returns the largest modulus of an image, 1 if it is zero."""
    return float(image.detach().abs().max()) or 1.0


def show_tiles(axis: Axes, images: Tensor, columns: int, title: str) -> None:
    """
    Draws images ``(N, H, W)`` side by side, each on its own scale: gray is zero.
    """
    peak = images.abs().flatten(1).amax(1)
    scaled = images / peak.where(peak > 0, 1)[:, None, None]
    show(axis, _tile(scaled, columns), title, limits=(-1, 1))
    axis.set_axis_off()


def _tile(images: Tensor, columns: int) -> Tensor:
    """
    Tiles images ``(N, H, W)`` row by row with a frame of one pixel of NaN.
    """
    n, height, width = images.shape
    rows = -(-n // columns)
    canvas = images.new_full(
        (rows * (height + 1) + 1, columns * (width + 1) + 1), float("nan")
    )
    for i, image in enumerate(images):
        r, c = divmod(i, columns)
        top, left = r * (height + 1) + 1, c * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image
    return canvas
