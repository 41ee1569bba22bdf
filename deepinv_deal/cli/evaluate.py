"""``deepinv-deal evaluate``: the published protocols on a folder of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from deepinv_deal.cli._options import (
    Commands,
    add_model_options,
    channels_of,
    make_model,
    noise_level,
)

if TYPE_CHECKING:
    from deepinv.models import Reconstructor
    from torch import Tensor

    from deepinv_deal.evaluation import Task

#: The windows of SSIM must fit in.
SMALLEST_CROP = 16

#: The keys of :data:`deepinv_deal.evaluation.TASKS`, whose import imports torch.
TASK_NAMES = (
    "denoising",
    "super-resolution-x2",
    "super-resolution-x3",
    "super-resolution-x4",
    "deblurring",
    "mri-single-coil-4x",
    "mri-single-coil-8x",
    "mri-multi-coil-8x",
)

#: Rivals, and what models improve on.
OTHERS = ("tv", "adjoint")


def add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="PSNR and SSIM of a published protocol on a folder of images",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument(
        "--task", choices=TASK_NAMES, default="denoising", help="protocol to follow"
    )
    evaluate.add_argument("--data", required=True, help="folder of images")
    evaluate.add_argument(
        "--sigma",
        type=partial(noise_level, zero=True),
        nargs="+",
        help="noise levels, gray levels; if unset, the published ones",
    )
    evaluate.add_argument(
        "--crop",
        type=int,
        metavar="N",
        help="only the central N x N pixels of every image",
    )
    evaluate.add_argument(
        "--only",
        metavar="TEXT",
        help="of a task with several operators, those whose name holds this, as in "
        "'blur 1.6'",
    )
    evaluate.add_argument(
        "--kernel",
        action="append",
        help="deblurring: FILE (.npy, .npz:NAME, .mat:NAME/INDEX, image), "
        "gaussian:STD, motion:SIZE or square:SIZE; may be repeated",
    )
    evaluate.add_argument(
        "--lambda-reg", type=float, help="weight; if unset, the published one"
    )
    evaluate.add_argument(
        "--beta", type=float, help="coupling of a dictionary; if unset, its own"
    )
    evaluate.add_argument(
        "--tune",
        metavar="DIR",
        help="choose the weight (and, of dictionaries, beta, but for denoising) on the "
        "images of another folder, for each condition",
    )
    evaluate.add_argument(
        "--sigma-model",
        type=float,
        help="noise level of DEAL, gray levels; if unset, the published one",
    )
    add_model_options(
        evaluate,
        OTHERS,
        "; 'tv' is deepinv's total variation (needs --tune or --lambda-reg), 'adjoint' "
        "the noisy or zero-filled image, both gray",
    )
    evaluate.add_argument("--csv", help="file for one line per image and condition")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from deepinv_deal._atomic import check_writable
    from deepinv_deal.evaluation import (
        TASKS,
        evaluate,
        summarise,
        tune_task,
        write_csv,
    )
    from deepinv_deal.files import load_image_folder

    if args.kernel and args.task != "deblurring":
        raise ValueError(f"--kernel is for --task deblurring, not {args.task}.")
    given = (args.lambda_reg, args.beta)
    if args.tune and given != (None, None):
        raise ValueError("Give either --lambda-reg and --beta, or --tune, not both.")
    if args.sigma and 0 in args.sigma and args.task == "denoising":
        raise ValueError("--sigma 0 leaves nothing to denoise. Give a positive level.")
    if args.csv:
        check_writable(args.csv)
    options = {"kernels": args.kernel} if args.kernel else {}
    task = TASKS[args.task](noise=args.sigma, **options)
    every = task
    if args.only is not None:
        task = _only(task, args.only)
    model, channels = _method(args, task)
    images = load_image_folder(args.data, channels)
    if args.crop is not None:
        task = _cropped(task, args.crop)
    differences = _differences(task, every, channels, [x for _, x in images])
    if args.tune:
        validation = load_image_folder(args.tune, channels)
        task = tune_task(model, task, validation, sigma=args.sigma_model)
        for condition in task.conditions:
            beta = "" if condition.beta is None else f", beta {condition.beta:.4g}"
            print(
                f"{condition.setting or task.name}, noise {condition.noise:g}: "
                f"lambda_reg {condition.lambda_reg:.4g}{beta}, chosen on "
                f"{len(validation)} images",
                file=sys.stderr,
            )
    scores = evaluate(
        model,
        task,
        images,
        lambda_reg=args.lambda_reg,
        sigma=args.sigma_model,
        beta=args.beta,
    )
    try:
        print(summarise(scores, args.task, channels, differences=differences))
    finally:  # whoever reads what is printed
        if args.csv:
            write_csv(scores, args.csv)
    return 0 if all(score.converged for score in scores) else 1


def _only(task: Task, text: str) -> Task:
    """Returns the task with the operators whose name holds the text."""
    names = dict.fromkeys(c.setting or task.name for c in task.conditions)
    kept = [c for c in task.conditions if text in (c.setting or task.name)]
    if not kept:
        raise ValueError(f"--only {text!r} fits none of {', '.join(names)}.")
    return replace(task, conditions=tuple(kept))


def _cropped(task: Task, side: int) -> Task:
    """Returns the task on the centres of the images."""
    if side < SMALLEST_CROP:
        raise ValueError(f"--crop must be at least {SMALLEST_CROP}, got {side}.")
    return replace(task, side=min(side, task.side or side))


def _differences(
    task: Task, every: Task, channels: int, images: Sequence[Tensor]
) -> list[str]:
    """Says what the options left out of a task."""
    differences = []
    if len(task.conditions) < len(every.conditions):
        differences.append("some operators only")
    as_published = task.name == "denoising" and (channels, task.side) == (3, 256)
    may_differ = task.side != every.side and not as_published
    if may_differ and any(
        task.ground_truth(x).shape != every.ground_truth(x).shape for x in images
    ):
        differences.append("cropped images")
    return differences


def _method(args: argparse.Namespace, task: Task) -> tuple[Reconstructor, int]:
    """Returns the method, and the number of channels of its images."""
    from deepinv_deal.evaluation import Adjoint, TotalVariation

    if args.method not in OTHERS:
        options = {"complex_mode": "real"} if task.mri else {}
        model = make_model(args, 1, **options)
        return model, channels_of(model)
    for name in ("pretrained", "prior", "solver", "inner_dtype", "rtol", "max_iter"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(
                f"--{option} is for models, not for --method {args.method}."
            )
    if args.method == "adjoint":
        if args.tune or args.lambda_reg is not None:
            raise ValueError("--method adjoint has no weight: no --tune, --lambda-reg.")
        return Adjoint(), 1
    if not args.tune and args.lambda_reg is None:
        raise ValueError(
            "--method tv has no weight of its own: give --tune DIR, a folder of other "
            "images, or --lambda-reg."
        )
    return TotalVariation(real=task.mri), 1
