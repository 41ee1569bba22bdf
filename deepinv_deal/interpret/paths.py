r"""How image and mask find each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from deepinv.loss.metric import PSNR
from torch import Tensor

from deepinv_deal.interpret._figures import TITLE, finish, new_figure, show
from deepinv_deal.interpret._models import attentive
from deepinv_deal.solvers import fixed_point

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
    :param object init: first image, as for the model. If :math:`T` is a contraction,
        the paths from all of them end in the same image
        (:footcite:t:`pourya2025dealing`, Thm. 4.4 and Fig. 5).
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
        stacks = equation.regularizer.masks(equation.mask(iterate))
        images.append(image)
        # Real and imaginary part have masks of their own.
        masks.append(problem.data.features(stacks).mean(1, True))

    record(x)
    # The iterates of T itself: no damping, no extrapolation, no tolerance.
    result = fixed_point(
        equation.freeze,
        x,
        rtol=0.0,
        max_iter=num_iter,
        forcing=inner_rtol,
        damped=False,
        callback=lambda _k, _previous, z: record(z),
    )
    return SolutionPath(torch.stack(images), torch.stack(masks), result.history)


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
    from matplotlib.ticker import MaxNLocator

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
    top.semilogy(path.residual[:, 0].cpu(), "o-", markersize=3)
    finish(top, "relative nonlinear residual")
    if x_gt is None:
        values, title = path.mask[:, 0].mean((1, 2, 3)), "mean of the mask"
    else:
        values, title = PSNR()(path.x[:, 0], x_gt.expand_as(path.x[:, 0])), "PSNR in dB"
        values[0] = torch.nan  # that of an image that is often zero sets the scale
    bottom.plot(values.cpu(), "o-", markersize=3)
    finish(bottom, title, "iteration k")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlim(top.get_xlim())
    return figure
