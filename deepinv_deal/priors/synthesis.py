r"""The joint problem of image and coefficients, and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._batch import expand, inner
from deepinv_deal.operators import PatchConv, PatchFrame
from deepinv_deal.operators.patches import channel_map
from deepinv_deal.operators.row_blocks import cache_bytes, in_row_blocks
from deepinv_deal.priors.penalties import GROUP_SIDE, L1Penalty, Penalty
from deepinv_deal.solvers import (
    AdjointOptions,
    SolverResult,
    Status,
    attach_gradient,
    conjugate_gradient,
)
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.implicit import LinearSolve
from deepinv_deal.solvers.preconditioner import convolve

#: Limit on the conjugate gradient iterations of one linear solve.
MAX_CG_ITER = 1000

#: Patches whose active sets are solved in one batch of matrices.
ACTIVE_SET_CHUNK = 256

#: ``solve(v, init=None, rtol=None)`` of a linear system in the image.
ImageSolver = Callable[..., SolverResult]


@dataclass(frozen=True)
class ImageSystem:
    r"""
    The quadratic data term :math:`\tfrac12 \langle x, H x \rangle - \langle b, x
    \rangle`.

    :param Callable H: normal operator, images ``(B, C, H, W)`` to images.
    :param torch.Tensor b: right-hand side, shape ``(B, C, H, W)``.
    :param torch.Tensor spectrum: DFT of H if it is a circular convolution, shape
        ``(B or 1, 1, H, W)``. For two channels it acts on them as one complex image.
        ``None`` otherwise.
    :param torch.Tensor sqnorm: upper bound of :math:`\|H\|_2`, ``(B or 1,)``.
    """

    H: LinearMap
    b: Tensor
    spectrum: Tensor | None
    sqnorm: Tensor

    @classmethod
    def identity(cls, b: Tensor, weight: Tensor | None = None) -> ImageSystem:
        r"""
        Returns :math:`H = w I` with right-hand side :math:`w b`, for weights ``(B,)``.
        """
        w = b.new_ones(1) if weight is None else weight
        w4 = w.view(-1, 1, 1, 1)
        return cls(lambda x: w4 * x, w4 * b, w4.expand(-1, 1, *b.shape[2:]), w)

    def with_means(self, image: Tensor, n: int, weight: Tensor) -> ImageSystem:
        r"""
        Adds :math:`\tfrac{w d}{2} \|M (x - z)\|^2`: patch means tied to those of z.

        Together with the free mean of the patches this makes the plain mean handling
        of :footcite:t:`ducotterd2024convex`, in which the means are not estimated.

        :param torch.Tensor image: the image z, whose patches M takes the means of.
        :param int n: patch size, :math:`d = n^2`.
        :param torch.Tensor weight: w per sample, ``(B,)``.
        """
        scaled = PatchConv(image.new_full((1, n, n), 1 / n), "valid")  # sqrt(d) M

        def tied(f: Tensor) -> Tensor:
            return expand(weight, f) * scaled.adjoint(f)

        return ImageSystem(
            lambda x: self.H(x) + tied(scaled(x)),
            self.b + tied(scaled(image)),
            None,
            self.sqnorm + weight * n * n,
        )


@dataclass(frozen=True)
class SynthesisProblem:
    r"""
    Image and coefficients of one reconstruction.

    .. math::
        \min_{x, a} \; J(x, a) = \tfrac12 \langle x, H x \rangle - \langle b, x \rangle
        + \tfrac12 \sum_k \|\sqrt{\beta}\, U P_k x - G^{\top} a_k\|_2^2 + R(a)

    with the features :math:`U P_k x` of :class:`~deepinv_deal.operators.PatchFrame`
    and :math:`\|G\| \leq 1`, so that gradient steps in :math:`a` have size 1 whatever
    :math:`\beta`. All channels of an image are treated alike.

    :param ImageSystem data: the data term.
    :param PatchFrame frame: the dictionary, G in place of C.
    :param Penalty penalty: the penalty R.
    :param torch.Tensor beta: coupling per sample, ``(B,)``.
    :param float cg_rtol: tolerance of linear solves that need conjugate gradients.
    """

    data: ImageSystem
    frame: PatchFrame
    penalty: Penalty
    beta: Tensor
    cg_rtol: float = 1e-6

    # -- the parts of the objective --------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        r"""Returns :math:`\sqrt{\beta}\, U P_k x`, shape ``(B, C m, H', W')``."""
        return expand(self.beta.sqrt(), x) * self.frame.features(x)

    def features_adjoint(self, f: Tensor) -> Tensor:
        """Returns the adjoint of :meth:`features`."""
        return expand(self.beta.sqrt(), f) * self.frame.features.adjoint(f)

    def synthesis(self, a: Tensor) -> Tensor:
        r"""Returns :math:`G^{\top} a`."""
        return self.frame.synthesis(a)

    def analysis(self, f: Tensor) -> Tensor:
        """Returns :math:`G f`."""
        return self.frame.analysis(f)

    def zero_coefficients(self) -> Tensor:
        """Returns a = 0, shape ``(B, C p, H', W')``."""
        batch, channels, height, width = self.data.b.shape
        n = self.frame.features.kernels.shape[-1]
        shrink = 0 if self.frame.features.circular else n - 1
        shape = (batch, channels * len(self.frame.C), height - shrink, width - shrink)
        return self.data.b.new_zeros(shape)

    def objective(self, x: Tensor, a: Tensor) -> Tensor:
        """Returns J(x, a) per sample, ``(B,)``."""
        data = inner(x, 0.5 * self.data.H(x) - self.data.b)
        r = self.features(x) - self.synthesis(a)
        return data + 0.5 * inner(r, r) + self.penalty.value(a)

    def threshold(
        self, a: Tensor, f: Tensor, synthesis: Tensor | None = None
    ) -> Tensor:
        r"""
        Returns a proximal gradient step from a for the features f.

        :param torch.Tensor a: coefficients.
        :param torch.Tensor f: features.
        :param torch.Tensor synthesis: :math:`G^{\top} a`, if it is known.
        """

        def step(a: Tensor, misfit: Tensor) -> Tensor:
            return self.penalty.prox(a - self.analysis(misfit))

        if synthesis is not None:
            return _in_cache(step, a, synthesis - f)
        return _in_cache(lambda a, f: step(a, self.synthesis(a) - f), a, f)

    def prox(self, a: Tensor, r: float) -> Tensor:
        r"""Returns :math:`\mathrm{prox}_{R/r}(a)`."""
        return _in_cache(lambda a: self.penalty.prox(a, r), a)

    # -- linear systems in the image -------------------------------------------

    @property
    def fourier(self) -> bool:
        """Whether the linear systems are divisions of Fourier transforms."""
        return self.data.spectrum is not None and self.frame.features.circular

    @property
    def suits_admm(self) -> bool:
        """
        Whether ADMM is the fastest solver.

        Without Fourier transforms its linear systems are the dearest; the proximal maps
        of weakly convex penalties are iterative at other step sizes than 1.
        """
        return self.fourier and self.penalty.weak_convexity == 0

    @cached_property
    def _gram(self) -> Tensor:
        r""":math:`G^{\top} G`, shape ``(m, m)``."""
        return self.frame.C.T @ self.frame.C

    def _spectrum(self, K: Tensor | None = None) -> Tensor:
        r"""Spectrum of :math:`\sum_k P_k^{\top} U^{\top} K U P_k`, ``(H, W)``."""
        height, width = self.data.b.shape[2:]
        return self.frame.features.spectrum(height, width, K)

    @cached_property
    def _aggregation(self) -> Tensor:
        """The spectrum for K = I."""
        return self._spectrum()

    @property
    def aggregation_norm(self) -> Tensor:
        r"""
        Upper bound of the norm of :math:`\sum_k P_k^{\top} U^{\top} U P_k`.

        Sharp for a circular boundary; otherwise the number of patches that cover a
        pixel.
        """
        if self.frame.features.circular:
            return self._aggregation.max()
        return self.data.b.new_tensor(float(self.frame.free.shape[1]))

    def aggregate(self, x: Tensor) -> Tensor:
        r"""Returns :math:`\beta \sum_k P_k^{\top} U^{\top} U P_k x` fast."""
        features = self.frame.features
        beta = expand(self.beta, x)
        if features.circular:
            return beta * convolve(self._aggregation, x)
        # What is free is usually smaller than what is penalised.
        free = self.frame.free_features
        return beta * (patch_count(x, free.patch_size) * x - free.adjoint(free(x)))

    def image_solver(
        self, K: Tensor | None = None, shift: Tensor | None = None
    ) -> ImageSolver:
        r"""
        Returns a solver of :math:`(H + \beta \sum_k P_k^{\top} U^{\top} K U P_k + s I)
        x = v`.

        One division of Fourier transforms where data term and patches are circular,
        else conjugate gradients, preconditioned by such a division.

        :param torch.Tensor K: symmetric matrix ``(m, m)``; identity if ``None``.
        :param torch.Tensor shift: s per sample, ``(B,)``; zero if ``None``.
        """
        data = self.data
        kernel = self._aggregation if K is None else self._spectrum(K)
        H = data.spectrum
        if H is None:  # only preconditions: as if H were a multiple of the identity
            H = expand(data.sqnorm, data.b)
        spectrum = H + expand(self.beta, data.b) * kernel
        if shift is not None:
            spectrum = spectrum + expand(shift, data.b)
        tiny = torch.finfo(spectrum.dtype).eps * spectrum.amax((-2, -1), keepdim=True)
        inverse = torch.where(spectrum > tiny, 1 / spectrum, 0)

        def A(x: Tensor) -> Tensor:
            if K is None:
                coupled = self.aggregate(x)
            else:
                coupled = self.features_adjoint(channel_map(K, self.features(x)))
            y = data.H(x) + coupled
            return y if shift is None else y + expand(shift, x) * x

        def solve(
            v: Tensor, init: Tensor | None = None, rtol: Tensor | None = None
        ) -> SolverResult:
            if self.fourier:
                zero = torch.zeros(len(v), dtype=torch.int64, device=v.device)
                x = _divide(inverse, v)
                return SolverResult(x, zero.to(torch.int8), zero, zero.to(v.dtype))
            result = conjugate_gradient(
                A,
                v,
                init=init,
                rtol=self.cg_rtol if rtol is None else rtol.clamp(max=self.cg_rtol),
                max_iter=MAX_CG_ITER,
                preconditioner=lambda w: _divide(inverse, w),
                verify=False,
            )
            # An image that stays because its system broke must not pass for one that
            # has converged: NaN tells the loop around this solve.
            broken = result.status >= Status.BREAKDOWN
            return replace(result, x=result.x.where(~expand(broken, v), torch.nan))

        return solve

    @cached_property
    def solve_image(self) -> ImageSolver:
        r"""Solver of :math:`(H + \beta \sum_k P_k^{\top} U^{\top} U P_k) x = v`."""
        with torch.no_grad():
            return self.image_solver()

    def image(self, a: Tensor, init: Tensor | None = None) -> Tensor:
        """Returns the best image for coefficients a, differentiable in everything."""
        return self.image_of(self.synthesis(a), init)

    def image_of(self, synthesis: Tensor, init: Tensor | None = None) -> Tensor:
        r"""Returns the best image for coefficients with this :math:`G^{\top} a`."""
        rhs = self.data.b + self.features_adjoint(synthesis)
        with torch.no_grad():
            x = self.solve_image(rhs, init=init).x
        equation = ImageEquation(self, rhs)
        return attach_gradient(equation, x, LINEAR)

    # -- derivative --------------------------------------------------------------

    def differentiable(
        self, x: Tensor, a: Tensor, options: AdjointOptions
    ) -> tuple[Tensor, Tensor]:
        """Attaches implicit gradients to a solution (x, a) without constraints."""
        if not torch.is_grad_enabled():
            return x, a
        a = attach_gradient(CoefficientEquation(self), a, options)
        return (self.image(a, init=x), a) if a.requires_grad else (x, a)


#: The systems in the image are linear and symmetric: one solve is the exact adjoint.
LINEAR = AdjointOptions(jacobian_free=True)


@dataclass(frozen=True)
class ImageEquation:
    r"""
    The optimality condition of the image for given coefficients.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor rhs: :math:`b + \sqrt{\beta} F^{\top} G^{\top} a`.
    """

    problem: SynthesisProblem
    rhs: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the residual of the linear system."""
        p = self.problem
        return self.rhs - p.data.H(x) - p.features_adjoint(p.features(x))

    def adjoint_solver(self, x: Tensor) -> LinearSolve:  # noqa: ARG002 - linear
        """Returns the solver of the linear system."""
        return lambda v, rtol: self.problem.solve_image(v, rtol=rtol)


@dataclass(frozen=True)
class CoefficientEquation:
    r"""
    The optimality condition of the coefficients, image eliminated.

    .. math::
        F(a) = \mathrm{prox}_R\big(a - G (G^{\top} a - \sqrt{\beta}\, U P x(a))\big) - a
        = 0, \qquad x(a) = \arg\min_x J(x, a).

    With the derivative S of the proximal map and the symmetric Hessian M of the
    smooth part, :math:`-F_a^{\top} = I - (I - M) S`. Its systems are solved through

    .. math::
        (I - S + S^{1/2} M S^{1/2})\, e = S^{1/2} v, \qquad
        w = v + (I - M) S^{1/2} e,

    symmetric and, at a strict local minimiser, positive definite.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor features: features of a given image: the coefficients of that
        image (a lasso) instead of the joint problem.
    """

    problem: SynthesisProblem
    features: Tensor | None = None

    def _preimage(self, a: Tensor) -> Tensor:
        p = self.problem
        f = p.features(p.image(a)) if self.features is None else self.features
        return a - p.analysis(p.synthesis(a) - f)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns F at the coefficients ``x``."""
        return self.problem.penalty.prox(self._preimage(x)) - x

    def hessian(self, e: Tensor) -> Tensor:
        """Applies M."""
        p = self.problem
        f = p.synthesis(e)
        if self.features is None:
            f = f - p.features(p.solve_image(p.features_adjoint(f)).x)
        return p.analysis(f)

    def adjoint_solver(self, x: Tensor) -> LinearSolve:
        r"""Returns the solver of :math:`-F_a^{\top} w = v` at coefficients ``x``."""
        with torch.no_grad():
            S = self.problem.penalty.jacobian(self._preimage(x))
        if self.features is not None and isinstance(self.problem.penalty, L1Penalty):
            return _active_set_solver(self, S)

        def matrix(e: Tensor) -> Tensor:
            root = S(e, 0.5)
            return e - S(root - self.hessian(root), 0.5)

        def solve(v: Tensor, rtol: Tensor) -> SolverResult:
            result = conjugate_gradient(
                matrix,
                S(v, 0.5),
                rtol=rtol,
                max_iter=MAX_CG_ITER,
                verify=False,
            )
            e = S(result.x, 0.5)
            return replace(result, x=v + e - self.hessian(e))

        return solve


def _active_set_solver(equation: CoefficientEquation, S: Any) -> LinearSolve:
    r"""
    The closed form of the lasso: :math:`w_A = (D_A^{\top} D_A)^{-1} v_A` on the
    support A of every patch (:footcite:t:`ducotterd2024convex`, Eq. (12)).

    Where the atoms of a support are linearly dependent, v must be in the range of
    :math:`D_A^{\top}`, as that of every function of the patch :math:`D a` is.
    """
    G = equation.problem.frame.C.detach()
    gram = G @ G.T
    # Only there to let redundant supports pass: it is at the level of rounding.
    ridge = 10 * torch.finfo(G.dtype).eps * gram.trace()

    def by_patch(v: Tensor) -> Tensor:  # (B, C p, H', W') -> (B C H' W', p)
        return v.unflatten(1, (-1, len(G))).movedim(2, -1).flatten(0, -2)

    def solve(v: Tensor, rtol: Tensor) -> SolverResult:
        active, rhs = by_patch(S(torch.ones_like(v), 1.0)), by_patch(v)
        e, sizes = torch.zeros_like(rhs), active.sum(1)
        # Patches with supports of like size together: matrices no larger than needed.
        for patches in sizes.argsort().split(ACTIVE_SET_CHUNK):
            largest = int(sizes[patches[-1]])
            used, atoms = active[patches].topk(largest, dim=1)
            matrix = gram[atoms[:, :, None], atoms[:, None, :]]
            matrix = matrix * used[:, :, None] * used[:, None, :]
            matrix = matrix + torch.diag_embed(1 - used + ridge)
            values = used * rhs[patches].gather(1, atoms)
            values = torch.linalg.solve(matrix, values[..., None])[..., 0]
            e[patches[:, None], atoms] = values
        shape = (len(v), -1, *v.shape[2:], len(G))
        e = e.view(shape).movedim(-1, 2).flatten(1, 2)
        w = v + e - equation.hessian(e)
        finite = torch.isfinite(w).flatten(1).all(1)
        status = torch.where(finite, Status.CONVERGED, Status.NON_FINITE)
        zero = torch.zeros_like(rtol)
        return SolverResult(w, status.to(torch.int8), zero.to(torch.int64), zero)

    return solve


# -- helpers ---------------------------------------------------------------------


def _in_cache(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Evaluates a pointwise function of maps ``(B, C p, H', W')`` block by block."""
    return in_row_blocks(
        function,
        *maps,
        reach=0,
        channels=maps[0].shape[1],
        block_bytes=cache_bytes(maps[0].device),
        multiple=GROUP_SIDE,
    )


def patch_count(x: Tensor, n: int) -> Tensor:
    """Returns how many n x n patches inside the image cover each pixel, ``(H, W)``."""
    counts = []
    for size in x.shape[-2:]:
        i = torch.arange(size, device=x.device, dtype=x.dtype)
        count = torch.minimum(i + 1, size - i).clamp(max=min(n, size - n + 1))
        counts.append(count)
    return counts[0][:, None] * counts[1]


def _divide(inverse: Tensor, v: Tensor) -> Tensor:
    """Multiplies the DFT of ``v``; two channels are one complex image."""
    complex_pair = v.shape[1] == 2
    return convolve(inverse, v, complex_pair=complex_pair)
