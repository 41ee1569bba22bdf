r"""The joint problem of image and coefficients, its solvers and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm
from deepinv_deal.operators import PatchConv, PatchFrame
from deepinv_deal.operators.patches import channel_map
from deepinv_deal.priors.penalties import L1Penalty, Penalty
from deepinv_deal.solvers import (
    AdjointOptions,
    SolverResult,
    Status,
    attach_gradient,
    conjugate_gradient,
)
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.implicit import LinearSolve
from deepinv_deal.solvers.preconditioner import from_fourier, to_fourier
from deepinv_deal.solvers.proximal import (
    ADMMState,
    admm,
    proximal_gradient,
    relative_change,
)

#: Published margins of the steps of iPALM.
PALM_MARGIN = 1.01

#: Limit on the conjugate gradient iterations of one linear solve.
MAX_CG_ITER = 1000

#: Over-relaxation of ADMM, and its penalty parameter for the coefficients of a given
#: image.
RELAXATION, CODING_PENALTY = 1.6, 0.03

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

    def with_means(self, means: Tensor, n: int, weight: Tensor) -> ImageSystem:
        r"""
        Adds :math:`\tfrac{w d}{2} \|M x - m\|^2`: patch means tied to given ones.

        Together with the free mean of the patches this makes the plain mean handling
        of :footcite:t:`ducotterd2024convex`, in which the means are not estimated.

        :param torch.Tensor means: the means m of all patches inside the image.
        :param int n: patch size, :math:`d = n^2`.
        :param torch.Tensor weight: w per sample, ``(B,)``.
        """
        scaled = PatchConv(means.new_full((1, n, n), 1 / n), "valid")  # sqrt(d) M

        def tied(f: Tensor) -> Tensor:
            return expand(weight, f) * scaled.adjoint(f)

        return ImageSystem(
            lambda x: self.H(x) + tied(scaled(x)),
            self.b + n * tied(means),
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

    def threshold(self, a: Tensor, f: Tensor) -> Tensor:
        """Returns a proximal gradient step from a for the features f."""
        return self.penalty.prox(a - self.analysis(self.synthesis(a) - f))

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
            return beta * from_fourier(
                self._aggregation * to_fourier(x, False), x, False
            )
        # What is free is usually smaller than what is penalised.
        n = features.kernels.shape[-1]
        free = PatchConv(self.frame.free.unflatten(1, (n, n)), "valid")
        return beta * (patch_count(x, n) * x - free.adjoint(free(x)))

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
        rhs = self.data.b + self.features_adjoint(self.synthesis(a))
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
    """
    G = equation.problem.frame.C.detach()
    gram = G @ G.T
    # Only there to let redundant supports pass: it is at the level of rounding.
    ridge = 10 * torch.finfo(G.dtype).eps * gram.trace()

    def by_patch(v: Tensor) -> Tensor:  # (B, C p, H', W') -> (B, C, H', W', p)
        return v.unflatten(1, (-1, len(G))).movedim(2, -1)

    def solve(v: Tensor, rtol: Tensor) -> SolverResult:
        active = by_patch(S(torch.ones_like(v), 1.0))
        matrix = active[..., None] * gram * active[..., None, :]
        matrix = matrix + torch.diag_embed(1 - active + ridge)
        e = torch.linalg.solve(matrix, (active * by_patch(v))[..., None])[..., 0]
        e = e.movedim(-1, 2).flatten(1, 2)
        done = torch.zeros_like(rtol)
        return SolverResult(
            v + e - equation.hessian(e), done.to(torch.int8), done.to(torch.int64), done
        )

    return solve


# -- solvers ---------------------------------------------------------------------


@torch.no_grad()
def ipalm(
    problem: SynthesisProblem,
    x: Tensor,
    a: Tensor,
    *,
    rtol: float = 1e-4,
    max_iter: int = 10000,
    bounds: tuple[float, float] | None = None,
) -> SolverResult:
    r"""
    Minimises J by the inertial proximal alternating linearised minimisation.

    As published (:footcite:t:`ducotterd2024smooth`): inertia :math:`(k - 1) / (k + 2)`,
    steps 1 in the coefficients and :math:`1 / L`, :math:`L = 1.01\, (\|H\| + \beta
    \|B\|)` in the image; stops when the image changes by at most ``rtol``, relatively.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor x: first image.
    :param torch.Tensor a: first coefficients.
    :param float rtol: tolerance on the relative change of the image per iteration.
    :param int max_iter: largest number of iterations.
    :param tuple bounds: smallest and largest value of the image.
    :return: (:class:`SolverResult`) the image in ``x``, coefficients and image in
        ``state``.
    """
    L = PALM_MARGIN * (problem.data.sqnorm + problem.beta * problem.aggregation_norm)

    def step_coefficients(v: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        return problem.threshold(v, problem.features(blocks[1]))

    def step_image(v: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        synthesis = problem.features_adjoint(problem.synthesis(blocks[0]))
        g = problem.data.H(v) + problem.aggregate(v) - problem.data.b - synthesis
        x = v - g / expand(L, v)
        return x if bounds is None else x.clamp(*bounds)

    result = proximal_gradient(
        [step_coefficients, step_image],
        [a, x],
        inertia="palm",
        rtol=rtol,
        max_iter=max_iter,
        measure=lambda new, old: relative_change(new[1:], old[1:]),
    )
    return replace(result, x=result.state[1])


def _pack(a: Tensor, x: Tensor) -> Tensor:
    return torch.cat([a.flatten(1), x.flatten(1)], 1)


def _unpack(packed: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    split = a[0].numel()
    return packed[:, :split].view_as(a), packed[:, split:].view_as(x)


@torch.no_grad()
def eliminated_fista(
    problem: SynthesisProblem,
    x: Tensor,
    a: Tensor,
    *,
    rtol: float = 1e-4,
    max_iter: int = 10000,
) -> SolverResult:
    """
    Minimises J by FISTA on the coefficients, image eliminated, with restarts.

    Every iteration replaces the image by the best one for the coefficients, one linear
    system. The step in the coefficients is 1, whatever H and beta. Stops when the image
    changes by at most ``rtol``, relatively.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor x: first image.
    :param torch.Tensor a: first coefficients.
    :param float rtol: tolerance on the relative change of the image per iteration.
    :param int max_iter: largest number of iterations.
    :return: (:class:`SolverResult`) the image in ``x``, coefficients and image in
        ``state``.
    """

    # The image is affine in the coefficients, so extrapolating both together gives the
    # best image of the extrapolated coefficients: no second solve.
    def step(v: Tensor, _blocks: tuple[Tensor, ...]) -> Tensor:
        v_a, v_x = _unpack(v, a, x)
        new = problem.threshold(v_a, problem.features(v_x))
        return _pack(new, problem.image(new, init=v_x))

    def change(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> Tensor:
        pair = (_unpack(new[0], a, x)[1], _unpack(old[0], a, x)[1])
        return relative_change(pair[:1], pair[1:])

    result = proximal_gradient(
        [step],
        [_pack(a, problem.image(a, init=x))],
        inertia="fista",
        restart=True,
        rtol=rtol,
        max_iter=max_iter,
        measure=change,
    )
    a, x = _unpack(result.x, a, x)
    return replace(result, x=x, state=(a, x))


def _violation(
    scale: Callable[[ADMMState], Tensor],
) -> Callable[[ADMMState, ADMMState], Tensor]:
    """
    Returns a stopping rule for ADMM that also ends where all coefficients are zero.

    The violation of the splitting and the last change of the split variables, relative
    to the norm of these and a ``scale`` of the unknown.
    """

    def measure(new: ADMMState, old: ADMMState) -> Tensor:
        assert new.Kx is not None
        worst = torch.maximum(distance(new.Kx, new.z), distance(new.z, old.z))
        size = torch.hypot(total(new.z), scale(new))
        return worst / size.where(size != 0, 1)

    def total(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([norm(v) for v in parts]).square().sum(0).sqrt()

    def distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        return total(tuple(v - w for v, w in zip(a, b, strict=True)))

    return measure


@torch.no_grad()
def joint_admm(
    problem: SynthesisProblem,
    x: Tensor,
    a: Tensor,
    *,
    r: float,
    relaxation: float = RELAXATION,
    rtol: float = 1e-4,
    max_iter: int = 10000,
    bounds: tuple[float, float] | None = None,
) -> SolverResult:
    r"""
    Minimises J by ADMM with the exact joint quadratic solve.

    Sample :math:`i` stops as soon as, relative to :math:`(\|x\|^2 + \|z\|^2)^{1/2}`,
    neither the distance of the coefficients from their split z nor the last change of z
    exceeds ``rtol``: a rule that also ends where all coefficients are zero.

    The coefficients are split, :math:`a = z`, with penalty ``r``. For a target v the
    quadratic part is minimised over image and coefficients at once: with
    :math:`K = r (G^{\top} G + r I)^{-1}`, an m x m matrix,

    .. math::
        \big(H + \beta \sum_k P_k^{\top} U^{\top} K U P_k\big) x
        &= b + \sqrt{\beta} \sum_k P_k^{\top} U^{\top} K G^{\top} v_k, \\
        a_k &= v_k + \tfrac1r G K (\sqrt{\beta}\, U P_k x - G^{\top} v_k).

    With ``bounds`` the image is split too, :math:`x = w`.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor x: first image.
    :param torch.Tensor a: first coefficients.
    :param float r: penalty parameter, larger than the weak convexity of R.
    :param float relaxation: over-relaxation, in (0, 2).
    :param float rtol: tolerance, see above.
    :param int max_iter: largest number of iterations.
    :param tuple bounds: smallest and largest value of the image.
    :return: (:class:`SolverResult`) the image in ``x``, coefficients and image in
        ``state``.
    :raises ValueError: if ``r`` is not larger than the weak convexity of R.
    """
    if not r > problem.penalty.weak_convexity:
        raise ValueError(
            f"r must be larger than {problem.penalty.weak_convexity:.3g}, the modulus "
            f"of weak convexity of the penalty, got {r}."
        )
    eye = torch.eye(len(problem._gram), dtype=x.dtype, device=x.device)
    K = r * torch.linalg.inv(problem._gram + r * eye)
    correct = problem.frame.C @ K / r
    # The split of the image weighs as much as the data term.
    rho = problem.data.sqnorm.expand(len(x)) if bounds is not None else None
    solve = problem.image_solver(K, rho)

    def solve_x(
        targets: tuple[Tensor, ...], previous: Tensor, _: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        v = targets[0]
        Gv = problem.synthesis(v)
        rhs = problem.data.b + problem.features_adjoint(channel_map(K, Gv))
        if rho is not None:
            rhs = rhs + expand(rho, x) * targets[1]
        image = solve(rhs, previous).x
        a = v.add_(channel_map(correct, problem.features(image) - Gv))
        return image, (a, image)[: len(targets)]

    def prox(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = (problem.penalty.prox(v[0], r),)
        return z if bounds is None else (*z, v[1].clamp(*bounds))

    z = (a,) if bounds is None else (a, x)
    result = admm(
        solve_x,
        lambda _: z,  # never asked: the coefficients do not follow from the image
        prox,
        ADMMState(x, z, tuple(torch.zeros_like(v) for v in z), z),
        rho=(r,) if rho is None else (r, rho),
        relaxation=relaxation,
        rtol=rtol,
        max_iter=max_iter,
        measure=_violation(lambda state: norm(state.x)),
    )
    state = result.state
    if bounds is not None:
        return replace(result, x=state.z[1], state=state.z)
    # The split coefficients are sparse; the image that belongs to them is the result.
    image = problem.image(state.z[0], init=state.x)
    return replace(result, x=image, state=(*state.z, image))


@torch.no_grad()
def sparse_coding(
    problem: SynthesisProblem,
    features: Tensor,
    a: Tensor,
    *,
    rtol: float = 1e-4,
    max_iter: int = 10000,
    r: float = CODING_PENALTY,
) -> SolverResult:
    r"""
    Finds the coefficients of given features, :math:`\min_a \tfrac12 \|f - G^{\top}
    a\|^2 + R(a)`.

    By ADMM for convex penalties, whose only linear system is m x m; the dictionaries
    are so badly conditioned that gradient steps need hundreds of iterations. By FISTA
    with restarts for others. The tolerance of ADMM is relative to the features and the
    coefficients together.

    :param SynthesisProblem problem: the problem; its data term does not matter.
    :param torch.Tensor features: shape ``(B, C m, H', W')``.
    :param torch.Tensor a: first coefficients.
    :param float rtol: tolerance, see the solvers.
    :param int max_iter: largest number of iterations.
    :param float r: penalty parameter of ADMM.
    :return: (:class:`SolverResult`) the coefficients in ``x``.
    """
    if problem.penalty.weak_convexity > 0:
        return proximal_gradient(
            [lambda v, _: problem.threshold(v, features)],
            [a],
            restart=True,
            rtol=rtol,
            max_iter=max_iter,
        )
    eye = torch.eye(len(problem._gram), dtype=a.dtype, device=a.device)
    inverse = torch.linalg.inv(problem._gram + r * eye)

    def solve_x(
        targets: tuple[Tensor, ...], *_: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        difference = features - problem.synthesis(targets[0])
        x = targets[0] + problem.analysis(channel_map(inverse, difference))
        return x, (x,)

    # The multipliers of the optimality condition: a start at the solution stays there.
    u = problem.analysis(features - problem.synthesis(a)) / r
    result = admm(
        solve_x,
        lambda x: (x,),
        lambda v: (problem.penalty.prox(v[0], r),),
        ADMMState(a, (a,), (u,)),
        rho=(r,),
        relaxation=RELAXATION,
        rtol=rtol,
        max_iter=max_iter,
        measure=_violation(lambda _: norm(features)),
    )
    return replace(result, x=result.state.z[0])


def coordinate_descent(
    problem: SynthesisProblem,
    x: Tensor,
    a: Tensor,
    *,
    rtol: float = 1e-4,
    max_iter: int = 2,
    inner_rtol: float = 1e-4,
    bounds: tuple[float, float] | None = None,
) -> SolverResult:
    r"""
    Minimises J over coefficients and image in turn, starting with the coefficients.

    The first model of :footcite:t:`ducotterd2024convex` is trained with two passes;
    stopping early gives better images than the minimiser. Sample :math:`i` stops when
    :math:`(\|\Delta x\|^2 + \|\Delta a\|^2)^{1/2} \leq \mathrm{rtol}\, (\|x\|^2 +
    \|a\|^2)^{1/2}`. Differentiable if run with gradients enabled: every coefficient
    problem and every image problem by implicit differentiation.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor x: first image.
    :param torch.Tensor a: first coefficients.
    :param float rtol: tolerance; with ``0``, ``max_iter`` passes are run.
    :param int max_iter: largest number of passes.
    :param float inner_rtol: tolerance of the coefficient problems.
    :param tuple bounds: smallest and largest value of the image, imposed by clipping.
    :return: (:class:`SolverResult`) the image in ``x``, coefficients and image in
        ``state``.
    """
    inner_iterations = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def step_coefficients(v: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        nonlocal inner_iterations
        f = problem.features(blocks[1])
        with torch.no_grad():
            result = sparse_coding(problem, f, v, rtol=inner_rtol)
        inner_iterations = inner_iterations + result.n_iter
        return attach_gradient(CoefficientEquation(problem, f), result.x, LINEAR)

    def step_image(v: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        x = problem.image(blocks[0], init=v)
        return x if bounds is None else x.clamp(*bounds)

    result = proximal_gradient(
        [step_coefficients, step_image],
        [a, x],
        inertia="none",
        rtol=rtol,
        max_iter=max_iter,
        measure=relative_change,
    )
    status = result.status
    if not rtol:  # a fixed number of passes is what was asked for
        done = status == Status.MAX_ITER
        status = status.where(~done, Status.CONVERGED)
    return replace(result, x=result.state[1], status=status, n_inner=inner_iterations)


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
    return from_fourier(inverse * to_fourier(v, complex_pair), v, complex_pair)
