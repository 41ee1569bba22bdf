"""
Operations that a GPU would be given, and times that the host would wait for it.

Runs small random models with their gradients on the device of
``tests/pretend_accelerator.py``, which counts; no GPU is needed. Small images take as
many launches as large ones, and on a GPU hardly less time.

    python benchmarks/launches.py [--models DEAL SAFI] [--tasks denoising] [--lines 5]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pretend_accelerator
from test_devices import DOUBLE, MODELS, TASKS, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["DEAL", "SAFI", "CPR"])
    parser.add_argument("--tasks", nargs="+", default=["denoising", "circular blur"])
    parser.add_argument("--lines", type=int, default=0, help="lines that wait most")
    args = parser.parse_args()
    for kind, names, known in (
        ("--models", args.models, MODELS),
        ("--tasks", args.tasks, TASKS),
    ):
        for name in names:
            if name not in known:
                parser.error(f"{kind}: {name!r} is none of {', '.join(known)}")
    warnings.simplefilter("ignore")
    device = pretend_accelerator.register()
    print(f"{'model':<16}{'task':<16}{'launches':>10}{'waits':>8}{'transfers':>11}")
    for name in args.models:
        for task in args.tasks:
            with pretend_accelerator.counting() as counts:
                answer(name, task, device, DOUBLE)
            print(
                f"{name:<16}{task:<16}{counts.launches:>10}{counts.waits:>8}"
                f"{counts.transfers:>11}",
                flush=True,
            )
            for (kind, line), number in counts.where.most_common(args.lines):
                print(f"    {number:>5}  {kind}, {line}")


if __name__ == "__main__":
    main()
