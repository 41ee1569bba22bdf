"""``deepinv-deal denoise``: files or folders of noisy images."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from deepinv_deal.cli._options import (
    Commands,
    add_model_options,
    add_outcome_options,
    channels_of,
    make_model,
    report,
)


def add_denoise(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    denoise = commands.add_parser(
        "denoise",
        help="denoise an image, or all images of a folder",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    denoise.add_argument(
        "input", help="image, .npy, .npz:NAME, .pt, .h5:NAME, .mat:NAME, or a folder"
    )
    denoise.add_argument("output", help="image, .npy or .pt; a folder if INPUT is one")
    denoise.add_argument(
        "--sigma",
        type=_level,
        required=True,
        help="noise level in gray levels (of 255 for white, whatever the file), or "
        "'estimate'",
    )
    denoise.add_argument(
        "--lambda-reg", type=float, help="weight; if unset, the learned one"
    )
    denoise.add_argument(
        "--white",
        type=float,
        help="value in the file that is white; if unset, 255 or 65535 for integers of "
        "8 or 16 bit, and 1 for floating point",
    )
    add_model_options(denoise, default="deal_gray, deal_color for colour")
    add_outcome_options(denoise)
    denoise.set_defaults(run=_denoise)


def _level(text: str) -> float | str:
    if text == "estimate":
        return text
    try:
        level = float(text)
        if not 0 < level <= 255:
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no noise level: a number between 0 and 255, or 'estimate'."
        ) from error
    return level


def _denoise(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from deepinv_deal import DEAL

    models = cache(partial(make_model, args))  # by channels
    if args.sigma == "estimate" and not isinstance(models(1), DEAL):
        raise ValueError(
            f"--sigma estimate is for DEAL; {type(models(1)).__name__} needs a number."
        )
    jobs = _jobs(Path(args.input), Path(args.output))
    if args.figure and len(jobs) > 1:
        raise ValueError("--figure draws one image; INPUT is a folder of several.")
    converged = [
        _one(models, source, target, args)
        for source, target in tqdm(
            jobs, "Denoising", disable=True if len(jobs) == 1 else None
        )
    ]
    return 1 if args.strict and not all(converged) else 0


def _jobs(source: Path, target: Path) -> list[tuple[str, Path]]:
    """Pairs of input and output."""
    from deepinv_deal.files import IMAGES

    if not source.is_dir():
        return [(str(source), target)]
    if target.suffix:
        raise ValueError(f"{source} is a folder, so OUTPUT must be one: got {target}.")
    kinds = (*IMAGES, ".npy", ".pt")
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in kinds)
    if not files:
        raise FileNotFoundError(
            f"No image in {source} (looked for {', '.join(kinds)})."
        )
    return [
        # What was compressed with losses is not compressed so again.
        (str(p), target / _lossless(p.relative_to(source)))
        for p in files
    ]


def _lossless(path: Path) -> Path:
    lossy = path.suffix.lower() in (".jpg", ".jpeg", ".webp")
    return path.with_suffix(".png") if lossy else path


def _one(
    models: Callable[[int], Any], source: str, target: Path, args: argparse.Namespace
) -> bool:
    import torch

    from deepinv_deal.files import read_picture, write_picture

    picture = read_picture(source, args.white)
    x = picture.x
    model = models(x.shape[1])
    channels = channels_of(model)
    if channels == 1:
        x = x.transpose(0, 1)  # the channels of a colour image one by one
    elif x.shape[1] != channels:
        x = x.expand(-1, channels, -1, -1)
    sigma = args.sigma if isinstance(args.sigma, str) else args.sigma / 255
    start = time.perf_counter()
    with torch.no_grad():
        x_hat, info = model(
            x, sigma=sigma, lambda_reg=args.lambda_reg, return_info=True
        )
    seconds = time.perf_counter() - start
    if channels == 1:
        x_hat = x_hat.transpose(0, 1)
    elif picture.x.shape[1] == 1:
        x_hat = x_hat.mean(1, keepdim=True)
    write_picture(target, x_hat, picture)
    converged = report(f"{source} -> {target}", info, seconds)
    if args.figure:
        from deepinv_deal.cli._figures import Panel, plot_reconstructions

        panel = Panel(f"sigma {args.sigma}", None, picture.x, x_hat, info)
        plot_reconstructions([panel]).savefig(args.figure, dpi=110)
    return converged
