r"""How image and mask find each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepinv_deal._batch import norm
from deepinv_deal.interpret._figures import (
    GRAY,
    SMALL,
    TITLE,
    count_axis,
    new_figure,
    show,
)
from deepinv_deal.interpret._models import attentive
from deepinv_deal.solvers import Equation, SolverResult, fixed_point
from deepinv_deal.solvers.fixed_point import Callback

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SolutionPath:
    r"""
    All iterates of :math:`x_{k+1} = T(x_k)`.

    :param torch.Tensor x: images of the physics, ``(K + 1, B, C, H, W)``.
    :param torch.Tensor mask: masks of these images, mean over the filters, ``(K + 1, B,
        1, H, W)``.
    :param torch.Tensor residual: :math:`\|F(x_k)\| / \|A^{\top} y\|`, ``(K + 1, B)``.
    """

    x: Tensor
    mask: Tensor
    residual: Tensor


@torch.no_grad()
def solution_path(
    model: Any,
    y: Tensor,
    physics: Any = None,
    sigma: float | Tensor | str | None = None,
    *,
    lambda_reg: float | Tensor | None = None,
    init: Any = None,
    num_iter: int = 30,
    inner_rtol: float = 1e-3,
) -> SolutionPath:
    r"""
    Returns all iterates and their masks.

    A mask computed from noisy data is noisy; it improves with the image
    (:footcite:t:`pourya2025dealing`, Figs. 4 and 11). The inner problems are solved
    more accurately than the models need, so that the iterates are those of :math:`T`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import solution_path
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> path = solution_path(model, torch.rand(1, 1, 16, 17), sigma=0.1, num_iter=4)
    >>> path.x.shape, path.mask.shape
    (torch.Size([5, 1, 1, 16, 17]), torch.Size([5, 1, 1, 16, 17]))

    :param object model: :class:`deepinv_deal.DEAL`, :class:`deepinv_deal.SAFI` or
        :class:`deepinv_deal.MMR`.
    :param torch.Tensor y: measurements, as for the model.
    :param deepinv.physics.LinearPhysics physics: forward operator; ``None`` to denoise.
    :param float, torch.Tensor, str sigma: noise level, as for the model.
    :param float, torch.Tensor lambda_reg: weight, as for the model.
    :param object init: first image, as for the model.
    :param int num_iter: number :math:`K` of iterations.
    :param float inner_rtol: factor by which each inner solve reduces its residual.
    :return: (:class:`SolutionPath`); fewer iterates if the residual vanishes before.
    """
    attentive(model)
    problem = model.pose(y, physics, sigma, lambda_reg=lambda_reg, init=init)
    problem = problem.precise
    equation = problem.equation
    x = equation.start(problem.init)
    images, masks = [], []

    def record(iterate: Tensor) -> None:
        image = problem.image(equation.image(iterate))
        mask = equation.mask(iterate)
        images.append(image)
        # Real and imaginary part have masks of their own.
        masks.append(mask.reshape(len(image), -1, *mask.shape[2:]).mean(1, True))

    record(x)
    result = plain_iteration(
        equation, x, num_iter, inner_rtol, lambda _k, _previous, z: record(z)
    )
    return SolutionPath(torch.stack(images), torch.stack(masks), result.history)


def plain_iteration(
    equation: Equation,
    x: Tensor,
    num_iter: int,
    inner_rtol: float,
    callback: Callback | None = None,
) -> SolverResult:
    r"""
    Runs :math:`x_{k+1} = T(x_k)` without damping, extrapolation or tolerance.

    :param object equation: the equation whose frozen problems make up :math:`T`.
    :param torch.Tensor x: first unknown.
    :param int num_iter: number of iterations.
    :param float inner_rtol: factor by which each inner solve reduces its residual.
    :param Callable callback: called as ``callback(k, x_previous, x)``.
    :return: (:class:`SolverResult`) with the residuals of all iterates in ``history``.
    """
    return fixed_point(
        equation.freeze,
        x,
        rtol=0.0,
        max_iter=num_iter,
        forcing=inner_rtol,
        damped=False,
        callback=callback,
    )


def initialization_paths(
    model: Any,
    y: Tensor,
    physics: Any,
    inits: Mapping[str, Any],
    **settings: Any,
) -> dict[str, SolutionPath]:
    r"""
    Returns the path from each of several first images.

    If :math:`T` is a contraction, all end in the same image
    (:footcite:t:`pourya2025dealing`, Thm. 4.4 and Fig. 5); :func:`spread` tells whether
    they do.

    :param object model: as for :func:`solution_path`.
    :param torch.Tensor y: measurements.
    :param deepinv.physics.LinearPhysics physics: forward operator; ``None`` to denoise.
    :param dict inits: names and first images, each as ``init`` of the model.
    :param object settings: further arguments of :func:`solution_path`.
    :return: names and paths.
    """
    if not inits:
        raise ValueError("inits must hold at least one first image, got none.")
    return {
        name: solution_path(model, y, physics, init=init, **settings)
        for name, init in inits.items()
    }


def spread(paths: Mapping[str, SolutionPath]) -> Tensor:
    r"""
    Returns how far apart the paths are at every iteration.

    .. math::
        \max_{i, j} \; \|x_k^{(i)} - x_k^{(j)}\| \, / \, \|x_K^{(1)}\|

    :param dict paths: from :func:`initialization_paths`.
    :return: ``(n, B)``, n as long as the shortest path.
    """
    length = min(len(path.x) for path in paths.values())
    images = [path.x[:length] for path in paths.values()]
    size = norm(images[0][-1])
    apart = [
        norm((a - b).flatten(0, 1)).view(length, -1)
        for i, a in enumerate(images)
        for b in images[:i]
    ]
    apart = apart or [torch.zeros_like(paths[next(iter(paths))].residual[:length])]
    return torch.stack(apart).amax(0) / size.where(size > 0, 1)


def plot_path(
    path: SolutionPath, x_gt: Tensor | None = None, num_columns: int = 5
) -> Figure:
    """
    Draws iterates above their mean masks, and residual and PSNR over the iterations.

    :param SolutionPath path: from :func:`solution_path`; the first sample is drawn.
    :param torch.Tensor x_gt: ground truth ``(1, C, H, W)``, for the PSNR.
    :param int num_columns: number of iterates, early ones closer than late ones.
    :return: the figure.
    """
    last = len(path.x) - 1
    # The first image is often zero, and most happens in the first iterations.
    steps = torch.linspace(0, 1, num_columns).square() * (last - 1) + 1
    chosen = sorted({int(k) for k in steps.round().clamp(0, last)})
    lowest = int(10 * path.mask[chosen, 0].min()) / 10
    figure = new_figure(2.3 * len(chosen) + 4.2, 4.9)
    grid = figure.subplots(
        2, len(chosen) + 1, squeeze=False, width_ratios=[1] * len(chosen) + [1.7]
    )
    for i, k in enumerate(chosen):
        show(grid[0, i], path.x[k, 0], f"k = {k}")
        bar = i == len(chosen) - 1
        show(
            grid[1, i],
            path.mask[k, 0],
            cmap="magma",
            limits=(lowest, 1.0),
            colorbar=bar,
        )
    grid[0, 0].set_ylabel("image $x_k$", fontsize=TITLE)
    grid[1, 0].set_ylabel("mean mask of $x_k$", fontsize=TITLE)
    grid[1, 0].set_xlabel("1: smoothed, 0: left alone")
    top, bottom = grid[:, -1]
    iterations = torch.arange(last + 1)
    top.semilogy(iterations, path.residual[:, 0].cpu(), "o-", markersize=3)
    top.set_title("relative nonlinear residual", fontsize=TITLE)
    top.grid(alpha=0.3)
    if x_gt is None:
        bottom.plot(
            iterations, path.mask[:, 0].mean((1, 2, 3)).cpu(), "o-", markersize=3
        )
        bottom.set_title("mean of the mask", fontsize=TITLE)
    else:
        error = (path.x[:, 0] - x_gt[0]).square().flatten(1).mean(1)
        bottom.plot(iterations[1:], -10 * error.log10().cpu()[1:], "o-", markersize=3)
        bottom.set_title("PSNR in dB", fontsize=TITLE)
    count_axis(bottom, "iteration k")
    bottom.set_xlim(top.get_xlim())
    bottom.grid(alpha=0.3)
    return figure


def plot_initializations(paths: Mapping[str, SolutionPath]) -> Figure:
    """
    Draws first and last images of several paths, and how far apart the paths are.

    :param dict paths: from :func:`initialization_paths`; the first sample is drawn.
    :return: the figure.
    """
    figure = new_figure(2.4 * len(paths) + 4.4, 4.9)
    grid = figure.subplots(
        2, len(paths) + 1, squeeze=False, width_ratios=[1] * len(paths) + [1.7]
    )
    for axes, (name, path) in zip(grid.T, paths.items(), strict=False):
        show(axes[0], path.x[0, 0], name)
        show(axes[1], path.x[-1, 0])
        axes[1].set_xlabel(f"k = {len(path.x) - 1}")
    grid[0, 0].set_ylabel("first image $x_0$", fontsize=TITLE)
    grid[1, 0].set_ylabel("last image", fontsize=TITLE)
    top, bottom = grid[:, -1]
    for name, path in paths.items():
        top.semilogy(path.residual[:, 0].cpu(), "o-", markersize=3, label=name)
    top.set_title("relative nonlinear residual", fontsize=TITLE)
    top.legend(fontsize=SMALL)
    distance = spread(paths)[:, 0].cpu()
    bottom.semilogy(distance.clamp_min(1e-16), "o-", markersize=3, color=GRAY)
    bottom.set_title("largest relative distance of two paths", fontsize=TITLE)
    for axis in (top, bottom):
        count_axis(axis, "iteration k" if axis is bottom else "")
        axis.grid(alpha=0.3)
    return figure
