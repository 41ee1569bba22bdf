r"""
Denoising and inpainting with DEAL
==================================

One learned regularizer, two problems. DEAL reconstructs an image as a fixed point
:math:`\hat x = T(\hat x)` of

.. math::
    T(z) = \underset{x}{\arg\min} \; \tfrac{1}{2} \|A x - y\|_2^2
    + \tfrac{\lambda}{2} \|M_\sigma(z) \odot W x\|_2^2,

where the filters :math:`W` and the mask :math:`M_\sigma` are learned
:footcite:p:`pourya2025dealing`. Where the mask is small, the image may keep its
structure; where it is one, filter responses are suppressed. With the mask frozen, the
problem is a linear system, which conjugate gradients solve.
"""

# %%
# Load an image and the model
# ---------------------------
#
# The bundled weights need no network. These are for gray images.

import deepinv as dinv
import torch
from skimage.data import coffee
from skimage.transform import rescale

from deepinv_deal import DEAL

photo = rescale(coffee()[:, 50:450].mean(2) / 255, 0.32, anti_aliasing=True)
x = torch.from_numpy(photo).float()[None, None]
model = DEAL()
psnr = dinv.metric.PSNR()
rng = torch.Generator().manual_seed(0)

# %%
# Denoise
# -------
#
# The noise level is taken from the physics. The regularization weight of denoising is
# learned, so nothing is left to choose.

sigma = 25 / 255
denoising = dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma, rng=rng))
y = denoising(x)
x_hat, info = model(y, denoising, return_info=True)

dinv.utils.plot(
    [x, y, x_hat, info.mask.mean(1, keepdim=True)],
    titles=["image", "noisy", "DEAL", "mean mask"],
    subtitles=[
        "",
        f"{psnr(y, x).item():.2f} dB",
        f"{psnr(x_hat, x).item():.2f} dB",
        "",
    ],
)

# %%
# The mask follows the image: it is dark along edges and in textured regions, where
# smoothing would do harm.
#
# Did it converge?
# ----------------
#
# ``info`` says so for each image of the batch. At the solution, the force of the data
# and that of the regularizer cancel, with the mask computed at the image that is
# returned; the imbalance is what remains of them, and ``rtol=2e-2`` is the default.

print(f"PSNR {psnr(x_hat, x).item():.2f} dB")
print(f"converged: {info.converged.item()}, imbalance {info.imbalance.item():.1e}")
n_iter, inner_iter = info.n_iter.item(), info.inner_iter.item()
print(f"{n_iter} systems, {inner_iter} steps of conjugate gradients")

# %%
# The same model as a denoiser in deepinv's sense: the second argument is the noise
# level, here different for the two images of a batch: half of the true one, and the
# true one.

batch = torch.cat([y, y])
two = model(batch, torch.tensor([0.05, sigma]))
dinv.utils.plot([two[:1], two[1:]], titles=["half", "true"], figsize=(5, 3))

# %%
# In colour
# ---------
#
# There are weights for colour images too. The noise of red, green and blue is
# independent and their edges are not: the three are better denoised together than one
# by one.

photo = rescale(
    coffee()[:, 50:450] / 255, 0.24, anti_aliasing=True, channel_axis=2
).transpose(2, 0, 1)
x_color = torch.from_numpy(photo).float()[None]
y_color = denoising(x_color)
with torch.no_grad():
    one_by_one = model(y_color.transpose(0, 1), sigma).transpose(0, 1)
    together = DEAL(in_channels=3)(y_color, denoising)
results = {"noisy": y_color, "one by one": one_by_one, "together": together}
dinv.utils.plot(
    [x_color, *results.values()],
    titles=["image", *results],
    subtitles=["", *(f"{psnr(z, x_color).item():.2f} dB" for z in results.values())],
    rescale_mode="clip",
    figsize=(9, 3),
)

# %%
# Inpaint
# -------
#
# Any linear physics works. Now ``sigma`` is the noise level *of the model*, a
# hyperparameter (15/255 by default), and ``lambda_reg`` weighs the regularizer; the two
# are chosen on a few images of the problem. Here we just look at three weights.

inpainting = dinv.physics.Inpainting(
    x.shape[1:],
    mask=0.5,
    rng=rng,
    noise_model=dinv.physics.GaussianNoise(5 / 255, rng=rng),
)
y = inpainting(x)
weights = [0.05, 0.5, 5.0]
images = [model(y, inpainting, lambda_reg=weight) for weight in weights]
dinv.utils.plot(
    [y, *images],
    titles=["measured", *(f"lambda {weight:g}" for weight in weights)],
    figsize=(11, 3.5),
    subtitles=[f"{psnr(image, x).item():.2f} dB" for image in [y, *images]],
)

# %%
# Watch it converge
# -----------------
#
# ``compute_metrics`` returns deepinv's dictionary of metrics over the iterations. The
# PSNR settles long before the residual does.

_, metrics = model(y, inpainting, lambda_reg=0.5, x_gt=x, compute_metrics=True)
residuals = torch.tensor(metrics["nonlinear_residual"]).log10().tolist()
dinv.utils.plot_curves({"psnr": metrics["psnr"], "log10 residual": residuals})

# %%
# Gradients
# ---------
#
# The solution is differentiable with respect to the weights, the measurements,
# ``lambda_reg``, ``sigma`` and the physics, by implicit differentiation: memory does
# not grow with the number of iterations. Here is the slope of the squared error in
# ``lambda_reg``.

weight = torch.tensor(0.5, requires_grad=True)
error = (model(y, inpainting, lambda_reg=weight) - x).square().sum()
error.backward()
print(f"squared error {error.item():.3f}, slope in lambda {weight.grad.item():.3f}")

# %%
# .. footbibliography::
