r"""
DEAL as the denoiser of a plug-and-play method
==============================================

Every DEAL is also a deepinv denoiser, ``model(x, sigma)``, and can take the place of a
proximal map,

.. math::
    x_{k+1} = \mathrm{D}_\sigma \big( x_k - \tau A^{\top} (A x_k - y) \big),

as in plug-and-play proximal gradients. DEAL needs no such loop: the equation

.. math::
    A^{\top} (A x - y) + \lambda \, W^{\top} \big( M_\sigma(x)^2 \odot W x \big) = 0

has the operator inside. This page runs both on the same data.
"""

# %%
# The problem
# -----------

import deepinv as dinv
import torch
from skimage import data

from deepinv_deal import DEAL
from deepinv_deal.priors import DEALPrior

x = torch.from_numpy(data.camera()[100:164, 200:264] / 255).float()[None, None]
rng = torch.Generator().manual_seed(0)
physics = dinv.physics.Blur(
    dinv.physics.functional.gaussian_blur((9, 9), (1.2, 1.2)),
    padding="circular",
    noise_model=dinv.physics.GaussianNoise(5 / 255, rng),
)
y = physics(x)
psnr = dinv.metric.PSNR()
model = DEAL()

# %%
# Plug and play
# -------------
#
# deepinv's proximal gradient descent with DEAL as an implicit denoising prior, from the
# measurements. A noise level of 5/255 was the best of 1, 2, 3 and 5. Twenty iterations
# are not enough: with a small noise level the image gets better for dozens of them.

prior = dinv.optim.PnP(denoiser=model)
plug_and_play = dinv.optim.PGD(
    prior=prior,
    data_fidelity=dinv.optim.L2(),
    stepsize=1.0,
    sigma_denoiser=5 / 255,
    max_iter=20,
    early_stop=False,
)
with torch.no_grad():
    x_pnp = plug_and_play(y, physics)

# %%
# deepinv's :class:`deepinv.optim.DPIR` has a schedule instead: noise levels that fall
# in eight iterations of half-quadratic splitting. If you want plug and play, take it.

dpir = dinv.optim.DPIR(sigma=5 / 255, denoiser=model)
with torch.no_grad():
    x_dpir = dpir(y, physics)

# %%
# One equation
# ------------
#
# ``DEAL`` called with the physics solves for its fixed point directly.

with torch.no_grad():
    x_deal, info = model(y, physics, lambda_reg=1.0, return_info=True)

# %%
# The same with deepinv's gradient descent
# ----------------------------------------
#
# :class:`deepinv_deal.priors.DEALPrior` is a deepinv prior; its ``grad`` is the second
# term of the equation. Where deepinv's gradient descent converges, it converges to the
# same image; it takes more applications of the filters.

deal_prior: DEALPrior = model.prior
descent = dinv.optim.GD(
    prior=deal_prior,
    data_fidelity=dinv.optim.L2(),
    lambda_reg=1.0,
    stepsize=0.9,
    g_param=15 / 255,
    max_iter=200,
    early_stop=False,
)
with torch.no_grad():
    x_gd = descent(y, physics)
distance = float((x_gd - x_deal).norm() / x_deal.norm())
steps = int(info.inner_iter.item() + info.n_iter.item())
print(f"gradient descent, 200 steps: {distance:.1e} from DEAL's {steps} applications")

# %%

images = [y, x_pnp, x_dpir, x_deal, x_gd]
dinv.utils.plot(
    [x, *images],
    titles=["image", "measured", "PGD, 20 steps", "DPIR", "DEAL", "gradient descent"],
    subtitles=["", *(f"{psnr(z, x).item():.2f} dB" for z in images)],
    figsize=(13, 3),
)
