r"""
Volumes
=======

A microscope blurs along the depth as well, so the slices of a volume cannot be
deblurred one by one. The model takes the whole volume, with the data term of the whole,

.. math::
    \tfrac12 \|A x - y\|_2^2 + \tfrac{\lambda}{3} \sum_{o=1}^{3}
    \tfrac12 \|m_o(x) \odot W S_o x\|_2^2.

Its filters are two-dimensional, as they were trained on photographs. They see slices:
:math:`S_1 x` are those along the depth, :math:`S_2 x` and :math:`S_3 x` those along the
height and the width, and ``slices="mean"`` takes the mean of all three.
"""

# %%
# Measure
# -------
#
# The Shepp-Logan phantom as a volume ``(B, C, D, H, W)``, blurred by a Gaussian of
# three dimensions.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch

from deepinv_deal import DEAL
from deepinv_deal.evaluation import shepp_logan_volume

x = shepp_logan_volume(16, 32, 32)


def gaussian(dimensions):
    grids = torch.meshgrid(*[torch.arange(-3.0, 4)] * dimensions, indexing="ij")
    kernel = torch.exp(-sum(grid.square() for grid in grids) / 2)
    return (kernel / kernel.sum())[None, None]


noise = dinv.physics.GaussianNoise(0.01, torch.Generator().manual_seed(0))
physics = dinv.physics.Blur(gaussian(3), padding="circular", noise_model=noise)
y = physics(x)

# %%
# Reconstruct
# -----------
#
# First slice by slice, with the blur inside the slices: what can be done with a model
# for images. Then the volume as a whole, with filters that see slices along the depth
# only, and of all orientations. A slice without contents has noise only, and must not
# be taken for a dark image: ``scale=None``.


def psnr(image):
    return dinv.metric.PSNR()(image, x).item()


settings = {"lambda_reg": 0.3}
in_plane = dinv.physics.Blur(gaussian(2), padding="circular")
with torch.no_grad():
    slices = DEAL(scale=None)(y[0].transpose(0, 1), in_plane, **settings)
    found = {"slice by slice": slices.transpose(0, 1)[None]}
    for name in ("depth", "mean"):
        model = DEAL(slices=name)
        found[f'slices="{name}"'], info = model(
            y, physics, return_info=True, **settings
        )
        print(
            f"{name}: converged {info.converged.item()}, {info.n_iter.item()} systems, "
            f"{info.inner_iter.item()} conjugate gradient steps"
        )
for name, image in {"blurred": y, **found}.items():
    print(f"{name:15} {psnr(image):5.2f} dB")

# %%
# Sections
# --------
#
# The same volume cut in three directions. Slice by slice, the blur along the depth
# stays: the second and third row look as they were measured.

images = {"truth": x, "blurred": y, **found}
figure, axes = plt.subplots(3, len(images), figsize=(2.1 * len(images), 5.4))
for i, (name, image) in enumerate(images.items()):
    sections = (image[0, 0, 8], image[0, 0, :, 12], image[0, 0, :, :, 19])
    for k, section in enumerate(sections):
        axes[k, i].imshow(section, cmap="gray", vmin=0, vmax=1, aspect="auto")
        axes[k, i].set(xticks=[], yticks=[])
    quality = "" if image is x else f"\n{psnr(image):.2f} dB"
    axes[0, i].set_title(name + quality, fontsize=9)
for k, name in enumerate(("rows, columns", "depth, columns", "depth, rows")):
    axes[k, 0].set_ylabel(name, fontsize=9)
figure.tight_layout()
plt.show()
