r"""
One model for deblurring, super-resolution and compressed sensing
=================================================================

DEAL is trained once, on denoising. The operator :math:`A` enters its equation

.. math::
    A^{\top} (A \hat x - y)
    + \lambda \, W^{\top} \big( M_\sigma(\hat x)^2 \odot W \hat x \big) = 0

like any other matrix, so the same weights serve every linear physics of deepinv. What
has to be chosen is :math:`\lambda`, once per operator and noise.
"""

# %%
# Four measurements of one image
# ------------------------------
#
# A defocus blur, the mean of every 2 x 2 pixels, a third of the pixels, and random
# projections onto 40 % as many numbers as there are pixels.

import deepinv as dinv
import torch
from skimage import data

from deepinv_deal import DEAL, tune

x = torch.from_numpy(data.camera()[100:164, 200:264] / 255).float()[None, None]
validation = torch.from_numpy(data.coffee()[80:144, 250:314].mean(2) / 255)
validation = validation.float()[None, None]
size = x.shape[1:]
rng = torch.Generator().manual_seed(0)


def noise(level):
    return dinv.physics.GaussianNoise(level / 255, rng)


blur_kernel = dinv.physics.functional.gaussian_blur((9, 9), (1.5, 1.5))
problems = {
    "deblurring": dinv.physics.Blur(
        blur_kernel, padding="circular", noise_model=noise(3)
    ),
    "super-resolution": dinv.physics.Downsampling(
        size, factor=2, filter="bicubic", padding="circular", noise_model=noise(3)
    ),
    "inpainting": dinv.physics.Inpainting(
        size, mask=0.33, noise_model=noise(3), rng=rng
    ),
    "compressed sensing": dinv.physics.CompressedSensing(
        m=1638, img_size=size, noise_model=noise(3), rng=rng
    ),
}

# %%
# The weight, then the image
# --------------------------
#
# :func:`deepinv_deal.tune` tries weights on a logarithmic scale, with the validation
# image, and stops when the best one is bracketed. ``info`` says what happened inside:
# outer iterations, conjugate gradient steps in all of them, and whether it converged.

model = DEAL()
psnr = dinv.metric.PSNR()
reconstructions, baselines, titles = [], [], []
for name, physics in problems.items():
    found = tune(model, physics, [validation], precision=4.0)
    y = physics(x)
    with torch.no_grad():
        x_hat, info = model(y, physics, return_info=True, **found.settings)
        x_adjoint = physics.A_dagger(y)
    reconstructions.append(x_hat.clamp(0, 1))
    baselines.append(x_adjoint.clamp(0, 1))
    titles.append(name)
    print(
        f"{name:18s} lambda {found.lambda_reg:5.3g}, {info.n_iter.item()} iterations,"
        f" {info.inner_iter.item():4d} CG steps, converged: {info.converged.item()},"
        f" {psnr(x_hat, x).item():.2f} dB"
        f" (least squares {psnr(x_adjoint, x).item():.2f} dB)"
    )

# %%
# Above, what least squares makes of the data; below, DEAL.

for images in (baselines, reconstructions):
    dinv.utils.plot(
        [x, *images],
        titles=["image", *titles],
        subtitles=["", *(f"{psnr(z, x).item():.2f} dB" for z in images)],
        figsize=(12, 3),
    )

# %%
# Batches
# -------
#
# Samples of a batch are solved together, and each stops on its own: the result of a
# sample does not depend on its neighbours. Weights may differ as well.

physics = problems["deblurring"]
y = physics(x)
with torch.no_grad():
    batch, info = model(
        y.repeat(4, 1, 1, 1),
        physics,
        lambda_reg=torch.tensor([0.1, 0.3, 1.0, 3.0]),
        return_info=True,
    )
dinv.utils.plot(
    list(batch[:, None].clamp(0, 1)),
    titles=["lambda 0.1", "0.3", "1", "3"],
    subtitles=[f"{psnr(z[None], x).item():.2f} dB" for z in batch],
    figsize=(10, 3),
)
print(f"iterations {info.n_iter.tolist()}, CG steps {info.inner_iter.tolist()}")
