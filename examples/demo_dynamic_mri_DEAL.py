r"""
Dynamic MRI
===========

A beating heart is measured frame by frame, and of every frame only a few lines of its
Fourier transform. Each frame alone has too few. But most of the image does not move,
and what one frame has not measured, the next one may have. A model for images can use
that: it looks at slices of the series in which time is one of the two axes.
"""

# %%
# A series
# --------
#
# A slice of the Shepp-Logan phantom, and a disc in it that grows and shrinks. Complex
# series are ``(B, 2, T, H, W)``. Every frame has its own random lines.

import math

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import avg_pool2d

from deepinv_deal import DEAL
from deepinv_deal.evaluation import shepp_logan_volume

num_frames, n = 10, 48
body = shepp_logan_volume(9, n, n)[0, 0, 4]
axis = torch.linspace(-1, 1, 4 * n)
distance = torch.hypot(axis[:, None], axis - 0.05)


def frame(t):
    radius = 0.22 + 0.08 * math.sin(2 * math.pi * t / num_frames)
    disc = avg_pool2d((distance < radius).float()[None, None], 4)[0, 0]
    return body * (1 - disc) + 0.7 * disc


real = torch.stack([frame(t) for t in range(num_frames)])[None, None]
x = torch.cat([real, torch.zeros_like(real)], 1)

rng = torch.Generator().manual_seed(0)
lines = torch.rand(num_frames, 1, n, generator=rng) < 0.22
lines[..., n // 2 - 2 : n // 2 + 2] = True  # the low frequencies, in every frame
physics = dinv.physics.DynamicMRI(
    mask=lines.expand(-1, n, -1).float(),
    img_size=tuple(x.shape[1:]),
    noise_model=dinv.physics.GaussianNoise(0.005, rng),
)
y = physics(x)
print(f"{100 * physics.mask.mean():.0f} % of the Fourier transform were measured.")

# %%
# Reconstruct
# -----------
#
# ``slices="depth"`` regularizes the frames; since every frame is also measured by
# itself, it reconstructs each alone. Slices along the width have time and rows as their
# axes. The mean takes all three.


def psnr(image):
    return dinv.metric.PSNR()(image, x).item()


found = {"zero-filled": physics.A_adjoint(y)}
with torch.no_grad():
    for name in ("depth", "width", "mean"):
        model = DEAL(lambda_reg=0.03, slices=name)
        found[f'slices="{name}"'], info = model(y, physics, return_info=True)
        print(
            f"{name}: converged {info.converged.item()}, {info.n_iter.item()} systems"
        )
for name, image in found.items():
    print(f"{name:15} {psnr(image):5.2f} dB")

# %%
# A frame and a row over time
# ---------------------------

images = {"truth": x, **found}
figure, axes = plt.subplots(2, len(images), figsize=(2.2 * len(images), 3.9))
for i, (name, image) in enumerate(images.items()):
    magnitude = torch.linalg.vector_norm(image[0], dim=0)
    for k, picture in enumerate((magnitude[3], magnitude[:, n // 2])):
        axes[k, i].imshow(picture, cmap="gray", vmin=0, vmax=1, aspect="auto")
        axes[k, i].set(xticks=[], yticks=[])
    quality = "" if image is x else f"\n{psnr(image):.2f} dB"
    axes[0, i].set_title(name + quality, fontsize=9)
axes[0, 0].set_ylabel("frame 3")
axes[1, 0].set_ylabel("time, middle row")
figure.tight_layout()
plt.show()
