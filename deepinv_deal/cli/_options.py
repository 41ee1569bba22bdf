"""Options and output that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from torch import Tensor

    from deepinv_deal import ReconstructionInfo
    from deepinv_deal.cli._likelihood import LikelihoodOption
    from deepinv_deal.files import Picture

Commands = argparse._SubParsersAction  # its type parameter exists for checkers only


#: What bad input raises.
BAD_INPUT = (
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    NotImplementedError,  # a model that cannot do what it was asked for
)

#: Models by their names on the command line.
MODELS = {
    "deal": "DEAL",
    "safi": "SAFI",
    "mmr": "MMR",
    "smooth-plus-sparse": "SmoothPlusSparse",
    "patch-synthesis": "PatchSynthesis",
}

#: Weights if none are asked for: those of DEAL for gray or for colour images.
DEFAULT_WEIGHTS = "bundled"


def add_solver_options(
    parser: argparse.ArgumentParser, default: str = "deal_gray"
) -> None:
    """
    Adds the weights and the accuracy of a model.

    :param argparse.ArgumentParser parser: the command.
    :param str default: which weights the command takes if none are given.
    """
    parser.add_argument(
        "--pretrained",
        metavar="WEIGHTS",
        help=f"bundled name, 'download' or file; if unset, {default}",
    )
    parser.add_argument(
        "--rtol", type=float, help="tolerance; if unset, that of the model"
    )
    parser.add_argument(
        "--max-iter",
        type=int,
        help="largest number of outer iterations; if unset, that of the model",
    )


def add_model_options(
    parser: argparse.ArgumentParser,
    others: Sequence[str] = (),
    text: str = "",
    default: str = "deal_gray",
) -> None:
    """
    Adds the options of :func:`make_model`.

    :param argparse.ArgumentParser parser: the command.
    :param list others: methods beside the models.
    :param str text: what to say about them.
    :param str default: as in :func:`add_solver_options`.
    """
    add_solver_options(parser, default)
    parser.add_argument(
        "--method",
        choices=(*MODELS, *others),
        help=f"model; if unset, the one that the weights say they are for{text}",
    )
    parser.add_argument(
        "--prior",
        metavar="FILE.py:CLASS",
        help="your own regularizer, of which --pretrained are weights: a class in a "
        "file or, as MODULE:CLASS, in a module, which is imported",
    )
    parser.add_argument("--solver", help="solver of the dictionary models")
    parser.add_argument(
        "--inner-dtype",
        choices=("bfloat16", "float16"),
        help="DEAL: precision of convolutions in the inner solves, where the hardware "
        "is fast in it; if unset, that of the weights",
    )


def make_model(args: argparse.Namespace, channels: int = 1, **options: Any) -> Any:
    """
    Makes the model that the arguments describe, silent about convergence.

    :param argparse.Namespace args: the arguments.
    :param int channels: number of channels of the images. With 3, the weights are those
        for colour, unless the arguments name others.
    :param Any options: further arguments of the model.
    :raises ValueError: for options that do not fit the model, or missing weights.
    """
    import torch

    import deepinv_deal
    from deepinv_deal.problems import SolverOptions
    from deepinv_deal.weights import BUNDLED
    from deepinv_deal.weights.registry import BY_CHANNELS

    weights = args.pretrained
    if args.prior is not None:
        name, options["prior"] = _own_prior(args)
        weights = None
    elif args.method is None:
        weights = weights or DEFAULT_WEIGHTS
        name = _model_of(weights)
    else:
        name = MODELS[args.method]
        own = [entry.name for entry in BUNDLED if entry.prior == f"{name}Prior"]
        own = [DEFAULT_WEIGHTS] if name == "DEAL" else own
        if weights is None and len(own) != 1:
            raise ValueError(
                f"--method {args.method} needs --pretrained: {', '.join(own)}."
            )
        weights = weights or own[0]
    kind = getattr(deepinv_deal, name)
    if args.inner_dtype is not None and name != "DEAL":
        raise ValueError(f"--inner-dtype is for DEAL, not for {name}.")
    dtype = None if args.inner_dtype is None else getattr(torch, args.inner_dtype)
    options["solver"] = SolverOptions(args.solver or "auto", inner_dtype=dtype)
    for option in ("rtol", "max_iter"):
        if getattr(args, option) is not None:
            options[option] = getattr(args, option)
    if name == "DEAL" and weights in BY_CHANNELS:
        options["in_channels"] = 3 if channels == 3 else 1
    return kind(pretrained=weights, warn=False, **options)


def _own_prior(args: argparse.Namespace) -> tuple[str, Any]:
    """Returns the model that solves with a prior of the user, and the prior."""
    from deepinv_deal import priors
    from deepinv_deal.weights import load

    if args.method is not None or args.pretrained is None:
        raise ValueError(
            f"--prior {args.prior} needs --pretrained, a file of its weights, and no "
            "--method: the class says which model it is for."
        )
    kind = load_class(args.prior)
    models = {
        priors.AttentiveQuadraticPrior: "DEAL",
        priors.MMRPrior: "MMR",
        priors.AttentiveL1Prior: "SAFI",
        priors.PatchSynthesisPrior: "PatchSynthesis",
        priors.PatchPrior: "SmoothPlusSparse",
    }
    for base, model in models.items():
        if issubclass(kind, base):
            return model, load(args.pretrained, kind)
    raise ValueError(
        f"--prior {args.prior} must be a subclass of AttentiveQuadraticPrior, "
        "AttentiveL1Prior or PatchPrior of deepinv_deal.priors."
    )


def load_class(text: str) -> type[Any]:
    """
    Imports a class that the user names.

    :param str text: ``FILE.py:CLASS`` or ``MODULE:CLASS``.
    :raises ValueError: if there is no such class.
    :raises FileNotFoundError: if there is no such file.
    """
    place, _, name = text.rpartition(":")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise FileNotFoundError(f"The file {place!r} does not exist.")
        own = f"_user_{Path(place).stem}"  # no name of an installed module
        spec = importlib.util.spec_from_file_location(own, place)
        assert spec is not None and spec.loader is not None
        module = sys.modules[own] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{text!r} cannot be imported: {error}. Give FILE.py:CLASS or "
                "MODULE:CLASS."
            ) from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise ValueError(f"{place} has no class {name!r}.")
    return found


def _model_of(weights: str) -> str:
    """Returns the name of the model that weights are for."""
    from deepinv_deal.weights import owner

    try:
        prior = owner(weights)
    except ValueError as error:
        raise ValueError(
            f"{error} For others, as the authors' files, add --method "
            f"{', '.join(MODELS)}, or --prior for a regularizer of your own."
        ) from error
    known = {f"{name}Prior": name for name in MODELS.values()}
    if prior not in known:
        raise ValueError(
            f"{weights} holds weights of a {prior}, which is none of this package. If "
            f"it is your own, name the class: --prior FILE.py:{prior}."
        )
    return known[prior]


def channels_of(model: Any) -> int:
    """Returns the number of channels that the filters or atoms of a model have."""
    return int(model.prior.in_channels)


def photograph(size: int, channels: int = 1) -> Tensor:
    """Returns a photograph of scikit-image, ``(C, size, size)`` in [0, 1]."""
    import torch
    from skimage.data import astronaut, camera
    from skimage.transform import resize

    photo = camera()[..., None] if channels == 1 else astronaut()
    pixels = resize(photo / 255.0, (size, size), anti_aliasing=True)
    return torch.from_numpy(pixels).movedim(-1, 0).float()


def add_slices_option(parser: argparse.ArgumentParser, pages: str, solved: str) -> None:
    """Adds ``--slices``, for files that hold several images."""
    parser.add_argument(
        "--slices",
        choices=("depth", "height", "width", "mean"),
        help=f"the {pages} are the depth of one volume, of which the model sees the "
        f"slices across this axis, or those across all three; if unset, {pages} are "
        f"{solved} one by one",
    )


def add_outcome_options(parser: argparse.ArgumentParser) -> None:
    """Adds what to do with a result beside writing it."""
    parser.add_argument(
        "--figure",
        metavar="FILE",
        help="also draw measurement, result, convergence and, where there is one, the "
        "mean mask",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with code 1 if an image did not converge",
    )


def add_white_option(parser: argparse.ArgumentParser) -> None:
    """Adds which value of a file is white."""
    parser.add_argument(
        "--white",
        type=_white,
        help="value in the file that is white, or 'max', the largest one; if unset, "
        "255 or 65535 for integers of 8 or 16 bit, and 1 for floating point; needed "
        "for DICOM and NIfTI files of 16 bit",
    )


def _white(text: str) -> float | str:
    try:
        return text if text == "max" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no value: a number, or 'max'."
        ) from error


def noise_level(text: str, otherwise: str = "", *, zero: bool = False) -> float:
    """
    Reads a noise level in gray levels.

    :param str text: the argument.
    :param str otherwise: what else may be given, for the message.
    :param bool zero: whether there may be no noise.
    :raises argparse.ArgumentTypeError: for anything else.
    """
    try:
        level = float(text)
        if not (0 < level <= 255 or (zero and level == 0)):
            raise ValueError
    except ValueError as error:
        end = f", {otherwise}" if otherwise else ""
        raise argparse.ArgumentTypeError(
            f"{text!r} is no noise level: a number between 0 and 255{end}."
        ) from error
    return level


def positive_int(text: str) -> int:
    """Reads a whole number that is not zero."""
    try:
        number = int(text)
        if number < 1:
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of this kind: give 1 or more."
        ) from error
    return number


def add_truth_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option to compare with the true image."""
    parser.add_argument("--truth", help="file with the true image: print the PSNR")


def add_truth_unit_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for what is white and black in the true image."""
    parser.add_argument(
        "--truth-white",
        type=float,
        metavar="VALUE",
        help="value in the file of --truth that is white; if unset, that of INPUT if "
        "the numbers are of one kind, else as for --white",
    )
    parser.add_argument(
        "--truth-black",
        type=float,
        metavar="VALUE",
        help="value in the file of --truth that is black; if unset, that of INPUT if "
        "the numbers are of one kind, else 0",
    )


def read_truth(
    args: argparse.Namespace, like: Picture, *, volume: bool = False
) -> Tensor:
    """
    Reads the true image, in the unit of the result.

    :param argparse.Namespace args: the arguments.
    :param Picture like: what was read as INPUT.
    :param bool volume: as for ``read_picture``.
    """
    from deepinv_deal.files import read_picture

    white, black, path = args.truth_white, args.truth_black, args.truth
    given = read_picture(path, 1.0, volume=volume).dtype
    one_kind = given == like.dtype or given.kind == like.dtype.kind == "f"
    if one_kind or args.likelihood.has_unit:
        white = like.white if white is None else white
        black = like.black if black is None else black
    return read_picture(path, white, black=black or 0.0, volume=volume).x


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """
    Makes errors about an image name it.

    :param str name: the file.
    """
    try:
        yield
    except BAD_INPUT as error:
        if name in str(error) or isinstance(error, OSError):
            raise
        raise ValueError(f"{name}: {error}") from error


def tell(text: str, stream: TextIO | None = None) -> None:
    """
    Prints a line, also where nobody reads on, as in a pipe to ``head``: results that
    are computed afterwards are not to be lost by that.

    :param str text: the line.
    :param TextIO stream: where to; ``None``: the output.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        drop_output(stream)


def drop_output(stream: TextIO) -> None:
    """
    Drops what is printed from now on, and what a closed pipe did not take.

    :param TextIO stream: the output.
    """
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def print_quality(x_hat: Tensor, x: Tensor, unit: float) -> None:
    """
    Prints PSNR and SSIM of a result, and doubts that it is in the unit of the truth.

    :param torch.Tensor x_hat: the result.
    :param torch.Tensor x: the true image.
    :param float unit: what counts as white.
    :raises ValueError: for different shapes.
    """
    from deepinv_deal.evaluation import quality

    if x.shape != x_hat.shape:
        raise ValueError(
            f"--truth has shape {tuple(x.shape)}, the result {tuple(x_hat.shape)}."
        )
    x_hat, x = x_hat / unit, x / unit
    top, top_hat = float(x.max()), float(x_hat.max())
    if not 0.1 * top_hat < top < 10 * top_hat:
        say(
            [
                f"The true image goes up to {top:.3g}, the result to {top_hat:.3g}, if "
                "white is 1. Are they in one unit? See --truth-white."
            ]
        )
    scores = quality(x_hat, x)
    tell("PSNR {:.2f} dB, SSIM {:.4f}".format(*scores))


def report(
    name: str,
    infos: ReconstructionInfo | Sequence[ReconstructionInfo],
    seconds: float,
    likelihood: LikelihoodOption,
) -> bool:
    """
    Prints how a reconstruction, or those of all slices, went; returns whether all of it
    succeeded.
    """
    infos = infos if isinstance(infos, Sequence) else [infos]
    failed = sum(not bool(info.succeeded.all()) for info in infos)
    end = "finished"
    if failed:
        end = "NOT converged"
        end = f"{failed} of {len(infos)} {end}" if len(infos) > 1 else end
    elif all(bool(info.converged.all()) for info in infos):
        end = "converged"
    inner = sum(int(info.inner_iter.sum()) for info in infos)
    weights = [float(info.lambda_reg.mean()) for info in infos]
    tell(
        f"{name}: "
        + (f"{len(infos)} slices, at most " if len(infos) > 1 else "")
        + f"{max(int(info.n_iter.max()) for info in infos)} iterations, "
        + (f"{inner} inner iterations, " if inner else "")
        + f"{'imbalance' if infos[0].has_mask else 'change'} "
        f"{max(float(info.criterion.max()) for info in infos):.1e} "
        f"({end}), {seconds:.1f} s, "
        f"{likelihood.text}, lambda {sum(weights) / len(weights):.4g}"
    )
    say(dict.fromkeys(note for info in infos for note in info.notes))
    return not failed


def say(notes: Iterable[str]) -> None:
    """Prints notes on what was decided for the user."""
    for note in notes:
        tell(f"  {note}", sys.stderr)
