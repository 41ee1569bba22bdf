"""``deepinv-deal evaluate``: the published protocols on a folder of images."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from deepinv_deal.cli._options import Commands, add_model_options, make_model


def add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    from deepinv_deal.evaluation import TASKS

    evaluate = commands.add_parser(
        "evaluate",
        help="PSNR and SSIM of a published protocol on a folder of images",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument(
        "--task", choices=list(TASKS), default="denoising", help="protocol to follow"
    )
    evaluate.add_argument("--data", required=True, help="folder of images")
    evaluate.add_argument(
        "--sigma",
        type=float,
        nargs="+",
        help="noise levels, gray levels; if unset, the published ones",
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
        "--tune",
        metavar="DIR",
        help="choose the weight on the images of another folder, for each condition",
    )
    evaluate.add_argument(
        "--sigma-model",
        type=float,
        help="noise level of the model, gray levels; if unset, the published one",
    )
    add_model_options(evaluate)
    evaluate.add_argument("--csv", help="file for one line per image and condition")
    evaluate.add_argument(
        "--tv",
        metavar="DIR",
        help="denoising: evaluate deepinv's TV denoiser, tuned on DIR, instead",
    )
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from deepinv_deal.evaluation import (
        TASKS,
        Score,
        evaluate,
        evaluate_denoising,
        summarise,
        tuned_tv,
        write_csv,
    )
    from deepinv_deal.training import load_image_folder

    if args.kernel and args.task != "deblurring":
        raise ValueError(f"--kernel is for --task deblurring, not {args.task}.")
    if args.tv and args.task != "denoising":
        raise ValueError(f"--tv is for --task denoising, not {args.task}.")
    if args.tune and args.lambda_reg is not None:
        raise ValueError("Give either --lambda-reg or --tune, not both.")
    options = {"kernels": args.kernel} if args.kernel else {}
    task = TASKS[args.task](noise=args.sigma, **options)
    scores: list[Score] = []
    if args.tv:
        channels, levels = 1, [condition.noise for condition in task.conditions]
        denoiser = tuned_tv(load_image_folder(args.tv, channels), levels)
        images = load_image_folder(args.data, channels)
        scores = evaluate_denoising(denoiser, images, levels)
    else:
        kind = {"complex_mode": "real"} if task.mri else {}
        model = make_model(args, warn=False, **kind)
        channels = model.prior[0].in_channels
        images = load_image_folder(args.data, channels)
        conditions = list(task.conditions)
        if args.tune:
            validation = load_image_folder(args.tune, channels)
            conditions = [
                replace(c, lambda_reg=_tuned(model, task, c, validation, args))
                for c in conditions
            ]
        scores = evaluate(
            model,
            replace(task, conditions=tuple(conditions)),
            images,
            lambda_reg=args.lambda_reg,
            sigma=args.sigma_model,
        )
    if args.csv:
        write_csv(scores, args.csv)
    print(summarise(scores, args.task, channels))
    return 0 if all(score.converged for score in scores) else 1


def _tuned(
    model: Any, task: Any, condition: Any, images: Any, args: argparse.Namespace
) -> float:
    """Chooses the weight of one condition on other images."""
    from deepinv.loss.metric import PSNR, Metric

    from deepinv_deal import tune

    def compared(x_hat: Any, x: Any) -> Any:
        return PSNR()(task.compare(x_hat).clamp(0, 1), task.compare(x))

    metric = Metric(metric=compared)
    metric.lower_better = False
    truths = [task.ground_truth(image) for _, image in images]
    # The noise of MRI is small, and so is its weight.
    start = 0.01 if task.mri else condition.lambda_reg
    level = task.sigma if args.sigma_model is None else args.sigma_model
    problems = [(x, condition.measure(x)) for x in truths]
    shapes = {tuple(x.shape) for x in truths}
    if len(shapes) > 1 and task.name != "denoising":
        raise ValueError(
            f"--tune needs images of one size, the folder has {sorted(shapes)}."
        )
    result = tune(
        model,
        problems[0][1][1],
        [(x, y) for x, (y, _) in problems],
        metric=metric,
        lambda_reg=start,
        sigma=None if level is None else level / 255,
    )
    print(
        f"{condition.setting or task.name}, noise {condition.noise:g}: lambda_reg "
        f"{result.lambda_reg:.4g}, {result.best.score:.2f} dB on {len(truths)} images",
        file=sys.stderr,
    )
    return result.lambda_reg
