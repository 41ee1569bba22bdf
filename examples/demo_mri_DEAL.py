r"""
Accelerated MRI
===============

A scanner measures the Fourier transform of an image, line by line, and to be four times
as fast it leaves three of four lines out. What fills the gaps is the regularizer. Here
it is one that has never seen an MRI scan: :class:`deepinv_deal.DEAL` was trained to
denoise photographs. Only its weight :math:`\lambda` is fitted to the scan.
"""

# %%
# A scan
# ------
#
# The Shepp-Logan phantom, 25 % of the lines of its Fourier transform, and noise.
# deepinv holds complex images in two channels, the real and the imaginary part.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from skimage.data import camera, shepp_logan_phantom
from skimage.transform import resize

from deepinv_deal import DEAL, tune
from deepinv_deal.evaluation import TotalVariation
from deepinv_deal.evaluation.tasks import birdcage_maps, line_mask

size = (96, 96)


def complex_image(photo):
    real = torch.from_numpy(resize(photo / photo.max(), size, anti_aliasing=True))
    return torch.stack([real, torch.zeros_like(real)])[None].float()


x = complex_image(shepp_logan_phantom())
noise = dinv.physics.GaussianNoise(0.005, torch.Generator().manual_seed(0))
mask = line_mask(size, acceleration=4, center_fraction=0.08)
scan = dinv.physics.MRI(mask=mask, img_size=size, noise_model=noise)
y = scan(x)

# %%
# The weight is chosen on another image, a photograph, measured the same way. Rough
# solutions are good enough for that.

validation = complex_image(camera() / 255)
options = {"precision": 2.0}
rough = DEAL(rtol=0.1)
settings = tune(rough, scan, [validation], lambda_reg=0.05, **options).settings
model = DEAL()
x_hat, info = model(y, scan, return_info=True, **settings)

rough = TotalVariation(max_iter=20)
tv_weight = tune(rough, scan, [validation], lambda_reg=0.01, **options).settings
x_tv = TotalVariation(max_iter=100)(y, scan, **tv_weight)

# %%
# Zero-filled, the image is blurred and full of ghosts along the missing direction.
# Total variation is made for images that are constant in pieces, such as this one; DEAL
# is made for none in particular.

psnr = dinv.metric.PSNR()


def quality(image):
    return f"{psnr(image, x).item():.2f} dB"


images = {"image": x, "zero-filled": scan.A_adjoint(y), "TV": x_tv, "DEAL": x_hat}


def magnitude(image):
    return image.square().sum(1, keepdim=True).sqrt().clamp(0, 1)


dinv.utils.plot(
    [magnitude(image) for image in images.values()],
    titles=list(images),
    subtitles=["", *map(quality, list(images.values())[1:])],
    figsize=(9, 3),
)
print(
    f"DEAL: {info.n_iter.item()} systems, {info.inner_iter.item()} steps of conjugate "
    f"gradients, converged: {info.converged.item()}"
)

# %%
# What is known helps: if the image is real-valued, as in the published experiments,
# ``complex_mode="real"`` says so. A line of the Fourier transform then tells its mirror
# image too.

model = DEAL(complex_mode="real")
x_real = model(y, scan, **settings)
print("real-valued:", quality(x_real))

# %%
# Where the mask is dark, the image was smoothed less: it has found the edges, which
# photographs and heads have in common.

_, axis = plt.subplots(figsize=(4, 3.6), layout="constrained")
shown = axis.imshow(info.mask[0].mean(0), cmap="gray")
axis.set_title("mean mask of the real part", fontsize=11)
axis.axis("off")
plt.colorbar(shown, ax=axis)
plt.show()

# %%
# Several coils
# -------------
#
# With eight receiver coils of known sensitivity, every line tells more. The same model
# and the same weight serve that scan, eight times faster than a full one.

mask = line_mask(size, acceleration=8, center_fraction=0.04)
maps = birdcage_maps(8, size)
scan = dinv.physics.MultiCoilMRI(
    mask=mask, coil_maps=maps, img_size=size, noise_model=noise
)
y = scan(x)
x_hat, info = model(y, scan, return_info=True, **settings)
x_zero = scan.A_adjoint(y)
dinv.utils.plot(
    [magnitude(image) for image in (x, x_zero, x_hat)],
    titles=["image", "zero-filled, 8x", "DEAL, 8x"],
    subtitles=["", quality(x_zero), quality(x_hat)],
    figsize=(7, 3),
)
print(f"converged: {info.converged.item()}")
