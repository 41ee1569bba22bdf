r"""
A convex dictionary of patches
==============================

CPR describes every patch of an image as smooth plus sparse
:footcite:p:`ducotterd2024smooth`:

.. math::
    \hat x = \underset{x}{\arg\min} \; \tfrac12 \|A x - y\|_2^2 + \min_a \sum_k
    \tfrac{\beta}{2} \|(I - Q Q^{\top} - \tfrac1d \mathbf{1} \mathbf{1}^{\top})
    P_k x - D a_k\|_2^2 + R(a).

The patch :math:`P_k x` of 13 x 13 pixels at position k is a combination of its mean and
120 learned *free atoms* Q, which cost nothing, and of a few of 200 learned atoms D,
which cost :math:`R(a)`, a norm of groups of neighbouring coefficients. All of it is
**convex**: there are no local minima, and in denoising every solver that finds the
minimum gives the same image.
"""

# %%
# Denoising
# ---------
#
# The bundled weights are for noise of 25 gray levels; another level scales their
# thresholds. ``info`` tells which solver ran, and the value of the energy.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from skimage.data import camera, coffee

from deepinv_deal import SmoothPlusSparse, interpret, tune

x = torch.from_numpy(camera() / 255).float()[None, None, 70:166, 210:306]
sigma = 25 / 255
rng = torch.Generator().manual_seed(0)
y = x + sigma * torch.randn(x.shape, generator=rng)
psnr = dinv.metric.PSNR()


def show_result(x, y, x_hat, name):
    dinv.utils.plot(
        [x, y, x_hat],
        titles=["image", name, "CPR"],
        subtitles=["", *(f"{psnr(z, x).item():.2f} dB" for z in (y, x_hat))],
        figsize=(8, 3),
    )


model = SmoothPlusSparse(pretrained="cpr_25")
with torch.no_grad():
    x_hat, info = model(y, sigma=sigma, return_info=True)
show_result(x, y, x_hat, "noisy")
print(f"{info.solver}: {info.n_iter.item()} iterations, {psnr(x_hat, x).item():.2f} dB")

# %%
# What the image is made of
# -------------------------
#
# The atoms, those that this image uses most first, and the smoothest of the free atoms.

usage = interpret.atom_usage(model, info)
interpret.plot_atoms(usage, num_atoms=36)

# %%
# Averaged over all patches that see a pixel, the free atoms give a smooth image, and
# the sparse combinations sharpen it. What both leave over is tiny. The map counts the
# atoms in use in the patches around each pixel; a convex penalty needs many.

parts = interpret.decompose(model, x_hat, info)
share = (info.coefficients != 0).float().mean().item()
print(f"{100 * share:.1f} % of the coefficients are not zero")
interpret.plot_decomposition(parts)

# %%
# One minimum
# -----------
#
# Every solver lowers the same energy to the same minimum: ADMM, the default, solves for
# image and coefficients together; FISTA eliminates the image; iPALM, the published
# method, takes steps in both.

y_small = y[..., 30:66, 30:66].double()
steps = [2, 5, 10, 20, 50, 100, 200]
checks = {"admm": [], "fista": [], "ipalm": []}


def energy_after(max_iter, solver):
    solve = SmoothPlusSparse(
        pretrained="cpr_25", solver=solver, max_iter=max_iter, rtol=0.0, warn=False
    ).double()
    with torch.no_grad():
        _, info = solve(y_small, sigma=sigma, return_info=True)
    return info.objective.item()


for solver, energies in checks.items():
    energies += [energy_after(max_iter, solver) for max_iter in steps]
least = energy_after(1000, "admm")

_, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
for solver, energies in checks.items():
    axis.loglog(steps, [e - least for e in energies], "o-", label=solver)
axis.set(xlabel="iterations", ylabel="energy above the minimum")
axis.legend()
plt.show()
for solver, energies in checks.items():
    gap = energies[-1] - least
    print(f"{solver:6s} {steps[-1]} iterations, energy above the minimum: {gap:.1e}")

# %%
# Any linear problem
# ------------------
#
# The same energy regularizes a blurred image. Its weight is chosen on another image.

blur = dinv.physics.BlurFFT(
    (1, 64, 64),
    filter=dinv.physics.functional.gaussian_blur((7, 7), (1.0, 1.0)),
    noise_model=dinv.physics.GaussianNoise(5 / 255, torch.Generator().manual_seed(0)),
)
validation = torch.from_numpy(coffee().mean(2) / 255).float()[None, None]
validation = validation[..., 150:214, 250:314]
x = x[..., 16:80, 16:80]
y = blur(x)
tuned = tune(model, blur, [validation], precision=4.0)
with torch.no_grad():
    x_hat, info = model(y, blur, return_info=True, **tuned.settings)
show_result(x, y, x_hat, "blurred")
print(f"lambda {tuned.lambda_reg:.2g}, {psnr(x_hat, x).item():.2f} dB")

# %%
# .. footbibliography::
