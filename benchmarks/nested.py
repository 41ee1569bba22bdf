"""
SAFI and MMR in single-coil MRI: this package against the published nested iteration.

Reconstructs a phantom and a photograph of scikit-image from a quarter of the lines of
their spectra. The published iteration (arXiv 2407.06608; tolerances as in its code) has
three loops: ten masks, accelerated proximal gradients for each, and for each of their
steps accelerated gradients on the dual, started anew. Printed are pairs of applications
of W and its adjoint, seconds, the imbalance of forces at the result, its energy (MMR
only) and its PSNR; this package at its default tolerance, and at a fifth of it.

    python benchmarks/nested.py --model MMR --pretrained mmr_25 [--size 48]
        [--lambda-reg 2e-4] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace

import torch
from deepinv.physics import MRI
from operators import noisy, psnr
from skimage.data import camera, shepp_logan_phantom
from skimage.transform import resize
from torch import Tensor

from deepinv_deal import MMR, SAFI
from deepinv_deal._batch import norm
from deepinv_deal.evaluation.tasks import line_mask
from deepinv_deal.problems import AttentiveL1, AttentiveL1Equation
from deepinv_deal.solvers import fixed_point, project_linf

MODELS = {"SAFI": SAFI, "MMR": MMR}


@dataclass(frozen=True)
class Counted(AttentiveL1):
    """A regularizer that counts applications of W and of its adjoint."""

    count: list[int] = field(default_factory=lambda: [0])

    def analyse(self, x: Tensor) -> Tensor:
        self.count[0] += 1
        return super().analyse(x)

    def adjoint(self, w: Tensor) -> Tensor:
        self.count[0] += 1
        return super().adjoint(w)

    def normal(self, x: Tensor) -> Tensor:
        self.count[0] += 2
        return super().normal(x)


def relative_change(new: Tensor, old: Tensor) -> float:
    return float(norm(new - old) / norm(old))


def published(equation: AttentiveL1Equation, outer: int = 10) -> Tensor:
    """The pair that the nested iteration ends with, in an inverse problem."""
    R, b = equation.regularizer, equation.data.b
    weight = float(equation.strength)

    # All steps have length 1: a masked Fourier transform has norm 1, and W has here.
    def prox(d: Tensor, mask: Tensor, x: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """Image and dual of the proximal problem; the dual starts from that of x."""
        u = v = R.analyse(x)
        t = 5 / 3
        for n in range(500):
            ascent = v + R.analyse(equation.clamp(d - R.adjoint(v)))
            new_u = project_linf(ascent, weight * mask)
            new_x = equation.clamp(d - R.adjoint(new_u))
            if relative_change(new_x, x) < tol and n > 5:
                return new_x, new_u
            t_new = (n + 6) / 3
            v = new_u + (t - 1) / t_new * (new_u - u)
            x, u, t = new_x, new_u, t_new
        return x, u

    x, u = b, torch.zeros_like(R.analyse(b))
    for k in range(outer):
        tol = 1e-3 * 1e-2 ** (min(k, 5) / 5)
        Wx = R.analyse(x)
        mask = torch.ones_like(Wx) if k == 0 else R.mask(x, Wx)
        d, t = x, 1.0
        for i in range(1000):
            inner_tol = 3 * tol * (1 / 9) ** (min(i, 50) / 50)
            new, u = prox(d - (equation.data.normal(d) - b), mask, x, inner_tol)
            t_new = (i + 4) / 3
            d = new + (t - 1) / t_new * (new - x)
            change = relative_change(new, x)
            x, t = new, t_new
            if change < tol and i > 10:
                break
    return equation.pair(x, u)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="MMR")
    parser.add_argument("--pretrained", default="mmr_25")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--lambda-reg", type=float, default=2e-4)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = MODELS[args.model](
        pretrained=args.pretrained, complex_mode="real", scale=None, warn=False
    )
    shape = (args.size, args.size)
    physics = MRI(mask=line_mask(shape, 4, 0.08), img_size=shape)
    print("image     solver           pairs  seconds  imbalance      energy   PSNR")
    for name, photo in (("phantom", shepp_logan_phantom()), ("camera", camera() / 255)):
        small = resize(photo, shape, anti_aliasing=True)
        x = torch.from_numpy(small)[None, None].float()
        truth = torch.cat([x, torch.zeros_like(x)], 1)
        y = noisy(physics.A(truth), 0.51)
        equation = model.pose(y, physics, lambda_reg=args.lambda_reg).equation
        regularizer = equation.regularizer
        counted = Counted(regularizer.W, regularizer.nu, regularizer.mask_function)
        equation = replace(equation, regularizer=counted)

        def this(rtol: float, equation: AttentiveL1Equation = equation) -> Tensor:
            start = equation.start(None)
            return fixed_point(equation.freeze, start, rtol=rtol, max_iter=300).x

        solvers = {
            "published": lambda equation=equation: published(equation),
            "this, 2e-2": lambda: this(2e-2),
            "this, 4e-3": lambda: this(4e-3),
        }
        for solver, solve in solvers.items():
            counted.count[0], start = 0, time.perf_counter()
            with torch.no_grad():
                p = solve()
            seconds, pairs = time.perf_counter() - start, counted.count[0] // 2
            frozen, x_hat = equation.freeze(p), equation.image(p)
            imbalance = frozen.residual / frozen.weight
            energy = ""
            if args.model == "MMR":
                both = torch.cat([x_hat, torch.zeros_like(x_hat)], 1)
                value = model.energy(both, y, physics, lambda_reg=args.lambda_reg)
                energy = f"{value.item():.5f}"
            print(
                f"{name:10s}{solver:14s}{pairs:8d}{seconds:9.1f}"
                f"{imbalance.item():11.1e}{energy:>12s}"
                f"{psnr(x_hat, x):7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
