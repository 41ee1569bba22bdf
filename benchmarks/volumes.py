"""
DEAL on volumes: quality, iterations, time and memory for every setting of ``slices``.

Denoises the Shepp-Logan phantom, noise of 0.1, with the bundled weights.

    python benchmarks/volumes.py [--size 32 48 48] [--slices depth mean] [--threads 1]
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from deepinv.loss.metric import PSNR

from deepinv_deal import DEAL
from deepinv_deal.evaluation import shepp_logan_volume
from deepinv_deal.operators.slices import SLICE_MODES

SIGMA = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--size", type=int, nargs=3, default=(32, 48, 48))
    parser.add_argument("--slices", nargs="+", choices=SLICE_MODES, default=SLICE_MODES)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = shepp_logan_volume(*args.size)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = x + SIGMA * noise
    print(" x ".join(map(str, args.size)), f"noisy {PSNR()(y, x).item():.2f} dB")
    print("slices    PSNR   outer  CG  seconds  peak GB")
    for slices in args.slices:
        start = time.perf_counter()
        with torch.no_grad():
            x_hat, info = DEAL(slices=slices)(y, sigma=SIGMA, return_info=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{slices:8} {PSNR()(x_hat, x).item():6.2f} {int(info.n_iter):5}"
            f"{int(info.inner_iter):5} {seconds:8.1f} {peak:8.2f}"
            f"{'' if bool(info.converged) else '  not converged'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
