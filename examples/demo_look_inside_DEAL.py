r"""
Looking inside DEAL
===================

DEAL's reconstruction is a fixed point: with the mask :math:`M` computed from the
reconstruction itself,

.. math::
    \hat x = B^{-1} A^{\top} y, \qquad
    B = A^{\top} A + \lambda W^{\top} M(\hat x)^2 W,

a *linear* function of the data once the mask is known
:footcite:p:`pourya2025dealing`. Everything in it can be looked at: the filters
:math:`W`, what the mask hides from them, which data each pixel averages, how fast the
iteration converges and why, and how sure the model is of every pixel.
"""

# %%
# A small image keeps this example fast. Derivatives at the solution are worth double
# precision.

import torch
from skimage.data import camera

from deepinv_deal import DEAL, interpret

x = torch.from_numpy(camera()[62:98, 246:282] / 255)[None, None]
sigma = 25 / 255
rng = torch.Generator().manual_seed(0)
y = x + sigma * torch.randn(x.shape, generator=rng, dtype=x.dtype)
model = DEAL().double()

# %%
# What the filters look at
# ------------------------
#
# Three convolutions without anything between them are one bank of filters. They turn
# out to be finite differences of several directions and scales, so constant images are
# free, which the spectrum of :math:`W^{\top} W` confirms at frequency zero.

filters = interpret.effective_filters(model)
interpret.plot_filters(filters, num_filters=24)

# %%

interpret.plot_normal_response(*interpret.normal_response(model))

# %%
# What the mask hides
# -------------------
#
# :func:`~deepinv_deal.interpret.linearize` solves the problem and keeps what is needed
# to examine the solution. Along edges the filters respond strongly; there the mask is
# small, and hardly anything of the response is left to be penalised.

at = interpret.linearize(model, y, sigma=sigma, inner_rtol=1e-4)
responses = interpret.masked_responses(model, at.image, sigma)
best = responses.saved[0].argsort(descending=True)[:2].tolist()
interpret.plot_masked_responses(responses, filters, best, at.image)

# %%
# Image and mask find each other
# ------------------------------
#
# The first image is what the model does without knowing any structure. Its mask already
# shows the edges, and both sharpen from one iteration to the next.

path = interpret.solution_path(model, y, sigma=sigma, inner_rtol=1e-4)
interpret.plot_path(path, x)

# %%
# Which data a pixel averages
# ---------------------------
#
# Row :math:`n` of :math:`B^{-1}` holds the weights with which pixel :math:`n` averages
# the noisy image. They stay on one side of an edge and spread out where the image is
# flat. The number to check: they sum to 1.

pixels = [(28, 12), (8, 27)]
kernels = interpret.averaging_kernels(at, pixels)
print("sums of the weights:", [round(float(kernel.sum()), 3) for kernel in kernels])
interpret.plot_averaging_kernels(kernels, pixels, y, at.image, radius=8)

# %%
# How fast it converges, and why
# ------------------------------
#
# Near the fixed point the error is multiplied by the Jacobian :math:`J` of :math:`T` in
# every iteration, so it falls like :math:`\rho(J)^k` with the spectral radius
# :math:`\rho(J)`: a prediction of the rate from the solution alone. The norm of
# :math:`J` may exceed one, and then :math:`T` is no contraction in the Euclidean norm,
# although the iteration converges.

radius = interpret.spectral_radius(at)
residuals = path.residual[:, 0]
rate = interpret.asymptotic_rate(residuals)
norm = interpret.jacobian_norm(at)
print(f"predicted rate {radius:.3f}, observed {rate:.3f}; norm of J {norm:.2f}")
interpret.plot_convergence(residuals, radius)

# %%
# How sure it is
# --------------
#
# With the mask frozen, :math:`s^2 B^{-1}` is the covariance of the image given the data
# with noise of standard deviation :math:`s`. Its diagonal comes from probing, a few
# dozen solves. The mask is not known exactly and :math:`\lambda` is learned, so the
# prediction needs one calibration factor, here fitted on the image itself; on images
# without ground truth one takes that of others. The true error is largest where the
# model says so: along the edges. Within the edges it is still larger than predicted,
# since an edge that the mask has missed does not count.

variance = interpret.posterior_variance(at, sigma, spacing=5)
calibration = interpret.calibrate(variance, at.image - x)
print(f"calibration factor {calibration.factor:.2f}")
interpret.plot_uncertainty(at.image, variance, x, calibration)

# %%
# Without the mask
# ----------------
#
# What is the mask worth? With a mask of one everywhere, the model is a linear filter,
# the same for all images. Its weight has to be chosen anew.


def psnr(image):
    return -10 * float((image - x).square().mean().log10())


plain = interpret.without_mask(model)
with torch.no_grad():
    best = max(psnr(plain(y, sigma=sigma, lambda_reg=w)) for w in (1.0, 2.0, 4.0, 8.0))
print(f"PSNR with mask {psnr(at.image):.2f} dB, without mask {best:.2f} dB")

# %%
# .. footbibliography::
