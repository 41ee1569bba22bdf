"""Runs a model on the images of a task, and prints the scores."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from deepinv.loss.metric import PSNR, SSIM, Metric
from deepinv.models import Reconstructor
from torch import Tensor
from tqdm import tqdm

from deepinv_deal._atomic import replacing
from deepinv_deal.evaluation.baselines import TotalVariation
from deepinv_deal.evaluation.published import PUBLISHED, SOURCE
from deepinv_deal.evaluation.tasks import Task
from deepinv_deal.models import DEAL, SynthesisInfo, SynthesisModel
from deepinv_deal.tuning import tune
from deepinv_deal.tuning.run import REPORTING


@dataclass
class Score:
    """
    One image under one condition.

    :param str image: name of the image.
    :param float sigma: noise level in gray levels.
    :param float psnr: peak signal-to-noise ratio of the clipped estimate, dB.
    :param float ssim: structural similarity of the clipped estimate.
    :param float seconds: wall time.
    :param int n_iter: outer iterations, 0 for other methods.
    :param int cg_iter: iterations of the inner solver, conjugate gradients for DEAL; 0
        for other methods.
    :param float residual: nonlinear residual, NaN for other methods.
    :param bool converged: whether the solver met its tolerance, or has none.
    :param str setting: operator, if the task has several.
    :param float lambda_reg: regularization weight, NaN if there was none.
    :param float beta: coupling, NaN for methods other than dictionaries.
    """

    image: str
    sigma: float
    psnr: float
    ssim: float
    seconds: float
    n_iter: int = 0
    cg_iter: int = 0
    residual: float = math.nan
    converged: bool = True
    setting: str = ""
    lambda_reg: float = math.nan
    beta: float = math.nan


def add_noise(x: Tensor, sigma: float) -> Tensor:
    """
    Adds the noise of the published protocol: always the same, and not clipped.

    It is drawn as ``np.random.seed(0); np.random.normal(0, sigma, x.shape[1:])``,
    without touching NumPy's global state.

    :param torch.Tensor x: one image, shape ``(1, C, H, W)``.
    :param float sigma: noise level in [0, 1] units.
    """
    noise = np.random.RandomState(0).normal(0, sigma, x.shape[1:])
    return x + torch.from_numpy(noise).to(x)


def evaluate(
    model: Reconstructor,
    task: Task,
    images: Iterable[tuple[str, Tensor]],
    *,
    lambda_reg: float | None = None,
    sigma: float | None = None,
    beta: float | None = None,
    progress: bool | None = None,
) -> list[Score]:
    """
    Reconstructs every image under every condition of a task; scores what is clipped.

    :param deepinv.models.Reconstructor model: a model of this package, for MRI with
        ``complex_mode="real"`` as published; or another, called as
        ``model(y, physics, lambda_reg=...)`` or, without a weight, ``model(y,
        physics)``.
    :param Task task: made by one of ``TASKS``, perhaps tuned by :func:`tune_task`.
    :param Iterable images: pairs of name and 8-bit image ``(C, H, W)``.
    :param float lambda_reg: weight; that of each condition if ``None``.
    :param float sigma: noise level of DEAL in gray levels; the published one if
        ``None``.
    :param float beta: coupling of a dictionary; if ``None``, that of each condition
        unless ``lambda_reg`` is given, else the model's own.
    :param bool progress: show a progress bar; on terminals if ``None``.
    :return: list of :class:`Score`.
    :raises ValueError: if there is no image, no published weight and none is given, or
        ``beta`` is given to a model that has none.
    """
    reporting, deal = isinstance(model, REPORTING), isinstance(model, DEAL)
    if beta is not None and not isinstance(model, SynthesisModel):
        raise ValueError(
            f"beta is for dictionaries, not for {type(model).__name__}, got {beta}."
        )
    settings = _settings(model, task, sigma)
    if reporting:
        settings["return_info"] = True
    for condition in task.conditions:
        if (
            deal
            and task.sigma is not None
            and lambda_reg is condition.lambda_reg is None
        ):
            raise ValueError(
                f"No weight was published for {task.name} at noise "
                f"{condition.noise:g}. Give lambda_reg, or choose it on other images "
                "(deepinv_deal.evaluation.tune_task; --tune DIR on the command line)."
            )
    images = list(images)
    todo = [(c, *image) for c in task.conditions for image in images]
    if not todo:
        raise ValueError("There is no image to evaluate on.")
    bar = tqdm(
        todo,
        task.name.capitalize(),
        disable=None if progress is None else not progress,
    )
    scores, device = [], _device_of(model)
    for condition, name, image in bar:
        x = task.ground_truth(image)
        y, physics = _on(device, *condition.measure(x))
        weight = lambda_reg
        if weight is None and (deal or condition.tuned):
            weight = condition.lambda_reg  # the published one is of no use to others
        own = settings if weight is None else {**settings, "lambda_reg": weight}
        coupling = beta
        if beta is None and lambda_reg is None and isinstance(model, SynthesisModel):
            coupling = condition.beta  # both were chosen together
        if coupling is not None:
            own = {**own, "beta": coupling}
        start = time.perf_counter()
        with torch.no_grad():
            result = model(y, physics, **own)
        seconds = time.perf_counter() - start
        extra: dict[str, Any] = {}
        if reporting:
            result, info = result
            extra = {
                "n_iter": int(info.n_iter),
                "cg_iter": int(info.inner_iter),
                "residual": float(info.residual),
                "converged": bool(info.succeeded),
                "lambda_reg": float(info.lambda_reg),
            }
            if isinstance(info, SynthesisInfo):
                extra["beta"] = float(info.beta)
        elif weight is not None:
            extra = {"lambda_reg": weight}
        psnr, ssim = quality(task.compare(result.cpu()), task.compare(x))
        scores.append(
            Score(
                name,
                condition.noise,
                psnr,
                ssim,
                seconds,
                setting=condition.setting,
                **extra,
            )
        )
    return scores


def tune_task(
    model: Reconstructor,
    task: Task,
    images: Iterable[tuple[str, Tensor]],
    *,
    sigma: float | None = None,
    progress: bool | None = None,
) -> Task:
    """
    Chooses the weight of every condition by :func:`deepinv_deal.tune`, by PSNR.

    For dictionaries the coupling ``beta`` is chosen with it, except for denoising.

    :param deepinv.models.Reconstructor model: as in :func:`evaluate`.
    :param Task task: made by one of ``TASKS``.
    :param Iterable images: pairs of name and 8-bit image ``(C, H, W)``, not those that
        will be reported; of one size, except for denoising.
    :param float sigma: noise level of DEAL in gray levels; the published one if
        ``None``.
    :param bool progress: show progress bars; on terminals if ``None``.
    :return: the task with these weights and couplings.
    :raises ValueError: if there is no image, or for images of several sizes.
    """
    truths = [task.ground_truth(image) for _, image in images]
    shapes = {tuple(x.shape) for x in truths}
    if len(shapes) > 1 and task.sigma is not None:
        raise ValueError(
            f"Tuning needs images of one size, the folder has {sorted(shapes)}."
        )

    def compared(x_hat: Tensor, x: Tensor) -> Tensor:
        return PSNR()(task.compare(x_hat).clamp(0, 1), task.compare(x))

    metric = Metric(metric=compared)
    metric.lower_better = False
    settings = _settings(model, task, sigma)
    tune_beta = isinstance(model, SynthesisModel) and task.sigma is not None
    conditions, device = [], _device_of(model)
    for condition in task.conditions:
        measured = [(x.to(device), *_on(device, *condition.measure(x))) for x in truths]
        if not measured:
            raise ValueError("There is no image to tune on.")
        start: float | None = None
        if isinstance(model, DEAL):
            # The noise of MRI is small, and so is its weight.
            start = 0.01 if task.mri else condition.lambda_reg
        elif isinstance(model, TotalVariation):
            start = condition.noise / 255 * (0.8 if task.sigma is None else 0.2)
        result = tune(
            model,
            measured[0][2],
            [(x, y) for x, y, _ in measured],
            metric=metric,
            lambda_reg=start,
            tune_beta=tune_beta,
            progress=progress,
            **settings,
        )
        best = result.best
        conditions.append(
            replace(condition, lambda_reg=best.lambda_reg, beta=best.beta, tuned=True)
        )
    return replace(task, conditions=tuple(conditions))


def _device_of(model: Reconstructor) -> torch.device:
    """Where a model computes."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _on(device: torch.device, y: Any, physics: Any) -> tuple[Any, Any]:
    """Moves what was measured on the CPU, where the noise is the same for all."""
    return y.to(device), physics.to(device)


def _settings(model: Reconstructor, task: Task, sigma: float | None) -> dict[str, Any]:
    """The noise level of the model, if it has one that is not that of the data."""
    if not isinstance(model, DEAL):
        if sigma is not None:
            raise ValueError(
                "The noise level of the model can be chosen for DEAL only, not for "
                f"{type(model).__name__}, got sigma={sigma}."
            )
        return {}
    level = task.sigma if sigma is None else sigma
    if level is None:
        return {}
    return {"sigma": level / 255}


def quality(x_hat: Tensor, x: Tensor) -> tuple[float, float]:
    """
    Returns mean PSNR (dB) and SSIM of the estimate clipped to [0, 1].

    :param torch.Tensor x_hat: estimates, shape ``(B, C, H, W)``.
    :param torch.Tensor x: ground truth, same shape, in [0, 1].
    """
    x_hat = x_hat.clamp(0, 1)
    return float(PSNR()(x_hat, x).mean()), float(SSIM()(x_hat, x).mean())


def summarise(
    scores: Sequence[Score],
    task: str | None = None,
    channels: int = 1,
    *,
    differences: Sequence[str] = (),
) -> str:
    """
    Returns a table of means, and the published figures for comparison.

    :param list scores: from :func:`evaluate`.
    :param str task: name of the task whose published figures are added.
    :param int channels: 1 (gray) or 3 (colour).
    :param list differences: words for what was not done as published.
    """
    head = "sigma  images   PSNR    SSIM   n_iter  cg_iter  converged  s/image  setting"
    lines = [head.removesuffix("  setting")]
    for sigma in dict.fromkeys(score.sigma for score in scores):
        level = [score for score in scores if score.sigma == sigma]
        settings = list(dict.fromkeys(score.setting for score in level))
        if settings != [""]:
            lines[0] = head
        for setting in settings:
            own = [score for score in level if score.setting == setting]
            lines.append(_line(sigma, own, setting))
        if len(settings) > 1:
            lines.append(_line(sigma, level, "mean"))
    if task:
        lines += _beside(scores, task, channels, differences)
    return "\n".join(lines)


def _line(sigma: float, scores: Sequence[Score], setting: str) -> str:
    psnr, ssim, n_iter, cg_iter, converged, seconds = (
        sum(getattr(score, name) for score in scores) / len(scores)
        for name in ("psnr", "ssim", "n_iter", "cg_iter", "converged", "seconds")
    )
    images = len({score.image for score in scores})
    return (
        f"{sigma:5g}  {images:6d}  {psnr:5.2f}  {ssim:6.4f}  {n_iter:6.1f}  "
        f"{cg_iter:7.1f}  {converged:9.0%}  {seconds:7.2f}  {setting}"
    ).rstrip()


def _beside(
    scores: Sequence[Score], task: str, channels: int, known: Sequence[str]
) -> list[str]:
    """The published figures at the noise levels and settings of the scores."""
    keys = {(score.sigma, score.setting) for score in scores}
    levels = {sigma for sigma, _ in keys}
    rows = [row for row in PUBLISHED if row.task == task]
    fitting = [
        row
        for row in rows
        if row.noise in levels
        and (
            not row.setting
            or any(s == row.noise and t.endswith(row.setting) for s, t in keys)
        )
    ]
    fitting = [row for row in fitting if row.channels == channels] or fitting
    if not fitting:
        return ["", f"Published ({SOURCE}): nothing at these noise levels or settings."]
    lines = ["", f"Published ({SOURCE}), PSNR in dB:"]
    for row in fitting:
        figures = ", ".join(f"{name} {psnr:.2f}" for name, psnr in row.psnr.items())
        colour = "colour" if row.channels == 3 else "gray"
        lines.append(f"{row.noise:5g}  {figures}  ({row.data}; {colour})")
    images = len({score.image for score in scores})
    total = {row.images for row in fitting}
    differences = list(known)
    if images not in total and not (task == "deblurring" and images == 3):
        differences.append(
            f"{images} image{'s' * (images != 1)} instead of {min(total)}"
        )
    if channels not in {row.channels for row in fitting}:
        differences.append("gray instead of colour" if channels == 1 else "colour")
    if any(t.startswith(("gaussian:", "motion:", "square:")) for _, t in keys):
        differences.append("other kernels")
    if task == "mri-multi-coil-8x":
        differences.append("simulated coil maps")
    lines.append(
        f"NOT the published setting: {', '.join(differences)}."
        if differences
        else "Comparable only if the images are those of the data set named."
    )
    return lines


def write_csv(scores: Sequence[Score], path: str | os.PathLike[str]) -> None:
    """
    Writes one line per image and condition.

    :param list scores: from :func:`evaluate`.
    :param str path: file to write.
    """
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, [field.name for field in fields(Score)])
        writer.writeheader()
        writer.writerows(asdict(score) for score in scores)
