r"""The joint problem of image and coefficients, and its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._batch import Output, expand, inner
from deepinv_deal.operators import PatchConv, PatchFrame
from deepinv_deal.operators.blocks import cache_bytes, in_blocks
from deepinv_deal.operators.patches import SlicedPatchConv
from deepinv_deal.problems.data_term import DataTerm, operator_term
from deepinv_deal.problems.likelihood_term import LikelihoodTerm
from deepinv_deal.problems.normal_operator import NormalOperator
from deepinv_deal.problems.penalties import GROUP_SIDE, L1Penalty, Penalty
from deepinv_deal.solvers import (
    AdjointOptions,
    LocalProx,
    SolverResult,
    Status,
    attach_gradient,
    conjugate_gradient,
)
from deepinv_deal.solvers.implicit import LinearSolve
from deepinv_deal.solvers.preconditioner import convolve
from deepinv_deal.solvers.proximal import proximal_gradient, relative_change

#: Limit on the conjugate gradient iterations of one linear solve.
MAX_CG_ITER = 1000

#: Limit on the linear solves for one image with a likelihood.
MAX_NEWTON_STEPS = 100

#: Patches whose active sets are solved in one batch of matrices.
ACTIVE_SET_CHUNK = 256

#: ``solve(v, init=None, rtol=None)`` of a linear system in the image.
ImageSolver = Callable[..., SolverResult]


class TiedMeans(NormalOperator):
    r"""
    A normal operator plus :math:`w d M^{\top} M`, where M takes the means of patches.

    :param DataTerm data: the data term with the other operator.
    :param PatchConv means: :math:`\sqrt d M` for patches of d pixels.
    :param torch.Tensor weight: w per sample, ``(B,)``.
    """

    def __init__(self, data: DataTerm, means: Any, weight: Tensor):
        def apply(x: Tensor) -> Tensor:
            return data.fast_normal(x) + expand(weight, x) * means.adjoint(means(x))

        super().__init__(apply, data.b, (data.fourier,))
        self.data, self.weight = data, weight
        self.pixels = means.kernels[0].numel()

    @property
    def is_circulant(self) -> bool:
        """Whether it is a convolution: patches inside the image see its border."""
        return False

    @property
    def norm_bound(self) -> Tensor:
        """An upper bound of its norm, ``(B,)``."""
        return self.data.norm_bound + self.weight * self.pixels


def with_means(data: DataTerm, image: Tensor, n: int, weight: Tensor) -> DataTerm:
    r"""
    Adds :math:`\tfrac{w d}{2} \|M (x - z)\|^2` to a data term: patch means tied to
    those of z.

    Together with the free mean of the patches this makes the plain mean handling of
    :footcite:t:`ducotterd2024convex`, in which the means are not estimated.

    :param DataTerm data: the data term.
    :param torch.Tensor image: the image z, whose patches M takes the means of.
    :param int n: patch size, :math:`d = n^2`.
    :param torch.Tensor weight: w per sample, ``(B,)``.
    """
    means: Any = PatchConv(image.new_full((1, n, n), 1 / n), "valid")  # sqrt(d) M
    slices = data.mean_slices
    if slices is not None:
        means = SlicedPatchConv(means, slices, (slices.depth, *image.shape[2:]))
    tied = expand(weight, image) * means.adjoint(means(image))
    if isinstance(data, LikelihoodTerm):
        nothing = operator_term(torch.zeros_like(tied), torch.zeros_like)
        return replace(data, added=DataTerm(tied, TiedMeans(nothing, means, weight)))
    return replace(data, b=data.b + tied, H=TiedMeans(data, means, weight))


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

    :param DataTerm data: the data term.
    :param PatchFrame frame: the dictionary, G in place of C.
    :param Penalty penalty: the penalty R.
    :param torch.Tensor beta: coupling per sample, ``(B,)``.
    :param float cg_rtol: tolerance of linear solves that need conjugate gradients.
    :param torch.Tensor pinned: image whose finite pixels are held fixed, where a
        solution has met its bounds; NaN elsewhere. ``None``: all pixels are free.
    :param bool strict: raise if a linear system of the backward pass is not solved.
    :param torch.Tensor near: an image near the solution, at which a likelihood is
        linearised for the backward pass.
    """

    data: DataTerm
    frame: PatchFrame
    penalty: Penalty
    beta: Tensor
    cg_rtol: float = 1e-6
    pinned: Tensor | None = None
    strict: bool = False
    near: Tensor | None = None

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
        return self.frame.zero_coefficients(self.data.b)

    def objective(self, x: Tensor, a: Tensor) -> Tensor:
        """Returns J(x, a) per sample, ``(B,)``."""
        if self.data.quadratic:
            data = inner(x, 0.5 * self.data.normal(x) - self.data.b)
        else:
            data = self.data.value(x)
        r = self.features(x) - self.synthesis(a)
        return data + 0.5 * inner(r, r) + self.penalty.value(a)

    def threshold(self, a: Tensor, f: Tensor) -> Tensor:
        r"""
        Returns a proximal gradient step from a for the features f.

        :param torch.Tensor a: coefficients.
        :param torch.Tensor f: features.
        """

        def step(a: Tensor, f: Tensor) -> Tensor:
            return self.penalty.prox(a - self.analysis(self.synthesis(a) - f))

        return in_cache(step, a, f)

    def local_prox(self, r: float) -> LocalProx:
        r"""Returns the map :math:`\mathrm{prox}_{R/r}`."""
        return LocalProx(lambda a: self.penalty.prox(a, r), evaluate=in_cache)

    # -- linear systems in the image -------------------------------------------

    @cached_property
    def data_spectrum(self) -> Tensor | None:
        """Eigenvalues of H, ``(B or 1, 1, H, W)``; ``None``: it is no convolution."""
        H = self.data.H
        if not self.data.quadratic:
            return None
        if H is None:
            return self.data.b.new_ones(1, 1, *self.data.b.shape[2:])
        return H.transfer[0] if H.is_circulant else None

    @property
    def fourier(self) -> bool:
        """Whether the linear systems are divisions of Fourier transforms."""
        circular = self.data_spectrum is not None and self.frame.features.circular
        return circular and self.pinned is None

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
            return beta * convolve(self._aggregation, x, self.data.fourier)
        # What is free is usually smaller than what is penalised.
        free = self.frame.free_features
        return beta * (free.coverage(x) * x - free.adjoint(free(x)))

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
        data, normal = self.data, self.data.fast_normal
        kernel = self._aggregation if K is None else self._spectrum(K)
        H = self.data_spectrum
        if H is None and data.H is not None:
            H = data.H.similar  # only preconditions
        if H is None:  # as if H were a multiple of the identity
            H = expand(data.norm_bound, data.b)
        spectrum = H + expand(self.beta, data.b) * kernel
        if shift is not None:
            spectrum = spectrum + expand(shift, data.b)
        tiny = torch.finfo(spectrum.dtype).eps * spectrum.amax((-2, -1), keepdim=True)
        inverse = torch.where(spectrum > tiny, 1 / spectrum, 0)

        def A(x: Tensor) -> Tensor:
            if K is None:
                coupled = self.aggregate(x)
            else:
                coupled = self.features_adjoint(self.frame.map(K, self.features(x)))
            y = normal(x) + coupled
            return y if shift is None else y + expand(shift, x) * x

        free = None if self.pinned is None else self.pinned.isnan()

        def solve(
            v: Tensor, init: Tensor | None = None, rtol: Tensor | None = None
        ) -> SolverResult:
            if self.fourier:
                zero = torch.zeros(len(v), dtype=torch.int64, device=v.device)
                x = self._divide(inverse, v)
                return SolverResult(x, zero.to(torch.int8), zero, zero.to(v.dtype))
            restricted = A if free is None else (lambda x: free * A(free * x))
            result = conjugate_gradient(
                restricted,
                v if free is None else free * v,
                init=init,
                rtol=self.cg_rtol if rtol is None else rtol.clamp(max=self.cg_rtol),
                max_iter=MAX_CG_ITER,
                preconditioner=lambda w: self._divide(inverse, w),
                verify=False,
            )
            if free is not None:
                result = replace(result, x=free * result.x)
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
        equation = ImageEquation(self, self.features_adjoint(synthesis))
        with torch.no_grad():
            if not self.data.quadratic:
                x = self._newton(equation, self.near if init is None else init)
            elif self.pinned is None:
                x = self.solve_image(self.data.b + equation.coupling, init=init).x
            else:
                x = self.pinned.nan_to_num(0.0)
                x = x + self.solve_image(equation(x)).x
        return attach_gradient(equation, x, LINEAR.made_strict(self.strict))

    def _newton(self, equation: ImageEquation, init: Tensor | None) -> Tensor:
        """Solves for the image with a likelihood, by freezing its curvature."""
        x = self.data.start() if init is None else init
        if self.pinned is not None:
            x = self.pinned.where(self.pinned.isfinite(), x)

        def step(x: Tensor, _: tuple[Tensor, ...]) -> Tensor:
            return x + self.frozen(x).solve_image(equation(x)).x

        result = proximal_gradient(
            [step],
            [x],
            inertia="none",
            rtol=self.cg_rtol,
            max_iter=MAX_NEWTON_STEPS,
            measure=relative_change,
            look_every=1,
        )
        return result.x

    def frozen(self, x: Tensor) -> SynthesisProblem:
        """Returns the problem with the curvature of a likelihood frozen at ``x``."""
        return replace(self, data=self.data.at(x)) if not self.data.quadratic else self

    def tangent(self, x: Tensor) -> SynthesisProblem:
        """Returns the problem with the second derivative of a likelihood at ``x``."""
        if self.data.quadratic:
            return self
        return replace(self, data=self.data.tangent(x))

    def _divide(self, inverse: Tensor, v: Tensor) -> Tensor:
        """Multiplies the Fourier transform of ``v``."""
        return convolve(inverse, v, self.data.fourier)

    # -- derivative --------------------------------------------------------------

    def differentiable(
        self, x: Tensor, a: Tensor, options: AdjointOptions
    ) -> tuple[Tensor, Tensor]:
        """Attaches implicit gradients to a solution (x, a), pixels pinned or not."""
        if not torch.is_grad_enabled():
            return x, a
        near = replace(self, near=x)
        a = attach_gradient(CoefficientEquation(near), a, options)
        if not a.requires_grad:
            return x, a
        # The value is that which was found, with or without gradients.
        image = near.image(a, init=x)
        return x + (image - image.detach()), a


#: The systems in the image are linear and symmetric: one solve is the exact adjoint.
LINEAR = AdjointOptions(jacobian_free=True)


@dataclass(frozen=True)
class ImageEquation:
    r"""
    The optimality condition of the image for given coefficients.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor coupling: :math:`\sqrt{\beta} F^{\top} G^{\top} a`.
    """

    problem: SynthesisProblem
    coupling: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the residual of the system."""
        p = self.problem
        residual = p.data.force(x) + self.coupling - p.features_adjoint(p.features(x))
        if p.pinned is None:
            return residual
        return torch.where(p.pinned.isnan(), residual, 0)

    def adjoint_solver(self, x: Tensor) -> LinearSolve:
        """Returns the solver of the linear system, of a likelihood at ``x``."""
        solve = self.problem.tangent(x).solve_image
        return lambda v, rtol: solve(v, rtol=rtol)


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
            f = f - p.features(self._solve_image(p.features_adjoint(f)).x)
        return p.analysis(f)

    @cached_property
    def _solve_image(self) -> ImageSolver:
        p = self.problem
        return (p if p.near is None else p.tangent(p.near)).solve_image

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

    frame = equation.problem.frame

    def by_patch(v: Tensor) -> Tensor:  # (B, C p, H', W') -> (B C H' W', p)
        parts = frame.unpack(v, len(G))
        return torch.cat([part.movedim(1, -1).flatten(0, -2) for part in parts])

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
        shapes = [p.movedim(1, -1).shape for p in frame.unpack(v, len(G))]
        parts = e.split([math.prod(shape[:-1]) for shape in shapes])
        parts = [p.view(s).movedim(-1, 1) for p, s in zip(parts, shapes, strict=True)]
        e = frame.pack(list(parts), len(v))
        w = v + e - equation.hessian(e)
        finite = torch.isfinite(w).flatten(1).all(1)
        status = torch.where(finite, Status.CONVERGED, Status.NON_FINITE)
        zero = torch.zeros_like(rtol)
        return SolverResult(w, status.to(torch.int8), zero.to(torch.int64), zero)

    return solve


# -- helpers ---------------------------------------------------------------------


def in_cache(function: Callable[..., Output], *maps: Tensor) -> Output:
    """
    Evaluates a function of maps ``(B, C p, H', W')``, pointwise or for groups of 2 x 2
    positions, in blocks of rows.
    """
    return in_blocks(
        function,
        *maps,
        reach=0,
        channels=maps[0].shape[1],
        block_bytes=cache_bytes(maps[0].device) // max(1, len(maps[0])),
        multiple=GROUP_SIDE,
    )
