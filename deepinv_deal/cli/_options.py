"""Options and output that several commands share."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepinv_deal import ReconstructionInfo

Commands = argparse._SubParsersAction  # its type parameter exists for checkers only


def add_model_options(
    parser: argparse.ArgumentParser, *, pretrained: str | None = "deal_gray"
) -> None:
    """Adds the options of :func:`make_model`."""
    parser.add_argument(
        "--pretrained", default=pretrained, help="weights: name or file"
    )
    parser.add_argument(
        "--rtol", type=float, help="tolerance; if unset, that of the model"
    )
    parser.add_argument(
        "--max-iter",
        type=int,
        help="largest number of outer iterations; if unset, that of the model",
    )


def make_model(args: argparse.Namespace, kind: Any = None, **kwargs: Any) -> Any:
    """Makes the model that the options describe: DEAL unless ``kind`` is another."""
    from deepinv_deal import DEAL

    for name in ("pretrained", "rtol", "max_iter"):
        if getattr(args, name) is not None:
            kwargs[name] = getattr(args, name)
    return (kind or DEAL)(**kwargs)


def add_outcome_options(parser: argparse.ArgumentParser) -> None:
    """Adds what to do with a result beside writing it."""
    parser.add_argument(
        "--figure",
        metavar="FILE",
        help="also draw measurement, result, mean mask and convergence",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with code 1 if an image did not converge",
    )


def report(name: str, info: ReconstructionInfo, seconds: float) -> bool:
    """Prints how a reconstruction went; returns whether all of it converged."""
    converged = bool(info.converged.all())
    print(
        f"{name}: {int(info.n_iter.max())} iterations, {int(info.cg_iter.sum())} "
        f"conjugate gradient steps, imbalance {float(info.imbalance.max()):.1e} "
        f"({'converged' if converged else 'NOT converged'}), {seconds:.1f} s"
    )
    for note in info.notes:
        print(f"  {note}", file=sys.stderr)
    return converged
