"""``deepinv-deal bench``: work and time of solvers until the same accuracy."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from deepinv_deal.cli._options import Commands, photograph

if TYPE_CHECKING:
    from torch import Tensor


def add_bench(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    from deepinv_deal.evaluation.speed import SPEED_TASKS, TARGETS

    bench = commands.add_parser(
        "bench",
        help="compare the speed with deepinv's DEAL, until the same accuracy",
        description="Solves the same problems with the same weights by this package, "
        "by the published iteration and by deepinv.models.DEAL, until the nonlinear "
        "residual is first below each target.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument(
        "--pretrained",
        metavar="WEIGHTS",
        default="deal_gray",
        help="weights of a DEAL: bundled name, 'download' (gray) or file",
    )
    bench.add_argument(
        "--task",
        nargs="+",
        choices=list(SPEED_TASKS),
        default=list(SPEED_TASKS),
        help="problems to solve",
    )
    bench.add_argument(
        "--image",
        help="image file, of which the central part is used; if unset, a photograph of "
        "scikit-image",
    )
    bench.add_argument(
        "--size", type=int, default=128, help="side of the image in pixels"
    )
    bench.add_argument(
        "--target",
        type=float,
        nargs="+",
        default=list(TARGETS),
        help="nonlinear residuals to reach",
    )
    bench.add_argument(
        "--time-limit",
        type=float,
        default=120.0,
        help="seconds after which a run is stopped",
    )
    bench.add_argument(
        "--reference",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure distances from the solution in double precision",
    )
    bench.add_argument(
        "--bfloat16",
        action="store_true",
        help="also with convolutions in bfloat16 in the inner solves",
    )
    bench.add_argument("--device", default="cpu", help="where to compute")
    bench.add_argument("--threads", type=int, help="number of CPU threads")
    bench.add_argument("--csv", help="file for one line per run")
    bench.add_argument("--figure", help="file for a picture of residual against time")
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    import torch

    from deepinv_deal import DEAL
    from deepinv_deal.evaluation import application_times, speed, write_csv

    if args.size < 16:
        raise ValueError(f"--size must be at least 16, got {args.size}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    model = DEAL(pretrained=args.pretrained, warn=False, device=args.device)
    image = _image(args.image, args.size, model.prior[0].in_channels)
    times = application_times(model, args.size)
    print(
        f"One application of W^T M^2 W at {args.size} x {args.size}: "
        f"{1e3 * times.normal:.2f} ms, with plain convolutions "
        f"{1e3 * times.plain:.2f} ms ({times.plain / times.normal:.1f} times as long). "
        f"One conjugate gradient step {1e3 * times.step:.2f} ms "
        f"({times.step / times.normal:.2f}), one mask {1e3 * times.mask:.2f} ms.\n",
        flush=True,
    )
    every = (*speed.SOLVERS, speed.TV)
    solvers = every if args.bfloat16 else speed.DEFAULT_SOLVERS
    runs = []
    for task in args.task:
        new = speed.compare_speed(
            model,
            image,
            [task],
            targets=args.target,
            time_limit=args.time_limit,
            reference=args.reference,
            solvers=solvers,
        )
        print(speed.speed_table(new) + "\n", flush=True)
        runs += new
    if args.csv:
        write_csv(runs, args.csv)
    if args.figure:
        speed.plot_speed(runs).savefig(args.figure, dpi=150)
    missed = [r for r in runs if r.solver == speed.OWN and not r.reached]
    for run in missed:
        print(f"{run.task}: {run.target:g} was not reached", file=sys.stderr)
    return 1 if missed else 0


def _image(path: str | None, size: int, channels: int) -> Tensor:
    """Returns the 8-bit image ``(C, size, size)`` to compare on."""
    from deepinv_deal._batch import central
    from deepinv_deal.files import read_picture

    if path is None:
        x = photograph(size, channels)
    else:
        x = central(read_picture(path).x[0], size)
        if x.shape != (channels, size, size):
            raise ValueError(
                f"--image {path!r} must have {channels} channel(s) and at least "
                f"{size} x {size} pixels for these weights; it gives "
                f"{tuple(x.shape)}."
            )
    return (255 * x).round().clamp(0, 255).byte()
