"""
How the cost of DEAL grows: with the image, with the batch, with the iterations.

Seconds of one application of W^T M^2 W per pixel, memory of a call with gradients, and
what convolutions in bfloat16 would bring. With ``--large``, only one large image is
denoised: reflections of a photograph, of the given side.

    python benchmarks/scaling.py [--pretrained deal_gray] [--threads 1] [--large 4096]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from _common import PeakMemory, application_times, median_seconds
from skimage.data import camera

from deepinv_deal import DEAL, keep_freed_memory
from deepinv_deal.evaluation import quality


def per_pixel(model: DEAL, batch: int, size: int, repeats: int = 5) -> float:
    """Nanoseconds of one application for each pixel."""
    x = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(0))
    regularizer = model.prior.bind(25 / 255, x)
    squared_mask = regularizer.squared_mask(x)
    seconds = median_seconds(
        lambda: regularizer.normal(x, squared_mask), repeats, x.device
    )
    return 1e9 * seconds / x.numel()


def backward_memory(model: DEAL, size: int, max_iter: int) -> float:
    """Most memory in MB of a call that is differentiated."""
    limited = DEAL(prior=model.prior, max_iter=max_iter, rtol=1e-9, warn=False)
    y = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    memory = PeakMemory(y.device)
    memory.start()
    limited(y, sigma=25 / 255).square().sum().backward()
    memory.stop()
    return memory.peak


def bfloat16(model: DEAL, size: int) -> tuple[float, float]:
    """Milliseconds of W in single precision and in bfloat16."""
    x = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        W = model.prior.bind(25 / 255, x).W
        for layer in W.layers:
            layer.kernel = layer.kernel.to(dtype)
        image = x.to(dtype)
        times.append(1e3 * median_seconds(lambda W=W, z=image: W(z), 5, x.device))
    return times[0], times[1]


def denoise_large(model: DEAL, size: int) -> None:
    """Denoises one image, and says how long it took."""
    pixels = np.pad(camera() / 255, (0, max(0, size - 512)), "reflect")[:size, :size]
    x = torch.from_numpy(pixels).float()[None, None]
    rng = torch.Generator().manual_seed(0)
    y = x + 25 / 255 * torch.randn(x.shape, generator=rng)
    memory = PeakMemory(y.device)
    memory.start()
    start = time.perf_counter()
    with torch.no_grad():
        x_hat, info = model(y, sigma=25 / 255, return_info=True)
    seconds = time.perf_counter() - start
    memory.stop()
    psnr, ssim = quality(x_hat, x)
    print(
        f"{size} x {size}: {seconds:.0f} s, {1e9 * seconds / x.numel():.0f} ns per "
        f"pixel, {memory.peak / 1e3:.1f} GB more memory, {int(info.n_iter)} iterations "
        f"with {int(info.inner_iter)} steps, imbalance {float(info.imbalance):.1e}, "
        f"{quality(y, x)[0]:.2f} -> {psnr:.2f} dB, SSIM {ssim:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--large", type=int, metavar="SIDE", help="denoise this only")
    parser.add_argument("--pretrained", default="deal_gray")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    model = DEAL(pretrained=args.pretrained, warn=False)
    if args.large:
        denoise_large(model, args.large)
        return
    with torch.no_grad():
        print("one application, nanoseconds per pixel")
        for size in (64, 128, 256, 512, 1024):
            print(f"  1 x {size} x {size}: {per_pixel(model, 1, size):.0f}", flush=True)
        for batch in (2, 4, 8, 16):
            print(f"  {batch} x 128 x 128: {per_pixel(model, batch, 128):.0f}")
        times = application_times(model, 256)
        print(
            f"at 256 x 256: conjugate gradient step {times.step / times.normal:.2f} "
            f"applications, mask {times.mask / times.normal:.2f}, plain convolutions "
            f"{times.plain / times.normal:.2f}"
        )
        single, half = bfloat16(model, 256)
        print(f"W at 256 x 256: {single:.1f} ms, in bfloat16 {half:.1f} ms")
    few, many = (backward_memory(model, 128, n) for n in (10, 100))
    print(
        f"call with gradients at 128 x 128: {few:.0f} MB for 10 iterations, "
        f"{many:.0f} MB for 100 ({many / few:.2f})"
    )


if __name__ == "__main__":
    main()
