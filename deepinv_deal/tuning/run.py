"""Tuning from beginning to end, and the evaluation of candidates."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from deepinv.loss.metric import Metric
from deepinv.models import Reconstructor
from deepinv.utils import TensorList
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepinv_deal.models import ReconstructionModel
from deepinv_deal.optim import FixedPointOptim
from deepinv_deal.solvers import ConvergenceWarning
from deepinv_deal.tuning.report import POWERS, Recorder, Trial, TuningResult
from deepinv_deal.tuning.scores import MetricScorer, SureScorer, make_scorer
from deepinv_deal.tuning.search import Search, minimise
from deepinv_deal.tuning.validate import (
    Problem,
    check_parameters,
    first_values,
    read_problems,
)

#: Models that say how a reconstruction went, by ``return_info=True``.
REPORTING = (ReconstructionModel, FixedPointOptim)


def tune(
    model: Reconstructor,
    physics: Any,
    dataset: Dataset[Any] | DataLoader[Any] | Iterable[Any] | Tensor,
    *,
    metric: Metric | str | None = None,
    lambda_reg: float | None = None,
    sigma: float | None = None,
    tune_sigma: bool = False,
    beta: float | None = None,
    tune_beta: bool = False,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **search: Any,
) -> TuningResult:
    r"""
    Chooses ``lambda_reg``, and on request ``sigma`` or ``beta``, on a validation set.

    The search is on a logarithmic scale, from coarse to fine, as in the code of
    :footcite:t:`pourya2024iteratively`. It compares the weights :math:`p/g`, :math:`p`
    and :math:`p g`; while an end is best, the three points move one step that way;
    else :math:`g \leftarrow \sqrt{g}`, until :math:`g` is at most ``precision``. We add
    one last point, the vertex of the parabola through the scores of the three points
    over :math:`\log \lambda`. With ``tune_sigma`` or ``tune_beta``, the points are
    those of a 3 x 3 grid, :math:`\beta` moves by :math:`g`, :math:`\sigma` by
    :math:`\sqrt g`, and the last point comes from the paraboloid fitted to them. No
    setting is tried twice.

    All settings see the same measurements, and each is solved from the model's own
    first image: started at a neighbour's result, the solver would stop elsewhere within
    its tolerance, and scores would depend on the order of the trials. That tolerance
    also limits how finely settings can be told apart: with few, small images and the
    default ``rtol``, scores are uneven by some hundredths of a decibel.

    **Without ground truth**, ``metric="sure"`` takes deepinv's Monte Carlo estimate
    :class:`deepinv.loss.SureGaussianLoss` of :math:`\tfrac1m \|A\hat x - A x\|^2`,
    which needs Gaussian noise of known level (``physics.noise_model``) and one more
    reconstruction per setting. Counts, of ``PoissonNoise`` or ``PoissonGaussianNoise``
    or of a model with ``data_fidelity=PoissonLikelihood(gain)``, have the like. All
    other noise is an error. In denoising this is the mean squared error. With any
    other operator it sees the error of the *measured* part of the image only: it says
    nothing about what :math:`A` does not measure, and should not be used where that is
    much (inpainting, undersampled MRI, super-resolution).

    **Interrupted** by the keyboard, the search returns what it has, with
    ``complete=False`` and a warning. If a candidate raises an error, the error carries
    the result so far as its attribute ``tuning``. The file ``log`` has every finished
    trial in both cases.

    |sep|

    :Example:

    >>> import deepinv as dinv, torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.tuning import tune
    >>> x = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    >>> model = DEAL(pretrained=None, num_filters=4)
    >>> physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    >>> result = tune(model, physics, [x])
    >>> x_hat = model(physics(x), physics, **result.settings)

    :param deepinv.models.Reconstructor model: a model of this package; or any other,
        called as ``model(y, physics, lambda_reg=...)``, to tune a rival with the same
        care: ``converged`` and ``n_iter`` are then NaN, and candidates are tried one by
        one. Models of others need a ``lambda_reg`` to start at. Only DEAL and,
        which rescale their weights, SAFI and MMR have a ``sigma`` to choose, only
        dictionaries a ``beta``.
    :param deepinv.physics.LinearPhysics physics: forward operator with its noise.
        ``None`` to denoise given pairs.
    :param Dataset, DataLoader, Iterable, torch.Tensor dataset: ground-truth images
        ``(C, H, W)`` or ``(B, C, H, W)``, from which measurements are drawn once, or
        what deepinv's datasets and loaders give: pairs ``(x, y)``, triples
        ``(x, y, params)`` or dictionaries of these, batched unless ``x`` has three
        dimensions or it is a :class:`torch.utils.data.Dataset`.
    :param deepinv.loss.metric.Metric, str metric: called as ``metric(x_hat, x)``; its
        ``lower_better`` says which way is better; or ``"sure"``.
        :class:`deepinv.loss.metric.PSNR` if ``None``.
    :param float lambda_reg: where the search starts; if ``None``, at the model's own
        value, which is 1 where it has none, and the learned one for denoising.
    :param float sigma: noise level of the model: where its search starts, or fixed if
        ``tune_sigma`` is false. ``None``: the model's own.
    :param bool tune_sigma: choose ``sigma`` too.
    :param float beta: coupling of a dictionary: where its search starts, or fixed if
        ``tune_beta`` is false. ``None``: the model's own.
    :param bool tune_beta: choose ``beta`` too.
    :param int seed: seed of the measurements that are drawn.
    :param str log: file to which each trial is appended as it is done (CSV).
    :param bool progress: show a progress bar; on terminals if ``None``.
    :param object search: how far, how finely and how long to search: ``spread``,
        ``precision``, ``max_trials`` and ``batch_candidates`` as in :class:`Search`.
    :return: a :class:`TuningResult`.
    :raises ValueError: for a parameter that the model does not have or use, an empty
        validation set, a score that is not finite, values
        that are not positive, or missing ground truth or noise level.
    :raises TypeError: for a model, metric or data of another kind.
    """
    given = {"lambda_reg": lambda_reg, "sigma": sigma, "beta": beta}
    tuned = {"lambda_reg": True, "sigma": tune_sigma, "beta": tune_beta}
    names = [name for name in POWERS if tuned[name]]
    check_parameters(model, given, names)
    scorer, options = make_scorer(metric, seed, model), Search(**search)
    problems = read_problems(model, physics, dataset, seed)
    scorer.check(problems)
    start = first_values(model, problems[0], given, names)
    fixed = {n: float(v) for n, v in given.items() if v is not None and n not in names}
    result = TuningResult(scorer.name, scorer.lower_better, [], fixed=fixed)
    batched = options.batch_candidates and isinstance(model, REPORTING)

    with Recorder(result, log, options.budget(len(names)), progress) as recorder:

        def costs(points: Sequence[np.ndarray]) -> list[float]:
            candidates = [
                dict(zip(names, np.exp(point).tolist(), strict=True))
                for point in points
            ]
            size = max(1, len(points)) if batched else 1
            return [
                recorder.add(trial)
                for i in range(0, len(points), size)
                for trial in _evaluate(
                    model, problems, candidates[i : i + size], fixed, scorer
                )
            ]

        result.complete = minimise(
            costs,
            np.log(start),
            np.array([POWERS[name] for name in names]) * math.log(options.spread),
            math.log(options.precision),
            recorder.budget,
        )
    return result


@torch.no_grad()
def _evaluate(
    model: Reconstructor,
    problems: Sequence[Problem],
    candidates: Sequence[dict[str, float]],
    fixed: dict[str, float],
    scorer: MetricScorer | SureScorer,
) -> list[Trial]:
    """Tries some settings, all in one batch."""
    start = time.perf_counter()
    scores: list[list[float]] = [[] for _ in candidates]
    converged: list[list[float]] = [[] for _ in candidates]
    n_iter: list[list[float]] = [[] for _ in candidates]
    for problem in problems:
        size = len(problem)
        values = {
            name: torch.tensor(
                [c[name] for c in candidates], dtype=torch.float64
            ).repeat_interleave(size)
            for name in candidates[0]
        }
        info = None
        with warnings.catch_warnings():
            # Whether candidates converge is part of their trial.
            warnings.simplefilter("ignore", ConvergenceWarning)
            if isinstance(model, REPORTING):
                x_hat, info = model(
                    _repeat(problem.y, len(candidates)),
                    problem.physics,
                    return_info=True,
                    **fixed,
                    **values,
                )
            else:
                x_hat = model(problem.y, problem.physics, **candidates[0])
            for i, candidate in enumerate(candidates):
                own = slice(i * size, (i + 1) * size)

                settings = {**fixed, **candidate}
                scale = getattr(info, "scale", None)
                scale = None if scale is None else scale[own]
                again = partial(_reconstruct_again, model, settings, scale)
                score = scorer(problem, x_hat[own], again)
                if not bool(torch.isfinite(score).all()):
                    raise ValueError(
                        f"The metric {scorer.name} gave {score.tolist()} for "
                        f"{candidate} on images of the validation set, which cannot be "
                        "compared."
                    )
                # A metric that averages itself counts once per image all the same.
                scores[i] += score.expand(size).tolist()
                if info is not None:
                    converged[i] += info.succeeded[own].tolist()
                    n_iter[i] += info.n_iter[own].tolist()
    seconds = (time.perf_counter() - start) / len(candidates)
    return [
        Trial(
            candidate["lambda_reg"],
            candidate.get("sigma"),
            candidate.get("beta"),
            float(np.mean(scores[i])),
            float(np.mean(converged[i] or math.nan)),
            float(np.mean(n_iter[i] or math.nan)),
            seconds,
        )
        for i, candidate in enumerate(candidates)
    ]


def _reconstruct_again(
    model: Reconstructor,
    settings: dict[str, float],
    scale: Tensor | None,
    y: Any,
    physics: Any,
) -> Tensor:
    """Reconstructs from other measurements, of which the intensity must be the same."""
    if scale is None:
        x_hat: Tensor = model(y, physics, **settings)
        return x_hat
    x_hat, info = model(y, physics, return_info=True, **settings)
    if not torch.equal(info.scale, scale):
        raise ValueError(
            f"The intensity of the images was guessed as {scale.tolist()}, and as "
            f"{info.scale.tolist()} from measurements that hardly differ, which makes "
            "metric='sure' meaningless. Give the model scale=, a number."
        )
    return x_hat


def _repeat(y: Any, n: int) -> Any:
    if isinstance(y, TensorList):
        return TensorList([_repeat(part, n) for part in y])
    return y.repeat(n, *[1] * (y.ndim - 1))
