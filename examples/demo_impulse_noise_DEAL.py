r"""
Outliers
========

One pixel in ten is black or white, whatever the image: dead sensors, cosmic rays, bits
that were lost. To least squares such a pixel is the strongest evidence of all, and it
spoils everything around it. The :math:`\ell_1` norm of the misfit does not care how
wrong a wrong pixel is. DEAL takes it in a smoothed form, and freezes its curvature,
:math:`1 / |r|` at the misfit :math:`r`, with its mask: what fits badly counts little in
the next system.
"""

# %%
# Measure
# -------

import deepinv as dinv
import torch
from deepinv.physics.functional import gaussian_blur
from scipy.ndimage import median_filter
from skimage.data import camera
from skimage.transform import rescale

from deepinv_deal import DEAL
from deepinv_deal.optim import SmoothedL1

photo = rescale(camera()[60:420, 100:460] / 255, 0.4, anti_aliasing=True)
x = torch.from_numpy(photo).float()[None, None]

physics = dinv.physics.Blur(
    gaussian_blur(sigma=(1.2, 1.2)),
    padding="circular",
    noise_model=dinv.physics.SaltPepperNoise(
        p=0.05, s=0.05, rng=torch.Generator().manual_seed(0)
    ),
)
y = physics(x)

# %%
# Reconstruct
# -----------
#
# Outliers do not tell how strong the regularizer should be: give ``lambda_reg``.

model = DEAL(data_fidelity=SmoothedL1())
x_hat, info = model(y, physics, sigma=15 / 255, lambda_reg=10.0, return_info=True)
print(f"converged: {info.converged.item()}, {info.n_iter.item()} systems")


def psnr(image):
    return dinv.metric.PSNR()(image, x).item()


squares = DEAL(data_fidelity=dinv.optim.L2())
x_ls = squares(y, physics, sigma=33 / 255, lambda_reg=30.0)
x_median = torch.from_numpy(median_filter(y.numpy(), (1, 1, 3, 3)))

images = (y, x_median, x_ls, x_hat)
dinv.utils.plot(
    [x, *images],
    titles=["image", "measured", "median of 3 x 3", "least squares", "DEAL, l1"],
    subtitles=["", *(f"{psnr(image):.2f} dB" for image in images)],
    figsize=(11, 2.8),
    rescale_mode="clip",
)

# %%
# The median filter takes most of the impulses away, but not the blur. DEAL undoes both
# at once.
#
# What it made of the measurements
# --------------------------------
#
# The weight of each pixel in the last system, :math:`1 / \max(|r|, \delta)`: the
# impulses are dark, and nobody had to say where they are.

misfit = (physics.A(x_hat) - y).abs()
weight = 1 / misfit.clamp_min(model.data_fidelity.delta)
hit = ((y == 0) | (y == 1)).float()
dinv.utils.plot(
    [weight, 1 - hit],
    titles=["weight", "impulses (black)"],
    figsize=(5.5, 2.8),
)
