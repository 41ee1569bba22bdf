"""
Patch means of the estimate ("++") against those of the data, in accelerated MRI.

The convex patch model reconstructs a phantom and a photograph of scikit-image from 30 %
of the frequencies, with noise of 10 gray levels: as published but for images and masks.
The weights beta and lambda are the best of a search for every line, as published.

    python benchmarks/plus_plus.py --weights FILE [--size 64] [--mask Cartesian]
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from deepinv.physics import MRI, GaussianNoise
from skimage.data import camera, shepp_logan_phantom
from skimage.transform import resize

from deepinv_deal import PatchSynthesis, tune
from deepinv_deal.evaluation.tasks import line_mask


def radial_mask(size: int, ratio: float) -> torch.Tensor:
    """Lines through the centre, as many as sample the given share of frequencies."""
    rows, columns = np.mgrid[:size, :size] - size // 2
    mask = np.zeros((size, size), bool)
    number = 0
    while mask.mean() < ratio:
        number += 1
        mask[:] = False
        for angle in math.pi * np.arange(number) / number:
            distance = rows * math.cos(angle) - columns * math.sin(angle)
            mask |= np.abs(distance) < 0.5
    return torch.from_numpy(mask).float()


def complex_image(photo: np.ndarray, size: int) -> torch.Tensor:
    real = resize(photo / photo.max(), (size, size), anti_aliasing=True)
    real = torch.from_numpy(real).float()
    return torch.stack([real, torch.zeros_like(real)])[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", required=True, help="of PatchSynthesis")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--mask", choices=("radial", "Cartesian"), help="only this")
    args = parser.parse_args()
    masks = {
        "radial": radial_mask(args.size, 0.3),
        "Cartesian": line_mask((args.size, args.size), 1 / 0.3, 0.08),
    }
    images = {"phantom": shepp_logan_phantom(), "camera": camera()}
    print(
        f"{'mask':12s}{'image':10s}{'fixed':>8s}{'free':>8s}{'gain':>7s}   beta, lambda"
    )
    for mask_name, mask in masks.items():
        if args.mask not in (None, mask_name):
            continue
        for image_name, photo in images.items():
            x = complex_image(photo, args.size)
            noise = GaussianNoise(10 / 255, torch.Generator().manual_seed(0))
            physics = MRI(mask=mask, img_size=(args.size, args.size), noise_model=noise)
            y = physics(x)
            best = {}
            for mean in ("fixed", "free"):
                model = PatchSynthesis(
                    pretrained=args.weights,
                    mean=mean,
                    complex_mode="real",
                    solver="admm",
                    rtol=1e-3,
                    warn=False,
                )
                best[mean] = tune(
                    model,
                    physics,
                    [(x, y)],
                    lambda_reg=2e-3,
                    beta=3e-3,
                    tune_beta=True,
                    spread=3,
                    precision=1.4,
                ).best
            fixed, free = best["fixed"], best["free"]
            print(
                f"{mask_name:12s}{image_name:10s}{fixed.score:8.2f}{free.score:8.2f}"
                f"{free.score - fixed.score:7.2f}   {fixed.beta:.2g}, "
                f"{fixed.lambda_reg:.2g}; {free.beta:.2g}, {free.lambda_reg:.2g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
