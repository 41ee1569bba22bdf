r"""How fast the iteration converges, and how stable its fixed point is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deepinv_deal.interpret._figures import BLUE, ORANGE, finish, new_figure
from deepinv_deal.interpret.linearization import Linearization
from deepinv_deal.solvers.conjugate_gradient import LinearMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Relative accuracy of eigenvalues and singular values.
EIGEN_RTOL = 1e-3

#: Residuals below this many units of rounding say nothing about the rate.
ROUNDING = 300


def spectral_radius(at: Linearization) -> float:
    r"""
    Returns :math:`\rho(J)`, the asymptotic convergence rate of :math:`x_{k+1} =
    T(x_k)`.

    Near the fixed point :math:`\|x_k - \hat x\|` falls like :math:`\rho^k` if
    :math:`\rho < 1`, and generic starts move away if :math:`\rho > 1`;
    :func:`asymptotic_rate` is a check. :math:`J = \partial T / \partial x` is not
    symmetric, and its eigenvalues may come in complex pairs, on which the power
    iteration fails. So they are found by implicitly restarted Arnoldi iterations
    (``scipy.sparse.linalg.eigs``) on products with :math:`J^{\top}`, each one solve and
    one backward pass.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import linearize, spectral_radius
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> at = linearize(model, torch.rand(1, 1, 12, 12), sigma=0.1)
    >>> 0 < spectral_radius(at) < 1
    True

    :param Linearization at: from :func:`linearize`; SAFI and MMR too.
    """
    return float(abs(_eigenvalue(at, at.jacobian_adjoint, symmetric=False)))


def jacobian_norm(at: Linearization) -> float:
    r"""
    Returns :math:`\|J\|_2`, the factor by which :math:`T` contracts near its fixed
    point.

    This is the local value of the factor :math:`q` in Theorem 4.4 of
    :footcite:t:`pourya2025dealing`. It is at least :math:`\rho(J)`; between the two,
    errors may grow for some iterations before they fall.

    :param Linearization at: from :func:`linearize`.
    """
    return largest_eigenvalue(at, lambda v: at.jacobian_adjoint(at.jacobian(v))) ** 0.5


def stability_constant(at: Linearization) -> float:
    r"""
    Returns :math:`\|(I - J)^{-1} B^{-1} A^{\top}\|_2`, the local Lipschitz constant of
    the reconstruction in the measurements.

    A small change :math:`\delta` of :math:`y` moves :math:`\hat x` by at most this
    factor times :math:`\|\delta\|`, the response of the mask included; with the mask
    frozen it would be :math:`\|B^{-1} A^{\top}\|_2`.

    :param Linearization at: from :func:`linearize`.
    """

    def normal(v: Tensor) -> Tensor:
        return at.sensitivity(at.data_normal(at.sensitivity_adjoint(v)))

    return largest_eigenvalue(at, normal) ** 0.5


def divergence(
    at: Linearization,
    num_probes: int | None = None,
    *,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
) -> float:
    r"""
    Returns :math:`\mathrm{tr}\big(A \, \partial \hat x / \partial y\big)`, the
    divergence that Stein's unbiased risk estimate needs.

    .. math::
        \mathrm{div} = \mathrm{tr} \big( (I - J)^{-1} B^{-1} A^{\top} A \big), \qquad
        \mathrm{SURE} = \tfrac1m \|A \hat x - y\|^2 - s^2 + \tfrac{2 s^2}{m} \,
        \mathrm{div}

    for noise of standard deviation :math:`s` and :math:`m` measurements. The derivative
    is exact, no finite difference; the trace is exact (one solve for each pixel) or an
    average over random signs, :math:`\mathrm{div} \approx v^{\top} (\dots) v`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import divergence, linearize
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> at = linearize(model, torch.rand(1, 1, 12, 12), sigma=0.1)
    >>> 0 < divergence(at) < 144
    True

    :param Linearization at: from :func:`linearize`.
    :param int num_probes: number of random probes; ``None``: the exact trace.
    :param int batch_size: solves that run together.
    :param torch.Generator generator: of the probes; a fresh one if ``None``.
    :return: between 0 and the number of measurements for a well-behaved model.
    """
    shape, n = at.x.shape[1:], at.x.numel()
    if num_probes is None:
        probes = torch.eye(n, dtype=at.x.dtype, device=at.x.device).view(n, *shape)
    else:
        probes = random_signs(at.x, num_probes, generator)
    total = 0.0
    for v in probes.split(batch_size):
        total += float((v * at.sensitivity(at.data_normal(v))).sum())
    return total if num_probes is None else total / num_probes


def random_signs(
    like: Tensor, number: int, generator: torch.Generator | None
) -> Tensor:
    """
    Draws images of random signs, ``(number, C, H, W)``.

    :param torch.Tensor like: image batch whose shape, dtype and device to take.
    :param int number: how many.
    :param torch.Generator generator: random state; a fresh one if ``None``.
    """
    generator = generator or torch.Generator().manual_seed(0)
    shape = (number, *like.shape[1:])
    bits = torch.randint(2, shape, generator=generator, device=generator.device)
    return (2 * bits - 1).to(like)


# -- the iteration itself --------------------------------------------------------


def asymptotic_rate(residuals: Tensor, last: int = 10) -> float:
    r"""
    Returns the observed convergence rate, the slope of the last logarithmic residuals.

    Residuals at the level of rounding are left out. Two eigenvalues of similar modulus
    need many iterations until one of them is alone.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.interpret import asymptotic_rate
    >>> round(asymptotic_rate(0.8 ** torch.arange(30.0)), 4)
    0.8

    :param torch.Tensor residuals: residuals ``(n,)``, for example
        ``solution_path(..., inner_rtol=1e-4).residual[:, 0]``.
    :param int last: number of differences to use.
    :return: factor per iteration; below 1 if the iteration converges.
    :raises ValueError: if fewer than two residuals are above rounding.
    """
    logs = _above_rounding(residuals)[-(last + 1) :].double().log()
    if len(logs) < 2:
        raise ValueError(
            f"residuals must hold two or more values above rounding, got {len(logs)}."
        )
    k = torch.arange(len(logs)).to(logs)
    k = k - k.mean()
    return float(((k * logs).sum() / k.square().sum()).exp())


def _above_rounding(residuals: Tensor) -> Tensor:  # (n,) -> (m,), m <= n
    """Cuts off the residuals from the first one at the level of rounding."""
    floor = ROUNDING * torch.finfo(residuals.dtype).eps * residuals.max()
    small = (residuals <= floor).nonzero()
    return residuals[: int(small[0])] if len(small) else residuals


# -- figures -----------------------------------------------------------------------


def plot_convergence(residuals: Tensor, radius: float) -> Figure:
    r"""
    Draws residuals beside the rate that the spectral radius predicts.

    :param torch.Tensor residuals: ``(n,)``, as for :func:`asymptotic_rate`.
    :param float radius: :math:`\rho(J)`, from :func:`spectral_radius`.
    :return: the figure.
    """
    figure = new_figure(6.4, 4.2)
    axis = figure.subplots()
    k = torch.arange(len(residuals))
    axis.semilogy(
        k, residuals.cpu(), "o-", color=BLUE, markersize=3, label="observed residual"
    )
    anchor = 2 * len(_above_rounding(residuals)) // 3
    predicted = residuals[anchor].cpu() * radius ** (k - anchor).double()
    axis.semilogy(
        k,
        predicted,
        "--",
        color=ORANGE,
        label=rf"predicted slope, $\rho(J)^k$ with $\rho(J)={radius:.3f}$",
    )
    try:
        title = f"observed rate {asymptotic_rate(residuals):.3f}"
    except ValueError:
        title = "observed rate unknown"
    finish(
        axis,
        f"Convergence of $x_{{k+1}} = T(x_k)$\n{title}",
        "iteration k",
        r"$\|F(x_k)\| \; / \; \|A^T y\|$",
        legend=True,
    )
    axis.set_ylim(bottom=0.5 * float(residuals[residuals > 0].min()))
    return figure


# -- SciPy ---------------------------------------------------------------------------


def _eigenvalue(
    at: Linearization, product: LinearMap, *, symmetric: bool
) -> float | complex:
    """
    Finds the eigenvalue of largest modulus of a map, by Arnoldi iterations.

    Of a symmetric map, the largest one, by Lanczos iterations.
    """
    from scipy.sparse.linalg import LinearOperator, eigs, eigsh

    def matvec(v: np.ndarray) -> np.ndarray:
        w = torch.from_numpy(np.ascontiguousarray(v)).to(at.x).view_as(at.x)
        return product(w).flatten().cpu().numpy()

    n = at.x.numel()
    # The same first vector in every call.
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=rng, device="cpu")
    v0 = start.to(at.x.dtype).numpy()
    # Few vectors, for products are dear.
    find, which, vectors = (eigsh, "LA", 8) if symmetric else (eigs, "LM", 10)
    (found,) = find(
        LinearOperator((n, n), matvec=matvec, dtype=v0.dtype),
        k=1,
        which=which,
        ncv=min(n, vectors),
        v0=v0,
        tol=EIGEN_RTOL,
        return_eigenvectors=False,
    )
    return found


def largest_eigenvalue(at: Linearization, product: LinearMap) -> float:
    """
    Returns the largest eigenvalue of a symmetric positive semidefinite map.

    :param Linearization at: tells shape, dtype and device of the vectors.
    :param Callable product: the map.
    """
    return max(float(_eigenvalue(at, product, symmetric=True).real), 0.0)
