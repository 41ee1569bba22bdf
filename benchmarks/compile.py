"""
Whether torch.compile makes the two parts of DEAL faster that take nearly all its time.

Prints milliseconds of one application of W^T M^2 W and of one mask, as they are and
compiled, the seconds compilation took and the largest difference of the results.

    python benchmarks/compile.py [--sizes 128 256] [--device cuda] [--threads 1]
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from _common import clock, median_seconds

from deepinv_deal import DEAL


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", default="default", help="mode of torch.compile")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    prior = DEAL(device=device).prior
    print(f"{'size':>5s} {'part':12s}{'ms':>8s}{'compiled':>10s}{'s':>6s}  change")
    for size in args.sizes:
        x = torch.rand(1, 1, size, size, device=device)
        regularizer = prior.bind(25 / 255, x)
        squared_mask = regularizer.squared_mask(x)
        for name, function, inputs in (
            ("application", regularizer.normal, (x, squared_mask)),
            ("mask", regularizer.squared_mask, (x,)),
        ):
            compiled = torch.compile(function, mode=args.mode, dynamic=False)
            expected = function(*inputs)
            start = clock(device)
            change = (compiled(*inputs) - expected).abs().max()
            seconds = clock(device) - start
            plain, fast = (
                1e3 * median_seconds(partial(f, *inputs), args.repeats, device)
                for f in (function, compiled)
            )
            print(
                f"{size:5d} {name:12s}{plain:8.1f}{fast:10.1f}{seconds:6.0f}"
                f"{float(change):8.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
