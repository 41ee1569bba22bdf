r"""
Deblurring with few photons
===========================

Where light is scarce, the noise is that of counting photons. It is stronger where the
image is brighter, and pixels that no photon has reached are exactly zero. The data term
that knows this is the Poisson likelihood,

.. math::
    \phi(A x; y) = \sum_i \frac{(A x)_i}{\gamma}
    - \frac{y_i}{\gamma} \log \frac{(A x)_i}{\gamma},

with the gain :math:`\gamma`, the intensity of one photon. DEAL freezes the curvature of
this term at the current image, as it does with its mask, and solves the linear system
that remains.
"""

# %%
# Measure
# -------
#
# The image is blurred, and white pixels catch 30 photons on average.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from deepinv.physics.functional import gaussian_blur
from skimage.data import coins
from skimage.transform import rescale

from deepinv_deal import DEAL
from deepinv_deal.interpret import linearize, posterior_variance

photo = rescale(coins()[60:252, 70:262] / 255, 0.5, anti_aliasing=True)
x = torch.from_numpy(photo).float()[None, None]

photons = 30
physics = dinv.physics.Blur(
    gaussian_blur(sigma=(1.2, 1.2)),
    padding="circular",
    noise_model=dinv.physics.PoissonNoise(
        gain=1 / photons, rng=torch.Generator().manual_seed(0)
    ),
)
y = physics(x)

# %%
# Reconstruct
# -----------
#
# The noise model of the physics says which likelihood is right, and how strong the
# noise is. So there is nothing to choose: no noise level and no weight.

model = DEAL()
x_hat, info = model(y, physics, return_info=True)
print(*info.notes, sep="\n")
print(f"converged: {info.converged.item()}, {info.n_iter.item()} systems")

# %%
# Rivals
# ------
#
# Richardson-Lucy maximises the same likelihood without a regularizer. It must be
# stopped before it fits the noise; we give it the number of iterations that is best for
# this image. Least squares takes the noise to be equally strong everywhere. It needs a
# noise level and a weight, here of the right size.


def richardson_lucy(iterations):
    image = torch.full_like(y, float(y.mean()))
    for _ in range(iterations):
        image = image * physics.A_adjoint(y / physics.A(image).clamp_min(1e-6))
    return image


def psnr(image):
    return dinv.metric.PSNR()(image, x).item()


x_rl = max((richardson_lucy(n) for n in (2, 4, 8, 15, 30, 60)), key=psnr)
least_squares = DEAL(data_fidelity=dinv.optim.L2())
x_ls = least_squares(y, physics, sigma=25 / 255, lambda_reg=20.0)

dinv.utils.plot(
    [x, y, x_rl, x_ls, x_hat],
    titles=["image", "photons", "Richardson-Lucy", "least squares", "DEAL, Poisson"],
    subtitles=["", *(f"{psnr(image):.2f} dB" for image in (y, x_rl, x_ls, x_hat))],
    figsize=(11, 2.8),
    rescale_mode="clip",
)

# %%
# In photographs, where light and shade differ by a factor of a few, least squares comes
# close to the likelihood if its weight is tuned. What the likelihood brings is that
# nothing has to be tuned, and that it is right in the dark.
#
# How sure is it?
# ---------------
#
# The likelihood knows the noise, so it tells how uncertain every pixel is, given the
# mask: more where more photons were caught, since their number scatters more, and where
# the mask is small.

at = linearize(model, y, physics)
deviation = posterior_variance(at, spacing=4, num_probes=2).sqrt()

_, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for axis, image, title in zip(
    axes, (at.image, deviation), ("reconstruction", "standard deviation"), strict=True
):
    shown = axis.imshow(image[0, 0].detach(), cmap="gray")
    axis.set_title(title, fontsize=11)
    axis.axis("off")
    plt.colorbar(shown, ax=axis)
plt.show()
