"""
Are gradients at default settings those of accurate solutions?

For a linear function of a denoised image, its product with the error of an accurate
solution: the slope along the gradient that a model gives, by differences of accurate
solutions, divided by the norm of that gradient. It is 1 where the gradient is right.
Beside it, the cosine of the angle to the gradient at the accurate solution. The
solutions of SAFI, MMR and the dictionaries have kinks, and DEAL's bend, so the slope
depends on the length of the step, too.

    python benchmarks/gradients.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from skimage.data import camera
from torch import Tensor

from deepinv_deal import (
    DEAL,
    MMR,
    SAFI,
    AdjointOptions,
    PatchSynthesis,
    SmoothPlusSparse,
)

SIGMA = 25 / 255

#: Models by their weights, and what makes their solutions accurate.
MODELS: dict[str, tuple[type[Any], dict[str, float]]] = {
    "deal_gray": (DEAL, {"rtol": 1e-5}),
    "safi_25": (SAFI, {"rtol": 1e-3}),
    "mmr_25": (MMR, {"rtol": 1e-3}),
    "cpr_25": (SmoothPlusSparse, {"rtol": 1e-5}),
    "patch_25": (PatchSynthesis, {}),
}

#: Steps relative to the noise or to the weights.
STEPS = (1e-2, 2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=20, help="side of the image")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rtol", type=float, help="tolerance instead of the default")
    parser.add_argument("--smoothing", type=float, help="of SAFI and MMR")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.from_numpy(camera()[100:, 200:][: args.size, : args.size] / 255.0)
    x = x.double()[None, None]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = (x + SIGMA * noise.double()).requires_grad_()
    print(f"{'weights':10} {'in':40} {'|gradient|':>10}  cosine  slope / |gradient|")
    for name in args.models:
        kind, accurate = MODELS[name]
        settings: dict[str, Any] = {"warn": False}
        if args.rtol is not None:
            settings["rtol"] = args.rtol
        if args.smoothing is not None:
            settings["adjoint"] = AdjointOptions(smoothing=args.smoothing)
        model = kind(pretrained=name, **settings).double()
        reference = kind(prior=model.prior, warn=False, **accurate)
        with torch.no_grad():
            error = reference(y, sigma=SIGMA) - x

        def loss(model: Any, error: Tensor = error) -> Tensor:
            return (model(y, sigma=SIGMA) * error).sum()

        tensors = {"y": y, **dict(model.prior.named_parameters())}
        gradients, exact = (
            torch.autograd.grad(loss(m), list(tensors.values()), allow_unused=True)
            for m in (model, reference)
        )
        for label, gradient, other in zip(tensors, gradients, exact, strict=True):
            if gradient is None or float(gradient.norm()) == 0:
                continue
            tensor = tensors[label]
            cosine = float((gradient * other).sum() / gradient.norm() / other.norm())
            length = SIGMA * noise.norm() if label == "y" else tensor.detach().norm()
            ratios = []
            for relative in STEPS:
                step = relative * length * gradient / gradient.norm()
                with torch.no_grad():
                    tensor += step
                    above = loss(reference)
                    tensor -= 2 * step
                    below = loss(reference)
                    tensor += step
                slope = (above - below) / (2 * step.norm())
                ratios.append(float(slope / gradient.norm()))
            both = "  ".join(f"{ratio:6.2f}" for ratio in ratios)
            size = f"{float(gradient.norm()):10.3g}"
            print(f"{name:10} {label:40} {size}  {cosine:6.3f}  {both}")


if __name__ == "__main__":
    main()
