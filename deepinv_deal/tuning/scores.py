"""Scores of reconstructions, with and without ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepinv.loss import SureGaussianLoss
from deepinv.loss.metric import PSNR
from deepinv.optim import PoissonLikelihood
from deepinv.physics import (
    GaussianNoise,
    PoissonGaussianNoise,
    PoissonNoise,
    ZeroNoise,
)
from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.problems.likelihood import Poisson
from deepinv_deal.problems.noise import (
    has_noise_map,
    likelihood_of,
    likelihood_of_noise,
)
from deepinv_deal.tuning.validate import Problem, noise_level

#: Keeps the probe of SURE apart from noise drawn with the same seed, or a simple one:
#: a probe that is correlated with the noise would bias the estimate.
PROBE_SEED = 0x5EED_0BE5

#: Size of the probe of counts, relative to the standard deviation of their noise.
PROBE = 0.1


def make_scorer(metric: Any, seed: int, model: Any) -> MetricScorer | SureScorer:
    """
    Returns what judges reconstructions.

    :param object metric: ``"sure"``, a deepinv metric, or ``None`` for the PSNR.
    :param int seed: seed of the probe of SURE.
    :param deepinv.models.Reconstructor model: whose data fidelity tells the noise if
        the physics has none.
    :raises TypeError: for another object.
    """
    if metric == "sure":
        return SureScorer(seed, model)
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
    """
    An estimate of the risk, with the same probe for all candidates: Stein's for
    Gaussian noise, which is unbiased, and Hudson's for counts, which with read noise
    beside few counts is nearly so.
    """

    name, lower_better = "SURE", True

    def __init__(self, seed: int, model: Any):
        self.seed, self.model = PROBE_SEED + seed, model

    def check(self, problems: Sequence[Problem]) -> None:
        """Asks for the level of the noise."""
        for problem in problems:
            self._counts(problem)

    def __call__(self, problem: Problem, x_hat: Tensor, again: Any) -> Tensor:
        """Returns one score per image; ``again(y, physics)`` reconstructs once more."""
        rng = torch.Generator(x_hat.device).manual_seed(self.seed)
        counts = self._counts(problem)
        if counts is not None:
            return risk_of_counts(counts, problem, x_hat, again, rng)
        sure = SureGaussianLoss(noise_level(problem.physics), rng=rng)
        return sure(y=problem.y, x_net=x_hat, physics=problem.physics, model=again)

    def _counts(self, problem: Problem) -> Poisson | None:
        """Returns the likelihood of counts, ``None`` if the noise is Gaussian."""
        noise: Any = getattr(problem.physics, "noise_model", None)
        if isinstance(noise, GaussianNoise):
            if has_noise_map(noise):
                raise ValueError(
                    "metric='sure' is for one noise level; that of the physics has one "
                    "for every measurement. Give ground truth."
                )
            return None
        if type(noise) in (PoissonNoise, PoissonGaussianNoise):
            likelihood, _ = likelihood_of_noise(problem.physics, problem.y)
            if isinstance(likelihood, Poisson):
                return likelihood
            raise ValueError(
                f"metric='sure': y does not hold counts of the physics' "
                f"{type(noise).__name__}. Give what it measures, or ground truth."
            )
        fidelity = getattr(self.model, "data_fidelity", None)
        unknown = noise is None or isinstance(noise, ZeroNoise)
        if unknown and type(fidelity) is PoissonLikelihood:
            likelihood = likelihood_of(fidelity)
            assert isinstance(likelihood, Poisson)
            likelihood.check(problem.y)
            return likelihood
        found = "" if unknown else f", not {type(noise).__name__}"
        raise ValueError(
            "metric='sure' needs the level of the Gaussian noise, or the gain of "
            "counts: give physics with noise_model=GaussianNoise(sigma), "
            f"PoissonNoise(gain) or PoissonGaussianNoise(gain, sigma){found}. For all "
            "other noise give ground truth, and a deepinv metric such as PSNR()."
        )


def risk_of_counts(
    likelihood: Poisson, problem: Problem, x_hat: Tensor, again: Any, rng: Any
) -> Tensor:
    r"""
    Returns an estimate of :math:`\tfrac1m \|A \hat x - A x\|^2` from counts, ``(B,)``.

    With :math:`z = \gamma (k - \beta)`, whose mean is :math:`A x`, and the estimates
    :math:`v = \gamma^2 k` of its variances, it is

    .. math::
        \tfrac1m \sum_i (A \hat x - z)_i^2 - v_i
        + 2 v_i \frac{\partial (A \hat x)_i}{\partial z_i},

    to first order in one count what Hudson's identity gives, and Stein's estimate where
    :math:`v` is constant. The derivatives are those along one random probe, which adds
    or subtracts whole counts: what is not whole would be no counts to the model.

    :param Poisson likelihood: the likelihood of the measurements.
    :param Problem problem: measurements and physics.
    :param torch.Tensor x_hat: reconstruction.
    :param Callable again: ``again(y, physics)`` reconstructs once more.
    :param torch.Generator rng: for the probe.
    """
    y, physics = problem.y, problem.physics
    A = (lambda x: x) if physics is None else physics.A
    gain = torch.as_tensor(likelihood.gain, dtype=y.dtype, device=y.device)
    gain = expand(gain, y) if gain.ndim == 1 else gain
    k, z = likelihood.counts(y), likelihood.linear(y)
    sign = torch.randint(0, 2, y.shape, generator=rng, device=y.device) * 2 - 1
    if likelihood.shift is None:
        size = PROBE * k.sqrt()
        more = torch.rand(y.shape, generator=rng, device=y.device) < size.frac()
        step = sign * (size.floor() + more)
        power = size.floor().square() + size.frac() * (2 * size.floor() + 1)
        probed = y * (1 + step / k.where(k > 0, 1))
    else:  # Gaussian noise beside the counts leaves nothing whole
        size = PROBE * likelihood.level(y, y == y).rsqrt()
        step = sign * expand(size, y) / gain
        power = step.square()
        probed = y + step * gain
    predicted = A(x_hat)
    change = A(again(probed, physics)) - predicted
    variance = gain.square() * k
    # Where there is no count, no count can be lost, and the variance is zero.
    slope = step * change / gain / power.where(power > 0, 1)
    risk = (predicted - z).square() - variance + 2 * variance * slope
    return risk.flatten(1).mean(1)
