"""The published denoising protocol as code: images in, PSNR and SSIM out."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepinv.loss.metric import PSNR, SSIM
from torch import Tensor
from tqdm import tqdm

from deepinv_deal.models import DEAL


@dataclass
class Score:
    """
    One image at one noise level.

    :param str image: name of the image.
    :param float sigma: noise level in gray levels.
    :param float psnr: peak signal-to-noise ratio of the clipped estimate, dB.
    :param float ssim: structural similarity of the clipped estimate.
    :param float seconds: wall time.
    :param int n_iter: outer iterations, 0 for other methods.
    :param int cg_iter: conjugate gradient iterations, 0 for other methods.
    :param float residual: nonlinear residual, NaN for other methods.
    :param bool converged: whether the solver met its tolerance.
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


def evaluate_denoising(
    denoiser: Callable[..., Any],
    images: Iterable[tuple[str, Tensor]],
    sigmas: Sequence[float] = (5, 15, 25),
    *,
    progress: bool | None = None,
) -> list[Score]:
    """
    Denoises every image at every noise level and scores the clipped estimates.

    :param Callable denoiser: called as ``denoiser(y, sigma)``, sigma in [0, 1] units; a
        :class:`deepinv_deal.DEAL` also reports iterations and convergence.
    :param Iterable images: pairs of name and 8-bit image ``(C, H, W)``.
    :param tuple sigmas: noise levels in gray levels.
    :param bool progress: show a progress bar; on terminals if ``None``.
    :return: list of :class:`Score`.
    """
    todo = [(sigma, name, image) for sigma in sigmas for name, image in images]
    bar = tqdm(todo, "Denoising", disable=None if progress is None else not progress)
    scores = []
    for sigma, name, image in bar:
        x = image[None].float() / 255
        y = add_noise(x, sigma / 255)
        start = time.perf_counter()
        extra: dict[str, Any] = {}
        with torch.no_grad():
            if isinstance(denoiser, DEAL):
                x_hat, info = denoiser(y, sigma=sigma / 255, return_info=True)
                extra = {
                    "n_iter": int(info.n_iter),
                    "cg_iter": int(info.cg_iter),
                    "residual": float(info.residual),
                    "converged": bool(info.converged),
                }
            else:
                x_hat = denoiser(y, sigma / 255)
        seconds = time.perf_counter() - start
        psnr, ssim = quality(x_hat, x)
        scores.append(Score(name, sigma, psnr, ssim, seconds, **extra))
    return scores


def quality(x_hat: Tensor, x: Tensor) -> tuple[float, float]:
    """
    Returns mean PSNR (dB) and SSIM of the estimate clipped to [0, 1].

    :param torch.Tensor x_hat: estimates, shape ``(B, C, H, W)``.
    :param torch.Tensor x: ground truth, same shape, in [0, 1].
    """
    x_hat = x_hat.clamp(0, 1)
    return float(PSNR()(x_hat, x).mean()), float(SSIM()(x_hat, x).mean())


def summarise(scores: Sequence[Score]) -> str:
    """Returns a table of means per noise level."""
    lines = ["sigma  images   PSNR    SSIM   n_iter  cg_iter  converged  s/image"]
    for sigma in dict.fromkeys(score.sigma for score in scores):
        own = [score for score in scores if score.sigma == sigma]
        psnr, ssim, n_iter, cg_iter, converged, seconds = (
            sum(getattr(score, name) for score in own) / len(own)
            for name in ("psnr", "ssim", "n_iter", "cg_iter", "converged", "seconds")
        )
        lines.append(
            f"{sigma:5g}  {len(own):6d}  {psnr:5.2f}  {ssim:6.4f}  {n_iter:6.1f}  "
            f"{cg_iter:7.1f}  {converged:9.0%}  {seconds:7.2f}"
        )
    return "\n".join(lines)


def write_csv(scores: Sequence[Score], path: str | os.PathLike[str]) -> None:
    """Writes one line per image and noise level."""
    with open(Path(path), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Score)])
        writer.writeheader()
        writer.writerows(asdict(score) for score in scores)


def tuned_tv(
    images: Sequence[tuple[str, Tensor]], sigmas: Sequence[float], steps: int = 5
) -> Callable[[Tensor, float], Tensor]:
    """
    Tunes deepinv's total-variation denoiser, one threshold per noise level.

    The threshold ``factor * sigma`` has the best mean PSNR on ``images`` among factors
    on a logarithmic grid that is refined once.

    :param list images: pairs of name and 8-bit image.
    :param tuple sigmas: noise levels in gray levels.
    :param int steps: points of each grid.
    :return: a function of ``(y, sigma)``.
    """
    from deepinv.models import TVDenoiser

    tv = TVDenoiser(n_it_max=300)
    factors = {}
    for sigma in sigmas:
        tried: dict[float, float] = {}

        def score(factor: float, sigma: float = sigma, tried: Any = tried) -> None:
            if factor not in tried:
                own = evaluate_denoising(
                    lambda y, s: tv(y, factor * s), images, [sigma], progress=False
                )
                tried[factor] = sum(s.psnr for s in own) / len(own)

        for spread in (2.0, 2.0 ** (2 / (steps - 1))):
            centre = max(tried, key=lambda f: tried[f]) if tried else 0.8
            for exponent in np.linspace(-1, 1, steps):
                score(float(centre * spread**exponent))
        factors[round(sigma / 255, 6)] = max(tried, key=lambda f: tried[f])
    return lambda y, s: tv(y, factors[round(s, 6)] * s)
