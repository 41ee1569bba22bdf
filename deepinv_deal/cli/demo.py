"""``deepinv-deal demo``: denoise and inpaint a photograph."""

from __future__ import annotations

import argparse
from typing import Any

from deepinv_deal.cli._options import (
    Commands,
    add_solver_options,
    make_model,
    photograph,
)

#: Hyperparameters of the demo's inpainting problem: 1 was better than 0.3 by 0.2 dB on
#: two other photographs.
DEMO_INPAINTING = {"sigma": 15 / 255, "lambda_reg": 1.0}


def add_demo(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    demo = commands.add_parser(
        "demo",
        help="denoise and inpaint a photograph, print the results and write a figure",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", default="deepinv_deal_demo.png", help="figure to write")
    demo.add_argument(
        "--size", type=int, default=256, help="side of the image in pixels"
    )
    add_solver_options(demo)
    demo.set_defaults(
        run=_demo, method="deal", prior=None, solver=None, inner_dtype=None
    )


def _demo(args: argparse.Namespace) -> int:
    import time

    import torch
    from deepinv.physics import Denoising, GaussianNoise, Inpainting

    from deepinv_deal.cli._figures import Panel, plot_reconstructions, save
    from deepinv_deal.evaluation import quality

    if not 16 <= args.size <= 512:
        raise ValueError(f"--size must lie between 16 and 512, got {args.size}.")
    x = photograph(args.size)[None]
    rng = torch.Generator().manual_seed(0)
    sigma = 25 / 255
    problems: tuple[tuple[str, Any, dict[str, float]], ...] = (
        ("denoising, sigma 25/255", Denoising(GaussianNoise(sigma, rng=rng)), {}),
        (
            "inpainting, half of the pixels, sigma 5/255",
            Inpainting(
                (1, args.size, args.size),
                mask=0.5,
                rng=rng,
                noise_model=GaussianNoise(5 / 255, rng=rng),
            ),
            DEMO_INPAINTING,
        ),
    )
    model = make_model(args)
    prior = model.prior
    print(f"DEAL with {prior.num_filters} filters, camera at {args.size} x {args.size}")
    panels, worked = [], True
    for title, physics, settings in problems:
        y = physics(x)
        start = time.perf_counter()
        with torch.no_grad():
            x_hat, info = model(y, physics, return_info=True, **settings)
        seconds = time.perf_counter() - start
        before, after = quality(y, x), quality(x_hat, x)
        captions = ["{:.2f} dB, SSIM {:.3f}".format(*q) for q in (before, after)]
        print(
            f"{title}\n"
            f"  measurement     {captions[0]}\n"
            f"  reconstruction  {captions[1]}\n"
            f"  {int(info.n_iter)} iterations, {int(info.inner_iter)} conjugate "
            "gradient steps, "
            f"imbalance {float(info.imbalance):.1e} "
            f"({'converged' if info.converged else 'NOT converged'}), {seconds:.1f} s"
        )
        panels.append(Panel(title, x, y, x_hat, info, *captions))
        worked &= bool(info.converged)
    save(plot_reconstructions(panels), args.out)
    print(f"Figure: {args.out}")
    return 0 if worked else 1
