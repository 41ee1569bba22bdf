r"""
Sparsity that adapts: MMR and SAFI
==================================

Both models reconstruct with an :math:`\ell_1` penalty whose weights follow the image
:footcite:p:`pourya2024iteratively`:

.. math::
    \hat x = \underset{x \in [0, 1]^n}{\arg\min} \; \tfrac12 \|A x - y\|_2^2
    + \lambda \|m(\hat x) \odot W x\|_1 .

:math:`W` are learned filters, and the mask :math:`m` lowers the penalty where the image
has structure. **MMR** derives the mask from a concave potential :math:`\psi`, as the
slope :math:`m = G^{\top} \psi'(G |W x|)`: then :math:`\hat x` is a critical point of
an *energy*, which every update lowers. **SAFI** lets a small network compute the mask:
more freedom, and no energy.
"""

# %%
# Denoising
# ---------
#
# The bundled weights are for noise of 25 gray levels.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from skimage.data import camera

from deepinv_deal import MMR, SAFI, interpret

x = torch.from_numpy(camera() / 255).float()[None, None, 70:166, 210:306]
sigma = 25 / 255
rng = torch.Generator().manual_seed(0)
y = x + sigma * torch.randn(x.shape, generator=rng)
psnr = dinv.metric.PSNR()

models = {
    "MMR": MMR(pretrained="mmr_25", verify_energy=True),
    "SAFI": SAFI(pretrained="safi_25"),
}
results, infos = {}, {}
for name, model in models.items():
    with torch.no_grad():
        results[name], infos[name] = model(y, return_info=True)
    info = infos[name]
    print(
        f"{name}: {psnr(results[name], x).item():.2f} dB, {info.n_iter.item()} masks, "
        f"{info.inner_iter.item()} inner iterations"
    )
dinv.utils.plot(
    [x, y, *results.values()],
    titles=["image", "noisy", *results],
    subtitles=["", *(f"{psnr(z, x).item():.2f} dB" for z in (y, *results.values()))],
    figsize=(10, 3),
)

# %%
# Where the penalty is lowered
# ----------------------------
#
# The mean of all masks is dark along edges, where filter responses are left alone, and
# at the border, where the zeros around the image look like an edge to MMR.

_, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for axis, (name, info) in zip(axes, infos.items(), strict=True):
    picture = axis.imshow(info.mask.mean((0, 1)), cmap="magma", vmin=0, vmax=1)
    axis.set(title=f"mean mask of {name}", xticks=[], yticks=[])
plt.colorbar(picture, ax=axes)
plt.show()

# %%
# Before training, the filters were those of the discrete cosine transform. Here are
# those of MMR with the largest norm.

filters = interpret.effective_filters(models["MMR"])
interpret.plot_filters(filters, num_filters=24)

# %%
# An energy that falls
# --------------------
#
# ``verify_energy=True`` records the energy of every iterate, and warns if it rises. The
# first entry belongs to the solution with mask 1, where the iteration starts. SAFI has
# only the residual of its equation to look at.

energy = infos["MMR"].energy[:, 0]
print(f"energy {energy[0].item():.3f} -> {energy[-1].item():.3f}")
print(f"largest rise in one update: {energy.diff().max().clamp_min(0).item():.1e}")
_, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].plot(energy, "o-")
axes[0].set(xlabel="update of the mask", ylabel="energy of MMR")
for name, info in infos.items():
    axes[1].semilogy(info.history[:, 0], "o-", label=name)
axes[1].set(xlabel="update of the mask", ylabel="relative residual")
axes[1].legend()
plt.show()

# %%
# One start or another
# --------------------
#
# The energy of MMR is not convex, so the solution may depend on the start. It hardly
# does: from the noisy image the iteration ends at nearly the same one.

with torch.no_grad():
    other = models["MMR"](y, init=y)
distance = ((other - results["MMR"]).norm() / results["MMR"].norm()).item()
print(f"relative distance {distance:.1e}, {psnr(other, x).item():.2f} dB")

# %%
# An inverse problem
# ------------------
#
# The same priors serve other operators. Only :math:`\lambda` is chosen anew, here among
# four values in one batch; on images of your own let :func:`deepinv_deal.tune` do it.

physics = dinv.physics.Inpainting(
    x.shape[1:],
    mask=0.5,
    rng=rng,
    noise_model=dinv.physics.GaussianNoise(10 / 255, rng=rng),
)
y = physics(x)
weights = torch.tensor([0.1, 0.2, 0.4, 0.8]) * models["SAFI"].prior.lambda_reg.item()
with torch.no_grad():
    batch = models["SAFI"](y.repeat(4, 1, 1, 1), physics, lambda_reg=weights)
dinv.utils.plot(
    [y, *batch[:, None]],
    titles=["measured", *(f"lambda {weight:.2g}" for weight in weights)],
    subtitles=[f"{psnr(z, x).item():.2f} dB" for z in (y, *batch[:, None])],
    figsize=(11, 3),
)

# %%
# .. footbibliography::
