"""``deepinv-deal train``: train a model on a folder of images."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from deepinv_deal.cli._options import Commands, load_class, positive_int
from deepinv_deal.training.recipes import (
    AttentiveL1Recipe,
    DEALRecipe,
    DictionaryRecipe,
    Recipe,
)

if TYPE_CHECKING:
    from deepinv_deal.training import Trainer

#: Trainers by the recipes that they follow, by name: importing them imports torch.
TRAINERS = {
    DEALRecipe: "DEALTrainer",
    AttentiveL1Recipe: "AttentiveL1Trainer",
    DictionaryRecipe: "DictionaryTrainer",
}

#: Settings that the command takes in gray levels, as all commands do, and their help.
NOISE_LEVELS = {
    "sigma": "noise level, gray levels (of 255 for white)",
    "init_sigma": "noise level of the weights of --init, gray levels, which are "
    "rescaled to that of the training; the one that they know if unset",
    "sigma_max": "largest noise level, gray levels (of 255 for white)",
}

#: By what the learning rate is multiplied where training starts from weights: that of
#: a training from nothing would spoil them.
FINE_TUNING = 0.1

#: Settings that depend on the weights of --init if they are not given.
FROM_INIT = {
    "num_filters": "as many as the weights of --init, three times for colour from gray",
    "lr": f"{FINE_TUNING:g} times that with --init",
}


def add_train(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    train = commands.add_parser("train", help="train a model on a folder of images")
    models = train.add_subparsers(required=True, metavar="MODEL")
    deal = _add_model(models, DEALRecipe, "deal", "DEAL, on noisy patches")
    _add_prior(deal, "AttentiveQuadraticPrior", "no arguments")
    for name, text in (
        ("safi", "SAFI, for one noise level"),
        ("mmr", "MMR, its special case with an energy, for one noise level"),
    ):
        command = _add_model(models, AttentiveL1Recipe, name, text, model=name)
        if name == "safi":
            _add_prior(command, "AttentiveL1Prior", "num_filters and sigma")
    for name, text in (
        ("cpr", "CPR, convex smooth-plus-sparse patches, for one noise level"),
        ("ncpr", "NCPR, its weakly convex version, for one noise level"),
        ("patch", "the convex patch-based synthesis model, for one noise level"),
    ):
        _add_model(models, DictionaryRecipe, name, text, model=name)


def _add_model(
    models: Commands[argparse.ArgumentParser],
    recipe: type[Recipe],
    name: str,
    text: str,
    **fixed: str,
) -> argparse.ArgumentParser:
    """Adds a model: the settings of its recipe are the options."""
    command = models.add_parser(
        name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    documented = dict(
        re.findall(
            r":param \S+ (\w+): ((?:.|\n)*?)(?=\n\s*:(?:param|raises)|\Z|\n\s*\n)",
            # the most derived class has the last word
            "\n".join(base.__doc__ or "" for base in reversed(recipe.__mro__)),
        )
    )
    for field in fields(recipe):
        if field.name in fixed:
            continue
        kind = str(field.type).split(" | ")[0]
        default = None if field.default is MISSING else field.default
        description = _plain(documented[field.name]).replace("%", "%%")
        options: dict[str, object] = {"help": description, "default": default}
        if field.default is MISSING:
            options["required"] = True
        if field.name in FROM_INIT:
            # Not there if not given; the help names the default itself.
            options["default"] = argparse.SUPPRESS
            options["help"] = (
                f"{description.rstrip('.')} (default: {default}, or "
                f"{FROM_INIT[field.name]})"
            )
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = kind.upper()
            options["type"] = {"int": int, "float": float}.get(kind, str)
        if field.name == "time_budget":
            options |= {"type": _duration, "metavar": "TIME"}
        if field.name in NOISE_LEVELS:
            options |= {
                "type": _gray_levels,
                "metavar": "LEVEL",
                "help": NOISE_LEVELS[field.name],
                # argparse converts it
                "default": default and f"{255 * float(str(default)):g}",
            }
        command.add_argument("--" + field.name.replace("_", "-"), **options)  # type: ignore[arg-type]
    command.add_argument("--threads", type=positive_int, help="number of CPU threads")
    command.add_argument(
        "--restart",
        action="store_true",
        help="start anew, do not resume from OUT/state.pt",
    )
    command.set_defaults(run=_train, recipe=recipe, prior=None, **fixed)
    return command


def _add_prior(command: argparse.ArgumentParser, base: str, arguments: str) -> None:
    """Adds the option to train a prior of the user."""
    command.add_argument(
        "--prior",
        metavar="FILE.py:CLASS",
        help=f"your own {base} instead, in a file or, as MODULE:CLASS, in a module, "
        f"which is imported; its constructor gets {arguments}",
    )


def _plain(text: str) -> str:
    """Turns the markup of a docstring into words for the terminal."""
    text = re.sub(r":math:`([^`]*)`", lambda found: _plain_formula(found[1]), text)
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text)
    return " ".join(re.sub(r"``|\\", "", text).split())


def _plain_formula(text: str) -> str:
    r"""Turns LaTeX into what can be read: ``\sigma_{\max}`` into ``sigma_max``."""
    text = re.sub(r"\\(?:text|mathrm|mathcal)\b", "", text)
    return re.sub(r"[{}\\]|(?<=\w) (?=\^)", "", text)


def _train(args: argparse.Namespace) -> int:
    import torch

    from deepinv_deal import training
    from deepinv_deal.training.processes import process_group

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {
        f.name: getattr(args, f.name)
        for f in fields(args.recipe)
        if hasattr(args, f.name)
    }
    found = _from_init(args)
    settings |= found
    trainer = getattr(training, TRAINERS[args.recipe])
    if args.prior is not None:
        trainer = _own_trainer(args.prior, trainer)
    with process_group(args.device) as settings["device"]:
        _check_device(settings["device"])
        return _run(trainer(args.recipe(**settings), resume=not args.restart), found)


def _check_device(device: str) -> None:
    """Raises an error if there is no such device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA in torch
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from error


def _from_init(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that are not given and depend on the weights of --init."""
    defaults = {f.name: f.default for f in fields(args.recipe)}
    found: dict[str, Any] = {}
    if args.init is None:
        return found
    if not hasattr(args, "lr"):
        found["lr"] = FINE_TUNING * float(str(defaults["lr"]))
    if "num_filters" in defaults and not hasattr(args, "num_filters"):
        number = _filters_of(args)
        found |= {} if number is None else {"num_filters": number}
    return found


def _filters_of(args: argparse.Namespace) -> int | None:
    """Returns the number of filters of the weights of --init, if they have one."""
    from deepinv_deal import priors, weights

    if args.prior is not None:
        return None
    name = {"safi": "SAFIPrior", "mmr": "MMRPrior"}
    kind = getattr(priors, name.get(getattr(args, "model", ""), "DEALPrior"))
    prior = weights.load(args.init, kind)
    # Gray weights of a colour model serve for brightness and two opponent colours.
    opponents = (prior.in_channels, getattr(args, "in_channels", 1)) == (1, 3)
    return int(prior.num_filters) * (3 if opponents else 1)


def _own_trainer(
    text: str, trainer: type[Trainer[Any, Any]]
) -> type[Trainer[Any, Any]]:
    """Returns the trainer of a prior of the user, in place of that of its family."""
    from deepinv_deal.priors import AttentiveL1Prior, AttentiveQuadraticPrior
    from deepinv_deal.training import AttentiveL1Trainer, AttentiveQuadraticTrainer

    kind = load_class(text)
    for_l1 = issubclass(trainer, AttentiveL1Trainer)
    base = AttentiveL1Prior if for_l1 else AttentiveQuadraticPrior
    if not issubclass(kind, base):
        raise ValueError(f"--prior {text} must be an {base.__name__}.")
    if for_l1:
        return type("OwnTrainer", (trainer,), {"prior_type": kind})

    class OwnTrainer(AttentiveQuadraticTrainer[Any]):
        def new_prior(self) -> Any:
            return kind()

        def describe(self, prior: Any) -> dict[str, Any]:
            return {"in_channels": prior.in_channels}

    return OwnTrainer


def _run(trainer: Trainer[Any, Any], from_init: dict[str, Any]) -> int:
    say = print if trainer.processes.first else _nothing
    if from_init:
        options = sorted(from_init.items())
        text = ", ".join(f"--{k.replace('_', '-')} {v:g}" for k, v in options)
        say(f"From the weights {trainer.recipe.init}: {text}.")
    if trainer.step:
        say(f"Resuming at step {trainer.step} ({trainer.elapsed:.0f} s).")
    if trainer.progress() >= 1:
        say("The training is complete. To go on, start one with --init WEIGHTS.")
    weights = sum(p.numel() for p in trainer.prior.parameters())
    number = trainer.processes.number
    say(
        f"{weights:,} parameters on {trainer.device}"
        f"{f', {number} processes' * (number > 1)}; {trainer.state_path} is written "
        f"every {trainer.checkpoint_interval:.0f} s.",
        flush=True,
    )
    file = trainer.out / "best.safetensors"
    if not trainer.step and file.exists():
        say(f"{file} is there already, and is replaced by the first validation.")
    best = trainer.train()
    say(f"{trainer.step} steps in {trainer.elapsed:.0f} s.")
    say(f"Best mean validation PSNR {best:.2f} dB: {file}")
    if trainer.recipe.init is not None and trainer.best_step == 0:
        say(
            "No step was better than the weights of --init, which that file holds. Try "
            "a smaller --lr, or more steps."
        )
    return 0


def _nothing(*_: Any, **__: Any) -> None:
    """What processes but the first say."""


def _gray_levels(text: str) -> float:
    """Reads a noise level in gray levels, returns it for images in [0, 1]."""
    try:
        level = float(text)
        if not 1 <= level < 255:
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no noise level in gray levels: give at least 1 and less "
            "than 255, and 25 for 25 / 255."
        ) from error
    return level / 255


def _duration(text: str) -> float:
    """Reads ``90``, ``90s``, ``30m`` or ``1.5h`` as seconds."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([smh]?)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no duration: try 90s, 30m or 2h."
        )
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
