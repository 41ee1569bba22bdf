"""``deepinv-deal evaluate``: the published protocols on a folder of images."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from deepinv_deal.cli._options import Commands, add_model_options, make_model

if TYPE_CHECKING:
    from deepinv.models import Reconstructor

    from deepinv_deal.evaluation import Task

#: Models of this package by their names on the command line.
MODELS = {
    "deal": "DEAL",
    "safi": "SAFI",
    "mmr": "MMR",
    "smooth-plus-sparse": "SmoothPlusSparse",
    "patch-synthesis": "PatchSynthesis",
}
METHODS = (*MODELS, "tv", "adjoint")


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
    add_model_options(evaluate, pretrained=None)
    evaluate.add_argument("--solver", help="solver of the dictionary models")
    evaluate.add_argument("--csv", help="file for one line per image and condition")
    evaluate.add_argument(
        "--method",
        choices=METHODS,
        default="deal",
        help="a model of this package (--pretrained FILE unless it has bundled "
        "weights), deepinv's total variation (needs --tune or --lambda-reg), or the "
        "adjoint (the noisy or zero-filled image); the last two on gray images, "
        "without the options of the models",
    )
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from deepinv_deal.evaluation import (
        TASKS,
        evaluate,
        summarise,
        tune_task,
        write_csv,
    )
    from deepinv_deal.training import load_image_folder

    if args.kernel and args.task != "deblurring":
        raise ValueError(f"--kernel is for --task deblurring, not {args.task}.")
    if args.tune and args.lambda_reg is not None:
        raise ValueError("Give either --lambda-reg or --tune, not both.")
    options = {"kernels": args.kernel} if args.kernel else {}
    task = TASKS[args.task](noise=args.sigma, **options)
    model, channels = _method(args, task)
    images = load_image_folder(args.data, channels)
    if args.tune:
        validation = load_image_folder(args.tune, channels)
        task = tune_task(model, task, validation, sigma=args.sigma_model)
        for condition in task.conditions:
            print(
                f"{condition.setting or task.name}, noise {condition.noise:g}: "
                f"lambda_reg {condition.lambda_reg:.4g}, chosen on {len(validation)} "
                "images",
                file=sys.stderr,
            )
    scores = evaluate(
        model, task, images, lambda_reg=args.lambda_reg, sigma=args.sigma_model
    )
    if args.csv:
        write_csv(scores, args.csv)
    print(summarise(scores, args.task, channels))
    return 0 if all(score.converged for score in scores) else 1


def _method(args: argparse.Namespace, task: Task) -> tuple[Reconstructor, int]:
    """Returns the method, and the number of channels of its images."""
    from deepinv_deal.evaluation import Adjoint, TotalVariation

    if args.method in MODELS:
        return _model(args, task)
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


def _model(args: argparse.Namespace, task: Task) -> tuple[Reconstructor, int]:
    """Returns a model of this package, and the number of channels of its images."""
    import deepinv_deal
    from deepinv_deal.models.patches import SynthesisModel

    kind = getattr(deepinv_deal, MODELS[args.method])
    if args.pretrained is None and args.method != "deal":
        raise ValueError(
            f"--method {args.method} has no bundled weights: give --pretrained FILE."
        )
    options: dict[str, object] = {"complex_mode": "real"} if task.mri else {}
    if args.solver is not None:
        if not issubclass(kind, SynthesisModel):
            raise ValueError(f"--solver is not for --method {args.method}.")
        options["solver"] = args.solver
    model = make_model(args, kind, warn=False, **options)
    prior = model.prior if issubclass(kind, SynthesisModel) else model.prior[0]
    return model, prior.in_channels
