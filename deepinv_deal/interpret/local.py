r"""How fast the iteration converges, and how stable its fixed point is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deepinv_deal._batch import norm
from deepinv_deal.interpret._figures import BLUE, GRAY, ORANGE, SMALL, TITLE, new_figure
from deepinv_deal.interpret.linearization import Linearization
from deepinv_deal.interpret.paths import plain_iteration
from deepinv_deal.priors.attentive_quadratic import AttentiveEquation
from deepinv_deal.priors.deal import MASK_MIN, BoundMask
from deepinv_deal.solvers import conjugate_gradient
from deepinv_deal.solvers.conjugate_gradient import LinearMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Relative accuracy of eigenvalues and singular values.
EIGEN_RTOL = 1e-3

#: Factor by which inner solves reduce the residual where the iterates of T are wanted.
ITERATION_FORCING = 1e-4

#: Residuals below this many units of rounding say nothing about the rate.
ROUNDING = 300


def jacobian_eigenvalues(at: Linearization, num_eigenvalues: int = 1) -> Tensor:
    r"""
    Returns the eigenvalues of :math:`J` of largest modulus.

    :math:`J = \partial T / \partial x` at the fixed point is not symmetric, and its
    eigenvalues may come in complex pairs, on which the power iteration fails. They are
    found by implicitly restarted Arnoldi iterations (``scipy.sparse.linalg.eigs``) on
    products with :math:`J^{\top}`, each one solve and one backward pass.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import jacobian_eigenvalues, linearize
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> at = linearize(model, torch.rand(1, 1, 12, 12), sigma=0.1)
    >>> jacobian_eigenvalues(at, 3).shape
    torch.Size([3])

    :param Linearization at: from :func:`linearize`.
    :param int num_eigenvalues: how many, at most two less than unknowns.
    :return: complex, falling modulus, shape ``(num_eigenvalues,)``.
    :raises ValueError: for a number that is not in that range.
    """
    n = at.x.numel()
    if not 1 <= num_eigenvalues <= n - 2:
        raise ValueError(
            f"num_eigenvalues must lie between 1 and {n - 2}, got {num_eigenvalues}."
        )
    # Few vectors: products are dear. ARPACK wants two more than eigenvalues.
    num_vectors = max(2 * num_eigenvalues + 4, 10)
    found = _eigenvalues(at, at.jacobian_adjoint, num_eigenvalues, num_vectors)
    values = torch.as_tensor(found)
    return values[values.abs().argsort(descending=True)]


def spectral_radius(at: Linearization) -> float:
    r"""
    Returns :math:`\rho(J)`, the asymptotic convergence rate of :math:`x_{k+1} =
    T(x_k)`.

    Near the fixed point :math:`\|x_k - \hat x\|` falls like :math:`\rho^k` if
    :math:`\rho < 1`, and generic starts move away if :math:`\rho > 1`. See
    :func:`jacobian_eigenvalues` and, for a check, :func:`asymptotic_rate`.

    :param Linearization at: from :func:`linearize`; SAFI and MMR too.
    """
    return float(jacobian_eigenvalues(at)[0].abs())


def jacobian_norm(at: Linearization) -> float:
    r"""
    Returns :math:`\|J\|_2`, the factor by which :math:`T` contracts near its fixed
    point.

    This is the local value of the factor :math:`q` in Theorem 4.4 of
    :footcite:t:`pourya2025dealing`. It is at least :math:`\rho(J)`; between the two,
    errors may grow for some iterations before they fall.

    :param Linearization at: from :func:`linearize`.
    """
    return _largest_eigenvalue(at, lambda v: at.jacobian_adjoint(at.jacobian(v))) ** 0.5


def stability_constant(at: Linearization) -> float:
    r"""
    Returns :math:`\|(I - J)^{-1} B^{-1} A^{\top}\|_2`, the local Lipschitz constant of
    the reconstruction in the measurements.

    A small change :math:`\delta` of :math:`y` moves :math:`\hat x` by at most this
    factor times :math:`\|\delta\|`, the response of the mask included; with the mask
    frozen it would be :math:`\|B^{-1} A^{\top}\|_2`. Compare
    :func:`conservative_bounds`, which hold everywhere.

    :param Linearization at: from :func:`linearize`.
    """

    def normal(v: Tensor) -> Tensor:
        return at.sensitivity(at.data_normal(at.sensitivity_adjoint(v)))

    return _largest_eigenvalue(at, normal) ** 0.5


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

    (:footcite:t:`pourya2025dealing`, Lemma 4.2, Eqs. (16) and (18), with
    :math:`\lambda` and :math:`\|W\|` written out), where :math:`\epsilon = 10^{-4}`
    bounds :math:`M^2` from below. :math:`L` is the product of the norms of all layers
    and the largest slopes of all splines. In practice :math:`q` is far above 1:
    :func:`jacobian_norm` and :func:`stability_constant` are the true values near one
    solution.

    :param Linearization at: from :func:`linearize`, of :class:`deepinv_deal.DEAL`.
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
            least_normal, v, rtol=at.inner_rtol, max_iter=equation.inner_max_iter
        ).x

    with torch.no_grad():
        smallest = 1 / _largest_eigenvalue(at, inverse)
        norm_A = _largest_eigenvalue(at, at.data_normal) ** 0.5
        norm_W = _largest_eigenvalue(at, regularizer.W.normal) ** 0.5
        filters = _kernel_norm(mask.W.normal_kernel(), 256) ** 0.5
        L = 2.0 * float(mask.alpha.max()) * filters
        for spline in mask.phi:
            L *= float(spline.coefficients.diff(dim=1).abs().max() / spline.step)
        for kernel in mask.V:
            L *= _kernel_norm(kernel, 32)
        q = weight * L * norm_W**2 * float(norm(equation.b)) / smallest**2
    update = norm_A / smallest
    stability = update / (1 - q) if q < 1 else float("inf")
    return ConservativeBounds(smallest, update, L, q, stability)


def _kernel_norm(kernel: Tensor, size: int) -> float:
    """Norm of a convolution on an unbounded image, by the DFT of its kernel."""
    symbol = torch.fft.rfft2(kernel, s=(size, size)).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(symbol, 2).max())


# -- the iteration itself ----------------------------------------------------------


def iteration_residuals(
    at: Linearization, num_iter: int = 50, init: Tensor | None = None
) -> Tensor:
    r"""
    Runs the plain iteration :math:`x_{k+1} = T(x_k)` with accurate inner solves.

    :param Linearization at: tells the problem.
    :param int num_iter: number of iterations.
    :param torch.Tensor init: first unknown, shape of ``at.x``; the problem's if
        ``None``.
    :return: :math:`\|F(x_k)\| / \|A^{\top} y\|` of all iterates, ``(num_iter + 1,)``,
        fewer if the residual vanishes before.
    """
    equation = at.problem.equation
    with torch.no_grad():
        start = equation.start(at.problem.init) if init is None else init
        result = plain_iteration(equation, start, num_iter, ITERATION_FORCING)
    return result.history[:, 0]


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

    :param torch.Tensor residuals: residuals ``(n,)``, for example from
        :func:`iteration_residuals`.
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


def plot_eigenvalues(eigenvalues: Tensor) -> Figure:
    r"""
    Draws eigenvalues of :math:`J` in the unit circle.

    :param torch.Tensor eigenvalues: complex, ``(n,)``, from
        :func:`jacobian_eigenvalues`.
    :return: the figure.
    """
    figure = new_figure(4.8, 4.6)
    axis = figure.subplots()
    radius = float(eigenvalues.abs().max())
    angle = np.linspace(0, 2 * np.pi, 361)
    axis.plot(np.cos(angle), np.sin(angle), color=GRAY, linewidth=1)
    axis.fill(radius * np.cos(angle), radius * np.sin(angle), color=BLUE, alpha=0.12)
    eigenvalues = eigenvalues.detach().cpu()
    axis.plot(eigenvalues.real, eigenvalues.imag, "o", color=BLUE, markersize=5)
    axis.axhline(0, color=GRAY, linewidth=0.5)
    axis.axvline(0, color=GRAY, linewidth=0.5)
    axis.set_aspect("equal")
    axis.set_xlabel("real part")
    axis.set_ylabel("imaginary part")
    axis.set_title(
        f"eigenvalues of the Jacobian of T\nspectral radius {radius:.3f}, gray: the "
        "unit circle",
        fontsize=TITLE,
    )
    return figure


def plot_convergence(residuals: Tensor, radius: float) -> Figure:
    r"""
    Draws residuals beside the rate that the spectral radius predicts.

    :param torch.Tensor residuals: ``(n,)``, from :func:`iteration_residuals`.
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
    axis.set_title(f"Convergence of $x_{{k+1}} = T(x_k)$\n{title}", fontsize=TITLE)
    axis.set_xlabel("iteration k")
    axis.set_ylabel(r"$\|F(x_k)\| \; / \; \|A^T y\|$")
    axis.set_ylim(bottom=0.5 * float(residuals[residuals > 0].min()))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=SMALL)
    return figure


# -- SciPy ---------------------------------------------------------------------------


def _eigenvalues(
    at: Linearization,
    product: LinearMap,
    number: int,
    num_vectors: int,
    *,
    symmetric: bool = False,
) -> np.ndarray:
    """
    Finds the eigenvalues of largest modulus of a map, by Arnoldi iterations.

    Of a symmetric map, those of largest value, by Lanczos iterations.
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
    find, which = (eigsh, "LA") if symmetric else (eigs, "LM")
    return find(
        LinearOperator((n, n), matvec=matvec, dtype=v0.dtype),
        k=number,
        which=which,
        ncv=min(n, num_vectors),
        v0=v0,
        tol=EIGEN_RTOL,
        return_eigenvectors=False,
    )


def _largest_eigenvalue(at: Linearization, product: LinearMap) -> float:
    """Largest eigenvalue of a symmetric positive semidefinite map."""
    (found,) = _eigenvalues(at, product, 1, 8, symmetric=True)
    return float(max(found, 0.0))
