"""
DEAL on every kind of linear physics: work, accuracy, batches, preconditioners.

For crops of scikit-image's photographs and the bundled weights, one line per operator:
outer and conjugate gradient iterations, applications of the physics (of all three
together) and seconds, without and with the automatic preconditioner, balance of forces
at the end, distance of a batch of three to its samples solved alone, and PSNR of the
scaled adjoint and of the reconstruction. An asterisk marks what did not converge.

    python benchmarks/operators.py [--size 64] [--max-iter 60] [--only MRI]
"""

from __future__ import annotations

import argparse
import importlib.util
import time

import numpy as np
import torch
from deepinv.physics import (
    MRI,
    Blur,
    BlurFFT,
    CompressedSensing,
    Denoising,
    Downsampling,
    Inpainting,
    MultiCoilMRI,
    NonCartesianMRI,
    SpaceVaryingBlur,
    StackedLinearPhysics,
    Tomography,
)
from deepinv.physics.functional import gaussian_blur
from deepinv.utils import TensorList
from skimage.data import brick, camera, coffee
from skimage.transform import resize
from torch.nn import functional as F

from deepinv_deal import DEAL, SolverOptions
from deepinv_deal.evaluation.tasks import birdcage_maps, line_mask, make_kernel


def photographs(size: int) -> torch.Tensor:
    """Three gray images ``(3, 1, size, size)``."""
    crops = []
    for image in (camera(), brick(), coffee().mean(-1)):
        side = min(image.shape)
        square = resize(image[:side, :side] / 255.0, (size, size), anti_aliasing=True)
        crops.append(torch.from_numpy(square).float())
    return torch.stack(crops)[:, None]


def problems(size: int):
    """Names, physics, noise level and weight."""
    rng = torch.Generator().manual_seed(0)
    shape = (1, size, size)
    pixels = torch.rand(shape, generator=rng) < 0.5
    motion = make_kernel("motion:15")[1]
    lines = line_mask((size, size), 4, 0.08)
    maps = birdcage_maps(8, (size, size))[None]
    inpainting = Inpainting(shape, mask=pixels.float())
    coils = MultiCoilMRI(mask=lines, coil_maps=maps, img_size=(size, size))
    yield "denoising", Denoising(), 25, None
    yield "inpainting 50 %", inpainting, 5, 1.0
    yield "inpainting, small weight", inpainting, 1, 0.1
    yield (
        "blur, circular",
        Blur(gaussian_blur(sigma=(1.6, 1.6)), padding="circular"),
        2.55,
        0.5,
    )
    yield (
        "blur, valid",
        Blur(gaussian_blur(sigma=(1.6, 1.6)), padding="valid"),
        2.55,
        0.5,
    )
    blurs = [gaussian_blur(sigma=(s, s)) for s in (0.8, 1.6)]
    side = max(blur.shape[-1] for blur in blurs)
    pads = [(side - blur.shape[-1]) // 2 for blur in blurs]
    filters = [F.pad(b, (p, p, p, p)) for b, p in zip(blurs, pads, strict=True)]
    ramp = torch.linspace(0, 1, size).expand(1, 1, size, size)
    varying = SpaceVaryingBlur(
        filters=torch.stack(filters, 2),
        multipliers=torch.stack([ramp, 1 - ramp], 2),
        padding="valid",
    )
    yield "blur, space-varying", varying, 2.55, 0.5
    yield "motion, Fourier", BlurFFT(shape, filter=motion), 2.55, 0.5
    yield (
        "super-resolution x2",
        Downsampling(
            shape, filter=gaussian_blur(sigma=(1.2, 1.2)), factor=2, padding="circular"
        ),
        2.55,
        0.28,
    )
    yield "MRI 4x", MRI(mask=lines, img_size=(size, size)), 0.51, 0.05
    yield "MRI 4x, 8 coils", coils, 0.51, 0.05
    if importlib.util.find_spec("mrinufft") and importlib.util.find_spec("finufft"):
        radial = NonCartesianMRI(
            (size, size),
            num_shots=size // 2,
            num_samples_per_shot=2 * size,
            backend="finufft",
        )
        yield "MRI, radial", radial, 0.51, 0.05
    yield "tomography", Tomography(30, img_width=size, normalize=True), 2.55, 0.05
    yield (
        "compressed sensing",
        CompressedSensing(size**2 // 2, shape, rng=rng),
        2.55,
        0.1,
    )
    stacked = StackedLinearPhysics(
        [inpainting, Blur(gaussian_blur(sigma=(1.6, 1.6)), padding="circular")]
    )
    yield "stacked", stacked, 5, 0.5


def noisy(y, level: float):
    if isinstance(y, TensorList):
        return TensorList([noisy(part, level) for part in y])
    noise = np.random.RandomState(0).normal(0, level / 255, y.shape)
    return y + torch.from_numpy(noise).to(y)


def row(y, i: int):
    if isinstance(y, TensorList):
        return TensorList([part[i : i + 1] for part in y])
    return y[i : i + 1]


class Counter:
    """Counts applications of a physics: pairs of A and its adjoint, or trials of it."""

    def __init__(self, physics):
        self.number, self.depth = 0, 0
        for name in ("A", "A_adjoint_A"):  # which may call A
            object.__setattr__(physics, name, self.counted(getattr(physics, name)))

    def counted(self, function):
        def call(*args, **kwargs):
            self.number += self.depth == 0
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1

        return call


def psnr(x_hat: torch.Tensor, x: torch.Tensor) -> float:
    error = (x_hat - x).square().flatten(1).mean(1)
    return float(-10 * error.log10().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--max-iter", type=int, default=60)
    parser.add_argument("--pretrained", default="deal_gray")
    parser.add_argument("--only", default="", help="part of the operators' names")
    args = parser.parse_args()
    photos = photographs(args.size)
    print(
        f"{'operator':26s}{'none':>22s}{'auto':>22s}{'imbalance':>11s}"
        f"{'batch':>9s}{'adjoint':>9s}{'DEAL':>7s}   outer/CG (mean of 3), physics, s"
    )
    for name, physics, level, weight in problems(args.size):
        if args.only not in name:
            continue
        x = photos
        if "MRI" in name:
            x = torch.cat([photos, 0.3 * photos.flip(-1)], 1)
        y = noisy(physics.A(x), level)
        settings = {} if weight is not None else {"sigma": level / 255}
        work, counter = [], Counter(physics)
        for preconditioner in ("none", "auto"):
            model = DEAL(
                pretrained=args.pretrained,
                max_iter=args.max_iter,
                lambda_reg=weight,
                solver=SolverOptions(preconditioner=preconditioner),
                warn=False,
            )
            start, counter.number = time.perf_counter(), 0
            with torch.no_grad():
                x_hat, info = model(y, physics, return_info=True, **settings)
            seconds = time.perf_counter() - start
            counts = (info.n_iter, info.inner_iter)
            n_iter, cg_iter = (count.double().mean() for count in counts)
            mark = "" if info.converged.all() else "*"
            steps = f"{n_iter:.0f}/{cg_iter:.0f}{mark}"
            work.append(f"{steps:>9s}{counter.number:6d}{seconds:7.1f}")
        with torch.no_grad():
            alone = model(row(y, 0), physics, **settings)
            b = physics.A_adjoint(y)
            gain = (b * x).sum() / (b * b).sum()  # the adjoint, at its best scale
        difference = float((alone - x_hat[:1]).norm() / alone.norm())
        print(
            f"{name:26s}{work[0]:>22s}{work[1]:>22s}{float(info.imbalance.max()):11.1e}"
            f"{difference:9.0e}{psnr(gain * b, x):9.2f}{psnr(x_hat, x):7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
