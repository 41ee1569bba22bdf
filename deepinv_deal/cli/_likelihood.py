"""The option ``--likelihood`` of several commands."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from deepinv_deal.files import Picture

#: Numbers of the likelihoods with their defaults; those with ``None`` must be given.
NUMBERS: dict[str, dict[str, float | None]] = {
    "gaussian": {},
    "poisson": {"GAIN": None, "BACKGROUND": 0.0},
    "transmission": {"N0": None, "MU": 1.0},
    "l1": {"DELTA": 2.55},
}

CHOICES = (
    "gaussian, poisson:GAIN[:BACKGROUND], transmission:N0[:MU], l1[:DELTA] or "
    "weights:FILE"
)

#: A picture of whole counts with fewer levels than 8 bit have is a coarse one.
FEW_LEVELS = 255


@dataclass(frozen=True)
class LikelihoodOption:
    """
    The likelihood that a command is asked for.

    :param str kind: ``"weights"`` or one of :data:`NUMBERS`.
    :param tuple numbers: its numbers, in the order of :data:`NUMBERS`.
    :param str file: file of the weights.
    """

    kind: str
    numbers: tuple[float, ...] = ()
    file: str = ""

    @property
    def has_unit(self) -> bool:
        """Whether it knows the unit of the file, and with it the level of the noise."""
        return self.kind in ("poisson", "transmission")

    @property
    def text(self) -> str:
        """What it is, in words."""
        if self.kind == "weights":
            return f"least squares weighted by {self.file}"
        words = {
            "gaussian": "least squares",
            "poisson": "Poisson likelihood with gain {:g} and background {:g}",
            "transmission": "transmission likelihood with N0 {:g} and mu {:g}",
            "l1": "smoothed L1 norm with delta {:g}",
        }
        return words[self.kind].format(*self.numbers)

    def white(self, asked: float | str | None) -> float | str | None:
        """
        Returns the value in the file that is to be read as 1.

        Counts are read as counts, and transmission as it is, whatever is white.

        :param float, str asked: the argument ``--white``.
        """
        if self.kind == "poisson":
            return self.numbers[0]
        return 1.0 if self.has_unit else asked

    def intensity(self, asked: float | str | None) -> float | None:
        """
        Returns what is white in what was read, ``None``: not known.

        :param float, str asked: the argument ``--white``.
        :raises ValueError: if it is not positive, or the largest of numbers of which
            the likelihood must know the unit.
        """
        if isinstance(asked, str):
            if self.has_unit:
                raise ValueError(
                    f"--white {asked} is not for --likelihood {self.kind}, which "
                    "guesses what is white. Leave it out, or give a number."
                )
            return 1.0
        if not self.has_unit:  # what is read is 1 at white
            return 1.0
        if asked is not None and not 0 < asked < math.inf:
            raise ValueError(f"--white must be positive, got {asked:g}.")
        unit = self.numbers[0] if self.kind == "poisson" else 1.0
        return None if asked is None else asked / unit

    def shown_white(self, x: Tensor, asked: float | str | None) -> float:
        """
        Returns what figures show as white: the brightest pixel, where nobody knows.

        :param torch.Tensor x: the image in the unit of what was read.
        :param float, str asked: the argument ``--white``.
        """
        return self.intensity(asked) or float(x.max()) or 1.0

    def settings(self, asked: float | str | None = None) -> dict[str, Any]:
        """
        Returns the arguments of the model for what was read.

        :param float, str asked: the argument ``--white``.
        """
        from deepinv.optim import LogPoissonLikelihood, PoissonLikelihood

        from deepinv_deal.optim import SmoothedL1, WeightedL2

        intensity = self.intensity(asked)
        if self.kind == "gaussian":
            return {}
        if self.kind == "weights":
            return {"data_fidelity": WeightedL2(_read_weights(self.file))}
        if self.kind == "l1":
            return {"data_fidelity": SmoothedL1(self.numbers[0] / 255)}
        fidelity: Any
        if self.kind == "poisson":  # of counts, so whose gain is 1
            fidelity = PoissonLikelihood(1.0, self.numbers[1], denormalize=True)
        else:
            fidelity = LogPoissonLikelihood(*self.numbers)
        scale = "auto" if intensity is None else intensity
        return {"data_fidelity": fidelity, "scale": scale}

    def level(self, gray_levels: Any, asked: float | str | None) -> Any:
        """
        Returns a noise level in the unit of what was read.

        :param float gray_levels: of 255 for white; ``"estimate"`` and ``None`` stay.
        :param float, str asked: the argument ``--white``.
        :raises ValueError: if it is not known what is white, or a level is missing.
        """
        if gray_levels is None and not self.has_unit:
            raise ValueError(
                "--sigma is missing: only --likelihood poisson and transmission tell "
                "the level of the noise. Give it in gray levels, or 'estimate'."
            )
        if gray_levels is None or isinstance(gray_levels, str):
            return gray_levels
        intensity = self.intensity(asked)
        if intensity is None:
            raise ValueError(
                f"--sigma is in gray levels, and with --likelihood {self.kind} it is "
                "not known what is white. Leave --sigma out, or give --white."
            )
        return gray_levels / 255 * intensity

    def check(self, y: Tensor) -> None:
        """
        Checks that measurements can be of this likelihood, in the terms of the option.

        :param torch.Tensor y: what was read.
        :raises ValueError: if they are no line integrals.
        """
        if self.kind != "transmission":
            return
        from deepinv_deal.problems.likelihood import LogPoisson

        N0, mu = self.numbers
        doubt = LogPoisson(N0, mu).doubt(y)
        if doubt is not None:
            raise ValueError(
                f"--likelihood transmission:{N0:g}:{mu:g} is for -log(counts / N0) / "
                f"MU. The file holds {doubt}."
            )

    def doubt_rounding(self, path: str | Path, x: Tensor, like: Picture) -> None:
        """
        Says so if a result in small whole numbers is rounded to them.

        :param str path: file of the result.
        :param torch.Tensor x: the result.
        :param Picture like: what was read.
        """
        from deepinv_deal.files import ARRAYS, suffix_of

        top = float(x.max()) * like.white
        whole = like.dtype.kind in "ui" and suffix_of(path) not in ARRAYS
        if self.has_unit and whole and top < FEW_LEVELS:
            print(
                f"  {path} holds whole numbers up to {top:.0f} only. Give an output "
                "ending in .npy or .pt, in which nothing is rounded.",
                file=sys.stderr,
            )


def add_likelihood_option(parser: argparse.ArgumentParser) -> None:
    """
    Adds the likelihood of the measurements.

    :param argparse.ArgumentParser parser: the command.
    """
    parser.add_argument(
        "--likelihood",
        type=_parse,
        default="gaussian",
        metavar="KIND",
        help=f"how measurements deviate from what is expected: {CHOICES}. GAIN is what "
        "one count adds to the numbers in the file as they are stored, of integers as "
        "of others, whatever --white (1: the file holds counts); BACKGROUND is in "
        "counts. transmission: the file holds -log(counts / N0) / MU. l1: outliers; "
        "deviations below DELTA, in gray levels of 255 for white, are as in least "
        "squares. weights: least squares with a weight for every measurement",
    )


def _parse(text: str) -> LikelihoodOption:
    kind, _, rest = text.partition(":")
    if kind == "weights" and rest:
        return LikelihoodOption(kind, file=rest)
    names = NUMBERS.get(kind)
    given = rest.split(":") if rest else []
    if names is None or len(given) > len(names):
        raise _no_likelihood(text)
    numbers = []
    for i, (name, default) in enumerate(names.items()):
        if i >= len(given) and default is None:
            raise _no_likelihood(text, f"{name} is missing")
        try:
            number = float(given[i]) if i < len(given) else float(default or 0)
        except ValueError as error:
            raise _no_likelihood(text, f"{name} is no number") from error
        least_allowed = number >= 0 if name == "BACKGROUND" else number > 0
        if not (least_allowed and number < math.inf):
            sign = "not negative" if name == "BACKGROUND" else "positive"
            raise _no_likelihood(text, f"{name} must be finite and {sign}")
        numbers.append(number)
    return LikelihoodOption(kind, tuple(numbers))


def _no_likelihood(text: str, why: str = "") -> argparse.ArgumentTypeError:
    reason = f" ({why})" if why else ""
    return argparse.ArgumentTypeError(
        f"{text!r} is no likelihood{reason}: give {CHOICES}."
    )


def _read_weights(path: str) -> Tensor:
    """Reads weights that expand to measurements: ``(H, W)``, ``(C, H, W)``, ..."""
    import numpy as np
    import torch

    from deepinv_deal.files import read_array

    array = read_array(path)
    if array.dtype.kind not in "buif":
        raise ValueError(f"The weights {path} are {array.dtype}, no real numbers.")
    if array.ndim == 3 and array.shape[-1] == 3 and array.shape[0] != 3:
        array = np.moveaxis(array, -1, 0)  # a colour picture
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
