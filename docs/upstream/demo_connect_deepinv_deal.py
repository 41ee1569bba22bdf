r"""
Using deepinv_deal with DeepInverse
====================================================================================================

This example shows how to denoise and inpaint with an interpretable model of the package
`deepinv_deal <https://pypi.org/project/deepinv-deal/>`_, which is a DeepInverse
:class:`deepinv.models.Reconstructor`.

The reconstruction of DEAL (`deep attentive least squares
<https://arxiv.org/abs/2502.04079>`_) is a fixed point :math:`\hat x = T(\hat x)` of

.. math::
    T(z) = \underset{x}{\arg\min} \; \tfrac{1}{2} \|A x - y\|_2^2
    + \tfrac{\lambda}{2} \|M_\sigma(z) \odot W x\|_2^2,

where :math:`W` are learned filters and the mask :math:`M_\sigma(z)` lowers the penalty
where the image has structure. The model is trained for denoising, once, and used with
any linear physics. Its weights are part of the package::

    pip install deepinv-deal
"""

# %%
# Load an image
# -----------------------------------------------------------------------------
#
# This photograph comes with scikit-image.

import deepinv as dinv
import torch
from skimage.data import camera
from skimage.transform import resize

from deepinv_deal import DEAL

device = dinv.utils.get_freer_gpu() if torch.cuda.is_available() else "cpu"
img_size = 96
pixels = resize(camera() / 255.0, (img_size, img_size), anti_aliasing=True)
x = torch.from_numpy(pixels).float()[None, None].to(device)

# %%
# Denoising
# -----------------------------------------------------------------------------
#
# The noise level is that of the physics.

sigma = 25 / 255
rng = torch.Generator(device).manual_seed(0)
denoising = dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma, rng=rng))
y = denoising(x)

model = DEAL().to(device)
with torch.no_grad():
    x_hat = model(y, denoising)

psnr = dinv.metric.PSNR()
dinv.utils.plot(
    {"Ground truth": x, "Measurement": y, "DEAL": x_hat},
    subtitles=[
        "PSNR (dB):",
        f"{psnr(y, x).item():.2f}",
        f"{psnr(x_hat, x).item():.2f}",
    ],
)

# %%
# Inpainting
# -----------------------------------------------------------------------------
#
# The same weights, half of the pixels. The weight ``lambda_reg`` and the noise level
# ``sigma`` of the model are chosen by hand here; ``deepinv_deal.tune`` chooses them on
# a few images. With ``return_info=True`` the model says whether it has converged.

inpainting = dinv.physics.Inpainting(
    (1, img_size, img_size),
    mask=0.5,
    noise_model=dinv.physics.GaussianNoise(5 / 255, rng=rng),
    rng=rng,
    device=device,
)
y = inpainting(x)
with torch.no_grad():
    x_hat, info = model(y, inpainting, sigma=15 / 255, lambda_reg=1.0, return_info=True)

print(f"Converged: {info.converged.item()}, after {info.n_iter.item()} iterations")

# %%
# The mask tells what the model takes for structure: it is near 1 where filter responses
# are suppressed, and near 0 where they are left alone.

dinv.utils.plot(
    {
        "Ground truth": x,
        "Measurement": y,
        "DEAL": x_hat,
        "Mean mask": info.mask.mean(1, keepdim=True),
    },
    subtitles=[
        "PSNR (dB):",
        f"{psnr(y, x).item():.2f}",
        f"{psnr(x_hat, x).item():.2f}",
        "",
    ],
)
