"""
What a step of training DEAL costs, and how much of it is convolutions.

Runs the recipe of ``deepinv-deal train deal`` from given weights, with as many new
noisy patches, and patches that come back, as in a long training. Prints steps per
second, billions of floating point operations per step (nearly all in convolutions), the
rate at which they are done, the share of the time that is spent in convolutions, and
what an hour of training computes, in 10^15 operations.

    python benchmarks/training.py --data IMAGES [--init deal_gray]
        [--num-filters 32 64] [--steps 64] [--threads 1] [--device cpu]
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from deepinv_deal.training import DEALRecipe, DEALTrainer


def cost(trainer: DEALTrainer, steps: int) -> tuple[float, float, float]:
    """Steps per second, convolutions' operations per step, their share of the time."""

    def run() -> float:
        start = time.perf_counter()
        for _ in tqdm(range(steps), disable=None, leave=False):
            trainer.train_step()
            trainer.step += 1
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter() - start

    run()  # fills the pool
    seconds = run()
    with FlopCounterMode(display=False) as counter:
        run()
    cuda = trainer.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=kinds) as profiled:
        run()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    # Not the kernels' own events, whose time is that of the operators that start them.
    times = {
        e.key: float(getattr(e, own))
        for e in profiled.key_averages()
        if e.device_type == torch.autograd.DeviceType.CPU
    }
    share = sum(t for key, t in times.items() if "conv" in key) / sum(times.values())
    return steps / seconds, counter.get_total_flops() / steps, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--init", default="deal_gray")
    parser.add_argument("--num-filters", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--in-channels", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--patch-size", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.steps < 8 or args.steps % 8:
        parser.error(f"--steps must be a multiple of 8, got {args.steps}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"{'filters':>8}{'steps/s':>9}{'GFLOP/step':>12}{'GFLOP/s':>9}"
        f"{'in convolutions':>17}{'PFLOP/hour':>12}"
    )
    for num_filters in args.num_filters:
        with tempfile.TemporaryDirectory() as out:
            recipe = DEALRecipe(
                data=args.data,
                out=out,
                steps=1_000_000,
                num_filters=num_filters,
                in_channels=args.in_channels,
                init=args.init,
                lr=1e-6,
                patch_size=args.patch_size,
                batch_size=args.batch_size,
                pool=args.steps // 8,  # so that each batch is drawn anew once a run
                device=args.device,
            )
            rate, flops, share = cost(DEALTrainer(recipe), args.steps)
        print(
            f"{num_filters:8}{rate:9.2f}{flops / 1e9:12.1f}{rate * flops / 1e9:9.1f}"
            f"{share:17.0%}{3600 * rate * flops / 1e15:12.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
