"""
What the theory of DEAL guarantees for all images, beside what holds near one solution.

Part of a photograph is denoised. The bounds are those of Section 4 of "DEALing with
Image Reconstruction" (Pourya et al., 2025).

    python benchmarks/bounds.py [--size 32] [--sigma 25] [--lambda-reg 1]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from skimage.data import camera
from torch import Tensor

from deepinv_deal import DEAL
from deepinv_deal._batch import norm
from deepinv_deal.interpret import (
    Linearization,
    jacobian_norm,
    linearize,
    stability_constant,
)
from deepinv_deal.interpret.local import largest_eigenvalue
from deepinv_deal.priors.deal import MASK_MIN, BoundMask
from deepinv_deal.problems import AttentiveEquation
from deepinv_deal.solvers import conjugate_gradient


@dataclass(frozen=True)
class ConservativeBounds:
    r"""
    The bounds of the theory, which hold for all images.

    :param float smallest_eigenvalue: :math:`\lambda_\epsilon`, of :math:`A^{\top} A +
        \lambda \epsilon W^{\top} W`.
    :param float lipschitz_update: bound on how :math:`T` depends on :math:`y` with the
        mask frozen, :math:`\|A\|_2 / \lambda_\epsilon`.
    :param float lipschitz_mask: bound :math:`L` on the Lipschitz constant of
        :math:`M^2`.
    :param float contraction: bound :math:`q` on how :math:`T` depends on its argument.
    :param float stability: bound on how the fixed point depends on :math:`y`; infinite
        for :math:`q \geq 1`, when the theorem says nothing.
    """

    smallest_eigenvalue: float
    lipschitz_update: float
    lipschitz_mask: float
    contraction: float
    stability: float


def conservative_bounds(at: Linearization) -> ConservativeBounds:
    r"""
    Returns the bounds of Section 4 of the paper for a problem of DEAL.

    .. math::
        \lambda_\epsilon = \lambda_{\min}(A^{\top} A + \lambda \epsilon W^{\top} W),
        \qquad \|T(z, y_1) - T(z, y_2)\| \leq \frac{\|A\|}{\lambda_\epsilon}
        \|y_1 - y_2\|, \qquad
        q = \frac{\lambda L \|W\|^2 \|A^{\top} y\|}{\lambda_\epsilon^2}, \qquad
        \frac{1}{1 - q} \frac{\|A\|}{\lambda_\epsilon}

    (Lemma 4.2, Eqs. (16) and (18), with
    :math:`\lambda` and :math:`\|W\|` written out), where :math:`\epsilon = 10^{-4}`
    bounds :math:`M^2` from below. :math:`L` is the product of the norms of all layers
    and the largest slopes of all splines. In practice :math:`q` is far above 1:
    ``jacobian_norm`` and ``stability_constant`` are the true values near one solution.

    :param Linearization at: from ``interpret.linearize``, of DEAL.
    :return: (:class:`ConservativeBounds`)
    :raises TypeError: for another model.
    """
    equation = at.problem.equation
    if not isinstance(equation, AttentiveEquation):
        raise TypeError(
            "conservative_bounds are those of DEAL's paper, got SAFI or MMR."
        )
    regularizer, weight = equation.regularizer, float(equation.lambda_reg)
    mask = regularizer.attention
    if not isinstance(mask, BoundMask):
        raise TypeError(
            "conservative_bounds need the mask network of DEAL, got "
            f"{type(mask).__name__}."
        )
    epsilon = at.x.new_tensor(MASK_MIN**2)

    def least_normal(v: Tensor) -> Tensor:
        return at.data_normal(v) + weight * regularizer.normal(v, epsilon)

    def inverse(v: Tensor) -> Tensor:
        return conjugate_gradient(
            least_normal,
            v,
            rtol=at.inner_rtol,
            max_iter=equation.options.inner_max_iter,
        ).x

    with torch.no_grad():
        smallest = 1 / largest_eigenvalue(at, inverse)
        norm_A = largest_eigenvalue(at, at.data_normal) ** 0.5
        norm_W = largest_eigenvalue(at, regularizer.W.normal) ** 0.5
        filters = _kernel_norm(mask.W.normal_kernel(), 256) ** 0.5
        L = 2.0 * float(mask.alpha.max()) * filters
        for spline in mask.phi:
            L *= float(spline.coefficients.diff(dim=1).abs().max() / spline.step)
        for kernel in mask.V:
            L *= _kernel_norm(kernel, 32)
        q = weight * L * norm_W**2 * float(norm(equation.data.b)) / smallest**2
    update = norm_A / smallest
    stability = update / (1 - q) if q < 1 else float("inf")
    return ConservativeBounds(smallest, update, L, q, stability)


def _kernel_norm(kernel: Tensor, size: int) -> float:
    """Norm of a convolution on an unbounded image, by the DFT of its kernel."""
    symbol = torch.fft.rfft2(kernel, s=(size, size)).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(symbol, 2).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--sigma", type=float, default=25.0, help="gray levels")
    parser.add_argument("--lambda-reg", type=float, help="the learned one if unset")
    args = parser.parse_args()
    sigma = args.sigma / 255
    pixels = camera()[60 : 60 + args.size, 232 : 232 + args.size]
    x = torch.from_numpy(pixels / 255.0).float()[None, None]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    at = linearize(DEAL(), x + sigma * noise, sigma=sigma, lambda_reg=args.lambda_reg)
    bounds = conservative_bounds(at)
    print(f"contraction: {jacobian_norm(at):.2f}, at most {bounds.contraction:.2g}")
    print(f"stability: {stability_constant(at):.2f}, at most {bounds.stability:.2g}")


if __name__ == "__main__":
    main()
