"""
Are predicted errors true? Calibration of the pixel-wise uncertainty over a data set.

For the centre of every image: noise, DEAL, the posterior standard deviation with the
mask frozen, and the true error. The one calibration factor of an image is fitted on
all *other* images. The table holds, per image and for all pixels together, that factor,
the correlation of predicted standard deviation and absolute error, and the share of
pixels whose error lies in the interval of nominally 90 %.

    python benchmarks/uncertainty.py --data IMAGES [--sigma 25] [--size 96]

Errors of single pixels are random: even exact standard deviations would correlate with
them far below 1. The column "if exact" is the correlation of errors drawn at random
with the predicted standard deviations.
"""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

from deepinv_deal import DEAL
from deepinv_deal._batch import central
from deepinv_deal.files import load_image_folder
from deepinv_deal.interpret import (
    calibrate,
    linearize,
    posterior_variance,
)


def best_correlation(variance: torch.Tensor, factor: float) -> float:
    """Correlation if the predictions were exact."""
    std = factor * variance.sqrt()
    rng = torch.Generator().manual_seed(1)
    error = std * torch.randn(std.shape, generator=rng)
    return calibrate(variance, error).correlation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--pretrained", default="deal_gray")
    parser.add_argument("--sigma", type=float, default=25.0, help="gray levels")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--spacing", type=int, default=6)
    args = parser.parse_args()
    sigma = args.sigma / 255
    model = DEAL(pretrained=args.pretrained)
    found = {}
    for name, image in tqdm(load_image_folder(args.data, 1), disable=None):
        x = central(image[None], args.size).float() / 255
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        at = linearize(
            model, x + sigma * noise, sigma=sigma, rtol=1e-3, inner_rtol=1e-3
        )
        variance = posterior_variance(at, sigma, spacing=args.spacing)
        # The random signs leave an estimate below zero now and then.
        variance = variance.clamp_min(1e-3 * float(variance.mean()))
        found[name] = variance, at.image - x
    squares = {n: float((e.square() / v).mean()) for n, (v, e) in found.items()}
    print(
        f"{'image':20}{'factor':>8}{'correlation':>13}{'if exact':>10}{'coverage':>10}"
    )
    for name, (variance, error) in found.items():
        others = [s for other, s in squares.items() if other != name]
        factor = (sum(others) / len(others)) ** 0.5
        result = calibrate(variance, error, factor=factor)
        best = best_correlation(variance, factor)
        print(
            f"{name[:19]:20}{factor:8.2f}{result.correlation:13.2f}{best:10.2f}"
            f"{result.coverage:10.1%}"
        )
    variance = torch.cat([v.flatten() for v, _ in found.values()])
    error = torch.cat([e.flatten() for _, e in found.values()])
    total = calibrate(variance, error)
    best = best_correlation(variance, total.factor)
    print(
        f"{'all pixels':20}{total.factor:8.2f}{total.correlation:13.2f}{best:10.2f}"
        f"{total.coverage:10.1%}"
    )
    print("predicted and observed error of bins, gray levels:")
    for predicted, observed in zip(total.predicted, total.observed, strict=True):
        print(f"  {255 * float(predicted):6.2f} {255 * float(observed):6.2f}")


if __name__ == "__main__":
    main()
