"""``deepinv-deal train``: train a model on a folder of images."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, fields

from deepinv_deal.cli._options import Commands


def add_train(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    train = commands.add_parser("train", help="train a model on a folder of images")
    models = train.add_subparsers(required=True, metavar="MODEL")
    add_train_deal(models)


def add_train_deal(models: Commands[argparse.ArgumentParser]) -> None:
    """Adds the model DEAL."""
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
