"""
Compares weights of DEAL for the deblurring benchmark.

Operator and noise are those of ``div2k_gaussian_deblurring``. The images are crops of
photographs of scikit-image, none of the benchmark's. They are gray, and so are the
weights, which takes less time; those for colour were trained from them::

    python choose_lambda.py
"""

import deepinv as dinv
import torch
from deepinv_deal import DEAL
from skimage.data import astronaut, coffee
from skimage.transform import resize

SIDE = 256  # of the benchmark's images
CROP = 80


def photograph(pixels, top, left):
    """Returns a gray crop ``(1, 1, CROP, CROP)`` of a picture of that size."""
    small = resize(pixels / 255, (SIDE, SIDE), anti_aliasing=True)
    x = torch.from_numpy(small).float().mean(-1)[None, None]
    return x[..., top : top + CROP, left : left + CROP]


images = [photograph(astronaut(), 20, 70), photograph(coffee(), 60, 60)]
physics = dinv.physics.Blur(
    filter=dinv.physics.functional.gaussian_blur(sigma=(2, 2)),
    noise_model=dinv.physics.GaussianNoise(0.05, torch.Generator().manual_seed(0)),
)
measured = [physics(x) for x in images]
psnr = dinv.metric.PSNR(center_crop=-16)  # as the benchmark
model = DEAL(rtol=2e-2, sigma=15 / 255)
for lambda_reg in (20.0, 10.0, 5.0):
    with torch.no_grad():
        results = [model(y, physics, lambda_reg=lambda_reg) for y in measured]
    scores = [psnr(x_hat, x).item() for x_hat, x in zip(results, images, strict=True)]
    print(f"lambda {lambda_reg:5.1f}:", *(f"{score:.2f} dB" for score in scores))
