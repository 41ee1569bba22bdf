r"""
Choosing lambda with and without ground truth
=============================================

A model trained for denoising solves every linear inverse problem, once the weight
:math:`\lambda` of

.. math::
    T(z) = \underset{x}{\arg\min} \; \tfrac{1}{2} \|A x - y\|_2^2
    + \tfrac{\lambda}{2} \|M_\sigma(z) \odot W x\|_2^2

fits the operator and the noise. :func:`deepinv_deal.tune` finds it on a few images,
from coarse to fine on a logarithmic scale. Without ground truth, Stein's unbiased risk
estimate takes the place of the error when the noise is Gaussian of known level.
"""

# %%
# Images
# ------
#
# One image to tune on, another to look at; small, so that this page builds quickly.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from skimage.data import camera, coffee
from skimage.transform import rescale

from deepinv_deal import DEAL, tune


def crop(photo, top, left, size=40):
    image = torch.from_numpy(rescale(photo / 255, 0.25, anti_aliasing=True))
    return image.float()[None, None, top : top + size, left : left + size]


validation = crop(camera(), 20, 36)
x = crop(coffee().mean(2), 30, 50)
model = DEAL(rtol=1e-3)
psnr = dinv.metric.PSNR()

# %%
# Deblurring
# ----------
#
# The validation set is anything that gives images, or pairs ``(x, y)`` as deepinv's
# datasets do. All weights see the same measurements.

kernel = dinv.physics.functional.gaussian_blur((7, 7), (1.0, 1.0))
rng = torch.Generator().manual_seed(0)
blur = dinv.physics.Blur(
    kernel, padding="circular", noise_model=dinv.physics.GaussianNoise(10 / 255, rng)
)
result = tune(model, blur, [validation])
for trial in result.trials:
    print(f"lambda {trial.lambda_reg:8.4f}  {trial.score:6.2f} dB")

# %%
# The table holds every weight that was tried, the curve shows it; the star is the best.
# ``result.to_csv("trials.csv")`` keeps it.

_, axis = plt.subplots(layout="constrained")
figure = result.plot(axis)

# %%
# The settings go to the model as arguments.

y = blur(x)
x_hat, info = model(y, blur, return_info=True, **result.settings)
dinv.utils.plot(
    [x, y, x_hat],
    titles=["image", "measured", "tuned"],
    figsize=(7, 3),
    subtitles=["", f"{psnr(y, x).item():.2f} dB", f"{psnr(x_hat, x).item():.2f} dB"],
)
print(f"PSNR {psnr(x_hat, x).item():.2f} dB, converged: {info.converged.item()}")

# %%
# Without ground truth
# --------------------
#
# Denoising has a learned weight, here :math:`\kappa(\sigma)`; whether another one is
# better for this very image can be asked without knowing the image. The estimate is of
# the mean squared error, so lower is better.

sigma = 25 / 255
denoising = dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma, rng))
y = denoising(x)
options = {"max_trials": 7, "precision": 2.0}
blind = tune(model, denoising, [{"y": y}], metric="sure", **options)
seeing = tune(model, denoising, [(x, y)], **options)
for name, found in (("SURE", blind), ("PSNR", seeing)):
    error = psnr(model(y, denoising, **found.settings), x).item()
    print(f"{name} chooses lambda {found.lambda_reg:.1f}: {error:.2f} dB")

# %%
# SURE sees the error of what was *measured*. That is everything in denoising; in
# inpainting, super-resolution or undersampled MRI it is not, and ground truth, or
# another criterion, is needed.
#
# On a GPU, ``batch_candidates=True`` solves the candidates of a grid as one batch,
# since ``lambda_reg`` may differ per sample; the result is the same.
# ``tune_sigma=True`` chooses the noise level of the model as well.
