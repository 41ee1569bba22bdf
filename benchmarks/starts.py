"""
Does the result depend on where the iteration starts?

The models have no convex energy, so no theorem says that the fixed point is unique.
For the centre of every image and five starts (the model's own, the noisy image, zero,
noise, the truth), prints outer iterations, PSNR, the relative distance to the first
result, the imbalance of forces at the end and, for MMR, the energy.

    python benchmarks/starts.py --data IMAGES --model MMR --pretrained mmr_25
        [--images 3] [--size 64] [--rtol 2e-3] [--max-iter 300] [--forcing 0.05]
"""

from __future__ import annotations

import argparse

import torch
from operators import psnr

from deepinv_deal import DEAL, MMR, SAFI, SolverOptions
from deepinv_deal._batch import central
from deepinv_deal.files import load_images

MODELS = {"DEAL": DEAL, "SAFI": SAFI, "MMR": MMR}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--model", choices=MODELS, default="MMR")
    parser.add_argument("--pretrained", default="mmr_25")
    parser.add_argument("--sigma", type=float, default=25.0, help="gray levels")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rtol", type=float, default=2e-3)
    parser.add_argument("--max-iter", type=int, default=300)
    parser.add_argument("--forcing", type=float, default=0.05)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = MODELS[args.model](
        pretrained=args.pretrained,
        rtol=args.rtol,
        max_iter=args.max_iter,
        solver=SolverOptions(forcing=args.forcing),
        warn=False,
    )
    rng, sigma = torch.Generator().manual_seed(0), args.sigma / 255
    print("image start      outer   PSNR  distance  imbalance  energy")
    for number, image in enumerate(load_images(args.data, 1)[: args.images]):
        x = central(image[None], args.size).float() / 255
        y = x + sigma * torch.randn(x.shape, generator=rng)
        starts = {
            "own": None,
            "data": y,
            "zero": torch.zeros_like(x),
            "noise": torch.rand(x.shape, generator=rng),
            "truth": x,
        }
        first: torch.Tensor | None = None
        for name, init in starts.items():
            with torch.no_grad():
                x_hat, info = model(y, sigma=sigma, init=init, return_info=True)
            first = x_hat if first is None else first
            dB = psnr(x_hat, x)
            distance = float((x_hat - first).norm() / first.norm())
            energy = (
                f"{model.energy(x_hat, y).item():.4f}" if args.model == "MMR" else ""
            )
            print(
                f"{number:5d} {name:8s}{int(info.n_iter):8d}{dB:7.3f}{distance:10.1e}"
                f"{float(info.imbalance):11.1e}  {energy}",
                flush=True,
            )


if __name__ == "__main__":
    main()
