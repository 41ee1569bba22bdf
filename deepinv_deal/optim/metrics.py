"""The metrics of all iterates, in the form of deepinv's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepinv.loss.metric import PSNR
from torch import Tensor

from deepinv_deal._batch import norm
from deepinv_deal.solvers import SolverResult


class IterationMetrics:
    """
    Records what ``compute_metrics=True`` returns.

    For every sample a list over the iterates: ``"psnr"`` (empty without ground truth),
    ``"residual"``, the relative change in every iteration, what ``custom_metrics``
    compute, and ``"nonlinear_residual"``.

    :param torch.Tensor x: first image, ``(B, C, H, W)``.
    :param torch.Tensor x_gt: ground truth, or ``None``.
    :param dict custom_metrics: by name, functions of the lists so far, one for every
        sample, and of the images ``(C, H, W)`` before and after an iteration.
    """

    def __init__(
        self,
        x: Tensor,
        x_gt: Tensor | None,
        custom_metrics: dict[str, Callable[..., Any]] | None,
    ):
        self.x_gt, self.custom = x_gt, custom_metrics or {}
        names = ("psnr", "residual", *self.custom)
        self.values: dict[str, list[list[Any]]] = {
            name: [[] for _ in range(len(x))] for name in names
        }
        self._judge(x)

    def _judge(self, x: Tensor) -> None:
        if self.x_gt is not None:
            self._append("psnr", PSNR()(x, self.x_gt))

    def _append(self, name: str, numbers: Tensor) -> None:
        for values, number in zip(self.values[name], numbers.tolist(), strict=True):
            values.append(number)

    @torch.no_grad()
    def observe(self, before: Tensor, after: Tensor) -> None:
        """Records an iteration, from the images before and after it."""
        self._append("residual", norm(before - after) / (norm(after) + 1e-6))
        self._judge(after)
        for name, function in self.custom.items():
            for i, values in enumerate(self.values[name]):
                values.append(function(self.values[name], before[i], after[i]))

    def finish(self, result: SolverResult) -> dict[str, list[list[Any]]]:
        """Returns everything, with the history of the solver."""
        return {**self.values, "nonlinear_residual": result.history.T.tolist()}
