"""The command ``deepinv-deal``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

RTOL_HELP = "tolerance on the nonlinear residual; if unset, that of DEAL"

#: Hyperparameters of the demo's inpainting problem: 1 was better than 0.3 by 0.2 dB on
#: two other photographs.
DEMO_INPAINTING = {"sigma": 15 / 255, "lambda_reg": 1.0}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    :param list argv: arguments; those of the process if ``None``.
    :return: exit code: 0 if all went well, 2 for bad input.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, TypeError, FileNotFoundError, FloatingPointError) as error:
        print(f"deepinv-deal: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepinv-deal", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_evaluate(commands)
    train = commands.add_parser("train", help="train a model on a folder of images")
    models = train.add_subparsers(required=True, metavar="MODEL")
    _add_train_deal(models)
    return parser


Commands = argparse._SubParsersAction  # its type parameter exists for checkers only


def _add_demo(commands: Commands[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="denoise and inpaint a photograph, print the results and write a figure",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", default="deepinv_deal_demo.png", help="figure to write")
    demo.add_argument(
        "--size", type=int, default=256, help="side of the image in pixels"
    )
    demo.add_argument("--pretrained", default="deal_gray", help="weights: name or file")
    demo.add_argument("--rtol", type=float, help=RTOL_HELP)
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    import time

    import torch
    from deepinv.physics import Denoising, GaussianNoise, Inpainting
    from skimage.data import camera
    from skimage.transform import resize

    from deepinv_deal import DEAL
    from deepinv_deal.evaluation import quality
    from deepinv_deal.interpret import Panel, plot_reconstructions

    if not 16 <= args.size <= 512:
        raise ValueError(f"--size must lie between 16 and 512, got {args.size}.")
    image = resize(camera() / 255.0, (args.size, args.size), anti_aliasing=True)
    x = torch.from_numpy(image).float()[None, None]
    rng = torch.Generator().manual_seed(0)
    sigma = 25 / 255
    problems: tuple[tuple[str, Any, dict[str, float]], ...] = (
        ("denoising, sigma 25/255", Denoising(GaussianNoise(sigma, rng=rng)), {}),
        (
            "inpainting, half of the pixels, sigma 5/255",
            Inpainting(
                (1, args.size, args.size),
                mask=0.5,
                rng=rng,
                noise_model=GaussianNoise(5 / 255, rng=rng),
            ),
            DEMO_INPAINTING,
        ),
    )
    model = DEAL(pretrained=args.pretrained, rtol=args.rtol)
    prior = model.prior[0]
    print(f"DEAL with {prior.num_filters} filters, camera at {args.size} x {args.size}")
    panels, worked = [], True
    for title, physics, settings in problems:
        y = physics(x)
        start = time.perf_counter()
        with torch.no_grad():
            x_hat, info = model(y, physics, return_info=True, **settings)
        seconds = time.perf_counter() - start
        before, after = quality(y, x), quality(x_hat, x)
        captions = ["{:.2f} dB, SSIM {:.3f}".format(*q) for q in (before, after)]
        print(
            f"{title}\n"
            f"  measurement     {captions[0]}\n"
            f"  reconstruction  {captions[1]}\n"
            f"  {int(info.n_iter)} iterations, {int(info.cg_iter)} conjugate gradient "
            "steps, "
            f"residual {float(info.residual):.1e} "
            f"({'converged' if info.converged else 'NOT converged'}), {seconds:.1f} s"
        )
        panels.append(Panel(title, x, y, x_hat, info, *captions))
        worked &= bool(info.converged)
    plot_reconstructions(panels).savefig(args.out, dpi=110)
    print(f"Figure: {args.out}")
    return 0 if worked else 1


def _add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="PSNR and SSIM of denoising on a folder of images (published protocol)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument("--data", required=True, help="folder of images")
    evaluate.add_argument(
        "--sigma", type=float, nargs="+", default=[5, 15, 25], help="gray levels"
    )
    evaluate.add_argument(
        "--pretrained", default="deal_gray", help="weights: name or file"
    )
    evaluate.add_argument("--rtol", type=float, help=RTOL_HELP)
    evaluate.add_argument(
        "--max-iter", type=int, default=100, help="largest number of outer iterations"
    )
    evaluate.add_argument("--csv", help="file for one line per image and noise level")
    evaluate.add_argument(
        "--tv",
        metavar="DIR",
        help="evaluate deepinv's TV denoiser, tuned on DIR, instead",
    )
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from deepinv_deal import DEAL
    from deepinv_deal.evaluation import (
        evaluate_denoising,
        summarise,
        tuned_tv,
        write_csv,
    )
    from deepinv_deal.training import load_image_folder

    if args.tv:
        channels = 1
        denoiser = tuned_tv(load_image_folder(args.tv, channels), args.sigma)
    else:
        denoiser = DEAL(
            pretrained=args.pretrained,
            rtol=args.rtol,
            max_iter=args.max_iter,
            warn=False,
        )
        channels = denoiser.prior[0].in_channels
    scores = evaluate_denoising(
        denoiser, load_image_folder(args.data, channels), args.sigma
    )
    if args.csv:
        write_csv(scores, args.csv)
    print(summarise(scores))
    return 0 if all(score.converged for score in scores) else 1


def _add_train_deal(models: Commands[argparse.ArgumentParser]) -> None:
    from deepinv_deal.training import DEALRecipe

    deal = models.add_parser(
        "deal",
        help="DEAL, on noisy patches",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    documented = dict(
        re.findall(
            r":param \S+ (\w+): ((?:.|\n)*?)(?=\n\s*:|\Z)", DEALRecipe.__doc__ or ""
        )
    )
    for field in fields(DEALRecipe):
        kind = str(field.type).split(" | ")[0]
        default = None if field.default is MISSING else field.default
        text = " ".join(documented[field.name].split()).replace("%", "%%")
        options: dict[str, object] = {"help": text, "default": default}
        if field.default is MISSING:
            options["required"] = True
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = kind.upper()
            options["type"] = {"int": int, "float": float}.get(kind, str)
        if field.name == "time_budget":
            options |= {"type": _duration, "metavar": "TIME"}
        deal.add_argument("--" + field.name.replace("_", "-"), **options)  # type: ignore[arg-type]
    deal.add_argument("--threads", type=int, help="number of CPU threads")
    deal.add_argument(
        "--restart",
        action="store_true",
        help="start anew, do not resume from OUT/state.pt",
    )
    deal.set_defaults(run=_train_deal)


def _train_deal(args: argparse.Namespace) -> int:
    import torch

    from deepinv_deal.training import DEALRecipe, DEALTrainer

    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = DEALRecipe(**{f.name: getattr(args, f.name) for f in fields(DEALRecipe)})
    trainer = DEALTrainer(recipe, resume=not args.restart)
    if trainer.step:
        print(f"Resuming at step {trainer.step} ({trainer.elapsed:.0f} s).")
    best = trainer.train()
    print(f"{trainer.step} steps in {trainer.elapsed:.0f} s.")
    print(
        f"Best mean validation PSNR {best:.2f} dB: {trainer.out / 'best.safetensors'}"
    )
    return 0


def _duration(text: str) -> float:
    """Reads ``90``, ``90s``, ``30m`` or ``1.5h`` as seconds."""
    match = re.fullmatch(r"([0-9.]+)\s*([smh]?)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no duration: try 90s, 30m or 2h."
        )
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
