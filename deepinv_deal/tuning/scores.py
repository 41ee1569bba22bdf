"""Scores of reconstructions, with and without ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepinv.loss import SureGaussianLoss
from deepinv.loss.metric import PSNR
from torch import Tensor

from deepinv_deal.tuning.validate import Problem, noise_level

#: Keeps the probe of SURE apart from noise drawn with the same seed, or a simple one:
#: a probe that is correlated with the noise would bias the estimate.
PROBE_SEED = 0x5EED_0BE5


def make_scorer(metric: Any, seed: int) -> MetricScorer | SureScorer:
    """
    Returns what judges reconstructions.

    :param object metric: ``"sure"``, a deepinv metric, or ``None`` for the PSNR.
    :param int seed: seed of the probe of SURE.
    :raises TypeError: for another object.
    """
    if metric == "sure":
        return SureScorer(seed)
    metric = PSNR() if metric is None else metric
    if not callable(metric) or not hasattr(metric, "lower_better"):
        raise TypeError(
            "metric must be 'sure' or a deepinv.loss.metric.Metric, whose attribute "
            f"lower_better says which way is better, got {metric!r}. Wrap a function "
            "f(x_hat, x) as Metric(metric=f)."
        )
    return MetricScorer(metric)


class MetricScorer:
    """The score of images whose ground truth is known."""

    def __init__(self, metric: Any):
        self.metric, self.name = metric, type(metric).__name__
        # With train_loss, deepinv's metrics turn around what is better when higher.
        self.lower_better = metric.lower_better or getattr(metric, "train_loss", False)

    def check(self, problems: Sequence[Problem]) -> None:
        """Asks for ground truth."""
        for i, problem in enumerate(problems):
            if problem.x is None:
                raise ValueError(
                    f"Item {i} of the validation set has no ground truth, which the "
                    f"metric {self.name} needs. metric='sure' does without."
                )

    def __call__(self, problem: Problem, x_hat: Tensor, _again: Any) -> Tensor:
        """Returns one score per image."""
        score = self.metric(x_hat, problem.x)
        if not isinstance(score, Tensor) or score.numel() not in (1, len(x_hat)):
            raise ValueError(
                f"The metric {self.name} must give one number per image, got "
                f"{tuple(score.shape) if isinstance(score, Tensor) else score!r} for "
                f"{len(x_hat)} images."
            )
        return score.reshape(-1)


class SureScorer:
    """Stein's unbiased estimate of the risk, with the same probe for all candidates."""

    name, lower_better = "SURE", True

    def __init__(self, seed: int):
        self.seed = PROBE_SEED + seed

    def check(self, problems: Sequence[Problem]) -> None:
        """Asks for the level of the noise."""
        for problem in problems:
            if noise_level(problem.physics) is None:
                raise ValueError(
                    "metric='sure' needs the level of the Gaussian noise: give physics "
                    "with noise_model=GaussianNoise(sigma)."
                )

    def __call__(self, problem: Problem, x_hat: Tensor, again: Any) -> Tensor:
        """Returns one score per image; ``again(y, physics)`` reconstructs once more."""
        rng = torch.Generator(x_hat.device).manual_seed(self.seed)
        sure = SureGaussianLoss(noise_level(problem.physics), rng=rng)
        return sure(y=problem.y, x_net=x_hat, physics=problem.physics, model=again)
