"""``deepinv-deal denoise``: files or folders of noisy images."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from deepinv_deal.cli._likelihood import add_likelihood_option
from deepinv_deal.cli._options import (
    BAD_INPUT,
    Commands,
    add_model_options,
    add_outcome_options,
    add_slices_option,
    add_truth_option,
    add_truth_unit_options,
    add_white_option,
    channels_of,
    make_model,
    naming,
    noise_level,
    print_quality,
    read_truth,
    report,
    say,
)


def add_denoise(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    denoise = commands.add_parser(
        "denoise",
        help="denoise an image, or all images of a folder",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    denoise.add_argument(
        "input",
        help="image, stack or volume: picture, .nii, .nii.gz, .dcm, .npy, .npz:NAME, "
        ".pt, .h5:NAME, .mat:NAME; a folder of them, or with a DICOM series",
    )
    denoise.add_argument(
        "output", help="one of these; a folder if INPUT is one, or a file for a series"
    )
    denoise.add_argument(
        "--sigma",
        type=_level,
        help="noise level in gray levels (of 255 for white, whatever the file), or "
        "'estimate'; needed unless --likelihood is poisson or transmission",
    )
    denoise.add_argument(
        "--lambda-reg", type=float, help="weight; if unset, the learned one"
    )
    add_white_option(denoise)
    denoise.add_argument(
        "--black",
        type=float,
        default=0.0,
        help="value in the file that is black, as -1000 for air in Hounsfield units",
    )
    add_slices_option(denoise, "pages", "denoised")
    add_truth_option(denoise)
    add_truth_unit_options(denoise)
    add_likelihood_option(denoise)
    add_model_options(denoise, default="deal_gray, deal_color for colour")
    add_outcome_options(denoise)
    denoise.set_defaults(run=_denoise)


def _level(text: str) -> float | str:
    if text == "estimate":
        return text
    return noise_level(text, "or 'estimate'")


def _denoise(args: argparse.Namespace) -> int:
    from deepinv_deal import DEAL

    args.likelihood.level(args.sigma, args.white)  # an error, if it is one
    if args.black and args.likelihood.has_unit:
        raise ValueError(
            f"--black is not for --likelihood {args.likelihood.kind}, whose numbers "
            "start at zero. Subtract it from the file."
        )
    settings = args.likelihood.settings(args.white)
    if args.slices is not None:  # volumes take minutes
        settings |= {"slices": args.slices, "show_progress_bar": None}
    models = cache(partial(make_model, args, **settings))  # by channels
    if args.sigma == "estimate" and not isinstance(models(1), DEAL):
        raise ValueError(
            f"--sigma estimate is for DEAL; {type(models(1)).__name__} needs a number."
        )
    from deepinv_deal.files import is_series

    source, target = Path(args.input), Path(args.output)
    if not source.is_dir() or is_series(source):
        converged = _one(models, args.input, target, args)
        return 1 if args.strict and not converged else 0
    return _folder(models, source, target, args)


def _folder(
    models: Callable[[int], Any], source: Path, target: Path, args: argparse.Namespace
) -> int:
    """Denoises all images of a folder; those that cannot be are listed at the end."""
    from tqdm import tqdm

    jobs = _jobs(source, target)
    if source.resolve() == target.resolve():
        say(["OUTPUT is INPUT: all but .jpg and .webp files are replaced."])
    if args.figure and len(jobs) > 1:
        raise ValueError("--figure draws one image; INPUT is a folder of several.")
    if args.truth and len(jobs) > 1:
        raise ValueError(
            "--truth is for one image; INPUT is a folder of several. `deepinv-deal "
            "evaluate` measures quality on a folder of true images."
        )
    converged, failures = [], []
    for file, result in tqdm(
        jobs, "Denoising", disable=True if len(jobs) == 1 else None
    ):
        try:
            converged.append(_one(models, str(file), result, args))
        except BAD_INPUT as error:
            failures.append(str(error))
    if failures:
        print(
            f"deepinv-deal: {len(failures)} of {len(jobs)} files were not denoised:",
            *failures,
            sep="\n  ",
            file=sys.stderr,
        )
    return 1 if failures or (args.strict and not all(converged)) else 0


def _jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Pairs of input and output below two folders."""
    from deepinv_deal.files import (
        IN_FOLDERS,
        NOT_IN_FOLDERS,
        WRITABLE,
        files_below,
        suffix_of,
    )

    if target.is_file() or (suffix_of(target) in WRITABLE and not target.is_dir()):
        raise ValueError(f"{source} is a folder, so OUTPUT must be one: got {target}.")
    inside = target.resolve()
    files = files_below(source, (*IN_FOLDERS, *NOT_IN_FOLDERS))
    if inside != source.resolve():  # results of an earlier run are no input
        files = [p for p in files if not p.resolve().is_relative_to(inside)]
    others = [p for p in files if suffix_of(p) in NOT_IN_FOLDERS]
    files = [p for p in files if suffix_of(p) in IN_FOLDERS]
    if others:
        say(
            [
                f"{len(others)} files of other kinds in {source} are left out, as "
                f"{others[0]}. Give them one by one, and DICOM series by their folder."
            ]
        )
    if not files:
        raise FileNotFoundError(
            f"No image in {source} (looked for {', '.join(IN_FOLDERS)})."
        )
    results = [_lossless(p.relative_to(source)) for p in files]
    number = Counter(results)
    results = [  # of a.jpg and a.png, the first becomes a.jpg.png
        result if number[result] == 1 else _distinct(file, source)
        for file, result in zip(files, results, strict=True)
    ]
    if len(set(results)) < len(results):
        twice = next(result for result, n in Counter(results).items() if n > 1)
        raise ValueError(
            f"Two files of {source} would both become {target / twice}. Rename one."
        )
    return [
        (file, target / result) for file, result in zip(files, results, strict=True)
    ]


def _lossless(path: Path) -> Path:
    """What was compressed with losses is not compressed so again."""
    return path.with_suffix(".png") if _lossy(path) else path


def _distinct(file: Path, source: Path) -> Path:
    path = file.relative_to(source)
    return path.with_name(path.name + ".png") if _lossy(path) else path


def _lossy(path: Path) -> bool:
    from deepinv_deal.files.decode import LOSSY

    return path.suffix.lower() in LOSSY


def _one(
    models: Callable[[int], Any], source: str, target: Path, args: argparse.Namespace
) -> bool:
    """Denoises one file; returns whether all of its pages converged."""
    import torch
    from tqdm import tqdm

    from deepinv_deal.files import (
        check_target,
        forgets_place,
        read_picture,
        write_picture,
    )

    white, is_volume = args.likelihood.white(args.white), args.slices is not None
    picture = read_picture(source, white, black=args.black, volume=is_volume)
    say(picture.notes)
    check_target(target, picture)
    if args.figure and len(picture.x) > 1:
        raise ValueError(
            f"--figure draws one image; {source} has {len(picture.x)} pages."
        )
    truth = None
    if args.truth:
        truth = read_truth(args, picture, volume=is_volume)
        if truth.shape != picture.x.shape:  # before it takes long
            raise ValueError(
                f"--truth has shape {tuple(truth.shape)}, and {source} "
                f"{tuple(picture.x.shape)}."
            )
    images = picture.volumes(source) if is_volume else picture.x
    several, what = len(images) > 1, "Volumes" if is_volume else "Pages"
    results, reports = [], []
    for number, image in enumerate(
        tqdm(images, what, disable=None if several else True)
    ):
        name = f"{source}[{number}]" if several else source
        start = time.perf_counter()
        model = models(image.shape[0])
        with naming(name):
            x_hat, info = _image(model, image[None], args)
        seconds = time.perf_counter() - start
        results.append(x_hat)
        reports.append((f"{name} -> {target}", info, seconds))
    result = torch.cat(results)
    result = picture.pages(result) if is_volume else result
    if forgets_place(target, picture):
        say([f"{target} does not keep where the voxels of {source} lie."])
    args.likelihood.doubt_rounding(target, result, picture)
    write_picture(target, result, picture)
    converged = all([report(*told, args.likelihood) for told in reports])
    if truth is not None:
        print_quality(result, truth, args.likelihood.shown_white(truth, args.white))
    if args.figure:
        from deepinv_deal.cli._figures import Panel, plot_reconstructions, save

        title = args.likelihood.kind if args.sigma is None else f"sigma {args.sigma}"
        white = args.likelihood.shown_white(x_hat, args.white)
        truth = None if truth is None else truth / white
        panel = Panel(title, truth, picture.x / white, x_hat / white, info)
        save(plot_reconstructions([panel]), args.figure)
    return converged


def _image(model: Any, x: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """
    Denoises one image ``(1, C, H, W)``, or a volume ``(1, C, D, H, W)``, by a model for
    gray or for colour images.
    """
    import torch

    channels = channels_of(model)
    y = x
    if channels == 1:
        y = x.transpose(0, 1)  # the channels of a colour image one by one
    elif x.shape[1] != channels:
        y = x.expand(-1, channels, *x.shape[2:])
    args.likelihood.check(y)
    sigma = args.likelihood.level(args.sigma, args.white)
    with torch.no_grad():
        x_hat, info = model(
            y, sigma=sigma, lambda_reg=args.lambda_reg, return_info=True
        )
    if channels == 1:
        x_hat = x_hat.transpose(0, 1)
    elif x.shape[1] == 1:
        x_hat = x_hat.mean(1, keepdim=True)
    return x_hat, info
