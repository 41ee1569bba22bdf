"""
The figures of the front page and the guide.

    python benchmarks/figures.py [NAME ...]

writes all, or those named, to ``docs/_static/figures``, and prints the numbers that are
in them. All images are scikit-image's.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepinv as dinv
import matplotlib as mpl
import numpy as np
import skimage.data
import torch
from matplotlib.figure import Figure
from skimage.transform import resize
from torch import Tensor

from deepinv_deal import (
    DEAL,
    MMR,
    SAFI,
    PatchSynthesis,
    SmoothPlusSparse,
    interpret,
    tune,
)
from deepinv_deal.evaluation import quality, shepp_logan_volume
from deepinv_deal.evaluation.tasks import birdcage_maps, line_mask

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "_static" / "figures"


def camera(top: int, left: int, size: int, step: int = 1) -> Tensor:
    """A detail of scikit-image's camera, ``(1, 1, size, size)`` in [0, 1]."""
    rows, columns = (slice(n, n + step * size, step) for n in (top, left))
    detail = skimage.data.camera()[rows, columns]
    return torch.from_numpy(detail / 255).float()[None, None]


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def noisy(x: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """The image with Gaussian noise."""
    return x + sigma * torch.randn(x.shape, generator=generator(seed))


def psnr(x_hat: Tensor, x: Tensor) -> float:
    """PSNR in dB of the clipped estimate."""
    return quality(x_hat, x)[0]


def row(panels: list[tuple[str, Any, dict[str, Any]]], width: float = 2.6) -> Figure:
    """Images in a row, each with a title below."""
    figure = Figure(figsize=(width * len(panels), width * 1.12), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, image, options) in zip(axes, panels, strict=True):
        picture = image.squeeze()
        picture = picture.movedim(0, -1) if picture.ndim == 3 else picture
        shown = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
        ax.imshow(
            picture.clamp(0, 1) if picture.ndim == 3 else picture, **shown | options
        )
        ax.set_xlabel(title, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure


def front() -> Figure:
    """Measurement, reconstruction, mask and uncertainty of one problem."""
    x = camera(40, 150, 96, step=2)
    # Scratches, and half of the other pixels.
    mask = (torch.rand(x.shape, generator=generator(1)) < 0.5).float()
    mask[..., 22:26, 10:76] = mask[..., 64:68, 14:86] = 0
    mask[..., 16:88, 80:84] = 0
    physics = dinv.physics.Inpainting(
        x.shape[1:],
        mask=mask[0],
        noise_model=dinv.physics.GaussianNoise(0.03, generator()),
    )
    y = physics(x)
    model = DEAL()
    settings = {"sigma": 15 / 255, "lambda_reg": 0.3}
    with torch.no_grad():
        x_hat, info = model(y, physics, return_info=True, **settings)
    at = interpret.linearize(model, y, physics, **settings)
    deviation = interpret.posterior_variance(at, 0.03, spacing=6).sqrt()
    print(f"front: {psnr(y, x):.2f} -> {psnr(x_hat, x):.2f} dB, {int(info.n_iter)} its")
    return row(
        [
            ("measurement", y, {}),
            (f"reconstruction, {psnr(x_hat, x):.1f} dB", x_hat, {}),
            ("mean of the masks", info.mask.mean(1), {"vmin": None, "vmax": None}),
            ("standard deviation", deviation, {"cmap": "magma", "vmax": None}),
        ]
    )


def models() -> Figure:
    """One noisy image, and what each model makes of it."""
    sigma = 25 / 255
    x = camera(40, 150, 80, step=2)
    y = noisy(x, sigma)
    panels = [(f"noisy, {psnr(y, x):.2f} dB", y, {})]
    for name, model in (
        ("DEAL", DEAL()),
        ("SAFI", SAFI(pretrained="safi_25")),
        ("MMR", MMR(pretrained="mmr_25")),
        ("CPR", SmoothPlusSparse(pretrained="cpr_25")),
        ("NCPR", SmoothPlusSparse(pretrained="ncpr_25")),
        ("PatchSynthesis", PatchSynthesis(pretrained="patch_25")),
    ):
        with torch.no_grad():
            x_hat, info = model(y, sigma=sigma, return_info=True)
        print(f"models: {name} {psnr(x_hat, x):.2f} dB, {int(info.n_iter)} iterations")
        panels.append((f"{name}, {psnr(x_hat, x):.2f} dB", x_hat, {}))
    return row(panels, width=1.6)


def weight() -> Figure:
    """Deblurring with too small a weight, a good one, and too large a one."""
    x, other = camera(40, 150, 80, step=2), camera(300, 100, 64, step=2)
    blur = dinv.physics.Blur(
        dinv.physics.functional.gaussian_blur(sigma=(1.6, 1.6)),
        padding="circular",
        noise_model=dinv.physics.GaussianNoise(0.01, generator()),
    )
    y, model = blur(x), DEAL()
    best = tune(model, blur, [other]).lambda_reg
    panels = [(f"measured, {psnr(y, x):.2f} dB", y, {})]
    names = ("a thirtieth", "found by tune", "thirty times")
    for name, value in zip(names, (best / 30, best, best * 30), strict=True):
        with torch.no_grad():
            x_hat = model(y, blur, lambda_reg=value)
        print(f"weight: {value:.3g} {psnr(x_hat, x):.2f} dB")
        panels.append((f"{name}, {psnr(x_hat, x):.2f} dB", x_hat, {}))
    return row(panels, width=2.0)


def convergence() -> Figure:
    """Imbalance and distance from the solution in every iteration."""
    sigma = 25 / 255
    x = camera(40, 170, 64, step=2).double()
    y = noisy(x, sigma).double()

    def solve(**options: Any) -> tuple[Tensor, Any]:
        model = DEAL(warn=False, **options).double()
        with torch.no_grad():
            return model(y, sigma=sigma, return_info=True)

    exact, _ = solve(rtol=1e-7, max_iter=200)
    imbalance, distance = [], []
    for n in range(1, 26):
        x_hat, info = solve(rtol=1e-7, max_iter=n)
        imbalance.append(float(info.imbalance))
        distance.append(float((x_hat - exact).norm() / (y - exact).norm()))
    for rtol in (0.1, 0.02, 0.005):
        x_hat, info = solve(rtol=rtol)
        print(
            f"convergence: rtol {rtol:g}, {int(info.n_iter)} iterations, "
            f"{int(info.inner_iter)} inner, {psnr(x_hat.float(), x.float()):.3f} dB"
        )
    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    ax = figure.subplots()
    steps = range(1, len(imbalance) + 1)
    ax.semilogy(steps, imbalance, label="imbalance of forces")
    ax.semilogy(steps, distance, label="distance / noise removed")
    ax.axhline(0.02, color="0.3", ls="--", lw=1)
    ax.set_xlabel("iteration")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def other_noise() -> Figure:
    """Counts and impulses, with least squares and with their likelihood."""
    x = camera(40, 150, 80, step=2)
    counts = dinv.physics.Denoising(dinv.physics.PoissonNoise(1 / 30, rng=generator()))
    impulses = dinv.physics.Blur(
        dinv.physics.functional.gaussian_blur(sigma=(1.2, 1.2)),
        padding="circular",
        noise_model=dinv.physics.SaltPepperNoise(p=0.05, s=0.05, rng=generator()),
    )
    panels = []
    for name, physics, plain, own in (
        (
            "counts",
            counts,
            {"data_fidelity": dinv.optim.L2(), "sigma": float((x.mean() / 30).sqrt())},
            {},
        ),
        (
            "impulses",
            impulses,
            {"data_fidelity": dinv.optim.L2(), "sigma": 33 / 255, "lambda_reg": 30.0},
            {"data_fidelity": dinv.optim.L1(), "sigma": 15 / 255, "lambda_reg": 30.0},
        ),
    ):
        y = physics(x)
        with torch.no_grad():
            # The level of denoising is given to the call, here by no noise model.
            images = [y, *(DEAL(**s)(y, physics) for s in (plain, own))]
        titles = (name, "least squares", "likelihood")
        for title, image in zip(titles, images, strict=True):
            print(f"other_noise: {title} {psnr(image, x):.2f} dB")
            panels.append((f"{title}, {psnr(image, x):.1f} dB", image, {}))
    return row(panels, width=1.8)


def mri() -> Figure:
    """Magnitude and phase, reconstructed from four coils."""
    size = (96, 96)
    phantom = resize(skimage.data.shepp_logan_phantom(), size, anti_aliasing=True)
    rows, columns = np.mgrid[-1:1:96j, -1:1:96j]
    image = torch.from_numpy(phantom * np.exp(1j * (rows + 0.5 * columns**2)))
    x = torch.view_as_real(image).movedim(-1, 0)[None].float()
    scan = dinv.physics.MultiCoilMRI(
        mask=line_mask(size, acceleration=4, center_fraction=0.08),
        coil_maps=birdcage_maps(4, size),
        img_size=size,
        noise_model=dinv.physics.GaussianNoise(0.005, generator()),
    )
    y = scan(x)
    with torch.no_grad():
        x_hat = DEAL(lambda_reg=0.05)(y, scan)

    def magnitude(z: Tensor) -> Tensor:
        return z.square().sum(1, keepdim=True).sqrt()

    def score(z: Tensor) -> float:
        return psnr(magnitude(z), magnitude(x))

    zero_filled = scan.A_adjoint(y)
    phase = torch.atan2(x_hat[:, 1], x_hat[:, 0]).where(magnitude(x)[:, 0] > 0.1, 0)
    print(f"mri: {score(zero_filled):.2f} -> {score(x_hat):.2f} dB (magnitude)")
    return row(
        [
            (f"zero-filled, {score(zero_filled):.1f} dB", magnitude(zero_filled), {}),
            (f"DEAL, {score(x_hat):.1f} dB", magnitude(x_hat), {}),
            ("phase", phase, {"cmap": "twilight", "vmin": -np.pi, "vmax": np.pi}),
        ]
    )


def volumes() -> Figure:
    """A section along the depth of a volume that was blurred in three dimensions."""
    x = shepp_logan_volume(16, 32, 32)
    noise = dinv.physics.GaussianNoise(0.01, generator())

    def blur(dimensions: int) -> dinv.physics.Blur:
        grids = torch.meshgrid(*[torch.arange(-3.0, 4)] * dimensions, indexing="ij")
        kernel = torch.exp(-torch.stack(grids).square().sum(0) / 2)
        kernel = (kernel / kernel.sum())[None, None]
        return dinv.physics.Blur(kernel, padding="circular", noise_model=noise)

    y = blur(3)(x)
    found = {"blurred": y}
    with torch.no_grad():
        # A slice without contents must not be taken for a dark image.
        slices = DEAL(scale=None)(y[0].transpose(0, 1), blur(2), lambda_reg=0.3)
        found["slice by slice"] = slices.transpose(0, 1)[None]
        for name in ("depth", "mean"):
            image = DEAL(slices=name)(y, blur(3), lambda_reg=0.3)
            found[f'slices="{name}"'] = image
    scores = {name: dinv.metric.PSNR()(v, x).item() for name, v in found.items()}
    print("volumes:", {name: f"{score:.2f} dB" for name, score in scores.items()})
    # The voxels are twice as deep as wide.
    sections = {n: v[:, :, :, 12].repeat_interleave(2, 2) for n, v in found.items()}
    return row([(f"{n}, {scores[n]:.1f} dB", v, {}) for n, v in sections.items()])


def colour() -> Figure:
    """Denoised channel by channel, and in colour."""
    sigma = 25 / 255
    detail = skimage.data.coffee()[60:140, 250:330]
    x = torch.from_numpy(detail / 255).float().movedim(-1, 0)[None]
    y = noisy(x, sigma)
    with torch.no_grad():
        gray = DEAL()(y.movedim(1, 0), sigma=sigma).movedim(0, 1)
        together = DEAL(in_channels=3)(y, sigma=sigma)
    panels = []
    titles = ("noisy", "channel by channel", "in colour")
    for title, image in zip(titles, (y, gray, together), strict=True):
        print(f"colour: {title} {psnr(image, x):.2f} dB")
        panels.append((f"{title}, {psnr(image, x):.2f} dB", image, {}))
    return row(panels, width=2.2)


def uncertainty() -> Figure:
    """Predicted deviation, true error, and calibration."""
    sigma = 25 / 255
    x = camera(40, 170, 64, step=2)
    at = interpret.linearize(DEAL(), noisy(x, sigma), sigma=sigma)
    variance = interpret.posterior_variance(at, sigma, spacing=6)
    check = interpret.calibrate(variance, at.image - x)
    print(f"uncertainty: factor {check.factor:.2f}")
    figure: Figure = interpret.plot_uncertainty(at.image, variance, x, check)
    return figure


def own_regularizer() -> Figure:
    """An image and the mean mask of the class on the page."""
    page = DOCS / "questions" / "own_regularizer.rst"
    text = page.read_text().split(".. code-block:: python")[1].split("\nPut the")[0]
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(textwrap.dedent(text), names)
    sigma = 15 / 255
    x = camera(40, 150, 96, step=2)
    with torch.no_grad():
        x_hat, info = names["model"](
            noisy(x, sigma), sigma=sigma, lambda_reg=2.0, return_info=True
        )
    print(f"own_regularizer: {psnr(x_hat, x):.2f} dB")
    panels = [("noisy", noisy(x, sigma), {}), ("solution", x_hat, {})]
    shown = {"vmin": None, "vmax": None}
    return row([*panels, ("mean mask", info.mask.mean(1), shown)], width=2.2)


FIGURES: dict[str, Callable[[], Figure]] = {
    function.__name__: function
    for function in (
        front,
        models,
        weight,
        convergence,
        other_noise,
        mri,
        volumes,
        colour,
        uncertainty,
        own_regularizer,
    )
}


def main() -> None:
    """Writes the figures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    names = parser.parse_args().names or list(FIGURES)
    FOLDER.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["font.size"] = 9
    for name in names:
        figure = FIGURES[name]()
        figure.savefig(FOLDER / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
