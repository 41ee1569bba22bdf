r"""
Computed tomography at a low dose
=================================

A detector counts the X-ray photons that an object lets through. From :math:`N_0`
photons on a ray, about :math:`N_0 e^{-\mu u}` arrive, where :math:`u` is the line
integral. Its estimate, the logarithm of the count, is far more uncertain on rays
through the middle of the object than on others: least squares trusts all of them alike,
the likelihood does not.
"""

# %%
# Scan
# ----
#
# Sixty views of a head phantom. On the darkest rays, about two per cent of a thousand
# photons arrive.

import deepinv as dinv
import torch
from skimage.data import shepp_logan_phantom
from skimage.transform import resize

from deepinv_deal import DEAL

size = 64
photo = resize(shepp_logan_phantom(), (size, size), anti_aliasing=True)
x = torch.from_numpy(photo).float()[None, None]

physics = dinv.physics.Tomography(60, img_width=size, normalize=True)
mu = 4 / physics.A(x).max().item()
physics.set_noise_model(
    dinv.physics.LogPoissonNoise(N0=1000.0, mu=mu, rng=torch.Generator().manual_seed(0))
)
y = physics(x)
dinv.utils.plot([y], titles=["line integrals"], figsize=(4, 3))

# %%
# Reconstruct
# -----------
#
# ``DEAL()`` takes the likelihood of the noise model, and its noise level and weight
# from the number of photons.

model = DEAL()
x_hat, info = model(y, physics, return_info=True)
print(*info.notes, sep="\n")
print(f"converged: {info.converged.item()}, {info.n_iter.item()} systems")

# %%
# Beside it are filtered back-projection, and DEAL with least squares at the best of
# some weights.


def psnr(image):
    return dinv.metric.PSNR()(image, x).item()


x_fbp = physics.A_dagger(y)
squares = DEAL(data_fidelity=dinv.optim.L2())
weights = (0.1, 0.3, 1.0)
trials = [squares(y, physics, sigma=40 / 255, lambda_reg=weight) for weight in weights]
x_ls = max(trials, key=psnr)

images = (x_fbp, x_ls, x_hat)
dinv.utils.plot(
    [x, *images],
    titles=["phantom", "back-projection", "least squares", "likelihood"],
    subtitles=["", *(f"{psnr(image):.2f} dB" for image in images)],
    figsize=(9, 2.8),
    rescale_mode="clip",
)

# %%
# The errors of both DEALs, four times enlarged around gray:

errors = [0.5 + 4 * (image - x) for image in (x_ls, x_hat)]
dinv.utils.plot(
    errors,
    titles=["least squares", "likelihood"],
    figsize=(5, 2.8),
    rescale_mode="clip",
)
