"""
Seconds in which every family denoises one photograph.

``camera`` of scikit-image, shrunk to 321 x 481 pixels, with noise of 25/255, bundled
weights and default settings; the memory of large tensors is used again, as on the
command line. The least time of several calls is printed.

    python benchmarks/families.py [--threads 2] [--no-kept-memory] [--only safi_25 ...]
"""

from __future__ import annotations

import argparse
import time

import torch
from skimage.data import camera
from skimage.transform import resize

from deepinv_deal import (
    DEAL,
    MMR,
    SAFI,
    PatchSynthesis,
    SmoothPlusSparse,
    keep_freed_memory,
)
from deepinv_deal.evaluation import quality

MODELS = {
    "deal_gray": DEAL,
    "deal_gray_128": DEAL,
    "safi_25": SAFI,
    "mmr_25": MMR,
    "cpr_25": SmoothPlusSparse,
    "ncpr_25": SmoothPlusSparse,
    "patch_25": PatchSynthesis,
}

SIGMA = 25 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeat", type=int, default=3, help="calls that are timed")
    parser.add_argument(
        "--kept-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the memory of large tensors again",
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.kept_memory:
        keep_freed_memory()
    pixels = resize(camera() / 255, (321, 481), anti_aliasing=True)
    x = torch.from_numpy(pixels).float()[None, None]
    rng = torch.Generator().manual_seed(0)
    y = x + SIGMA * torch.randn(x.shape, generator=rng)
    for name in args.only:
        model = MODELS[name](pretrained=name, warn=False)
        times = []
        with torch.no_grad():
            model(y[..., :64, :64], sigma=SIGMA)  # what is slow the first time
            for _ in range(args.repeat):
                start = time.perf_counter()
                x_hat = model(y, sigma=SIGMA)
                times.append(time.perf_counter() - start)
            info = model(y, sigma=SIGMA, return_info=True)[1]
        print(
            f"{name}: {min(times):.1f} s, {int(info.n_iter)} iterations with "
            f"{int(info.inner_iter)} inner ones, {quality(x_hat, x)[0]:.2f} dB",
            flush=True,
        )


if __name__ == "__main__":
    main()
