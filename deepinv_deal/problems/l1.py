r"""
The equation of attentive l1 models: what SAFI and MMR have in common.

The frozen problem is

.. math::
    \min_{x \in [0, 1]^n} \; \tfrac{1}{2} \|A x - y\|_2^2 + \lambda \|m \odot W x\|_1

with a mask :math:`m` that was computed from an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deepinv_deal._batch import expand, in_parts, inner, joint_norm, norm, select
from deepinv_deal.operators import MultiConvOperator, Slices
from deepinv_deal.problems.bounds import Bounds, clamp, projected_descent, projection
from deepinv_deal.problems.data_term import DataTerm
from deepinv_deal.problems.equation import IterativeEquation
from deepinv_deal.problems.options import SolverOptions
from deepinv_deal.problems.quadratic import (
    AttentiveQuadratic,
    SlicedQuadratic,
    sliced,
)
from deepinv_deal.problems.smoothed_l1 import SmoothedL1Equation
from deepinv_deal.solvers import (
    AdjointOptions,
    ADMMState,
    LocalProx,
    SolverResult,
    admm,
    conjugate_gradient,
    project_linf,
    proximal_gradient,
    soft_threshold,
)
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.fixed_point import LEAST_FORCE
from deepinv_deal.solvers.preconditioner import convolve

#: ``mask(x, Wx)``: weights from an image and its filtered version, shape of ``Wx``.
MaskFunction = Callable[[Tensor, Tensor], Tensor]

#: ADMM's threshold :math:`\lambda \|W\| / \rho` of a filter response, for images in
#: [0, 1] and unit mask, in denoising and with a physics. Smaller means stiffer.
DENOISING_THRESHOLD, THRESHOLD = 4e-3, 4e-4

#: The penalty of the box with a physics, relative to the data term. Where the data say
#: nothing, the image moves by the ratio of both penalties only.
BOX_PENALTY = 0.03

#: Over-relaxation of ADMM, and how much each of its linear solves reduces the residual.
RELAXATION, LINEAR_FORCING, LINEAR_MAX_ITER = 1.7, 0.1, 50

#: Up to this penalty, relative to the data term, one preconditioned descent step is a
#: good enough solve.
LARGEST_DESCENT_PENALTY = 250.0

#: How far the residual of the first problem, whose mask is the same everywhere, is
#: reduced, in denoising and with a physics.
FIRST_DENOISING_FORCING, FIRST_FORCING = 0.3, 0.1

#: Inner iterations between two looks at the residual.
CHECK_EVERY = 5


@dataclass(frozen=True)
class AttentiveL1:
    r"""
    The regularizer :math:`R_m(x) = \nu \|m \odot W x\|_1` for given weights.

    Images with more channels than the filters (real and imaginary part, slices) are
    regularized channel by channel; their filter responses are stacked along the
    channels. Of all three orientations of a volume it is the mean,

    .. math::
        R_m(x) = \tfrac13 \sum_{o=1}^3 \nu \|m_o \odot W S_o x\|_1,

    :math:`m` and :math:`W` standing for :math:`m_o` and :math:`W S_o / \sqrt 3` of
    all, packed.

    :param MultiConvOperator W: the analysis operator of images, divided by its norm.
    :param torch.Tensor nu: the norm :math:`\nu` of the learned operator.
    :param Callable mask_function: ``mask(x, W x)`` for images that the filters see.
    :param Slices slices: these images.
    :param float first_mask: mask, the same everywhere, with whose solution an iteration
        starts.
    """

    W: MultiConvOperator
    nu: Tensor
    mask_function: MaskFunction
    slices: Slices = Slices()
    first_mask: float = 1.0

    @property
    def _gain(self) -> float:
        """By which the stacks of slices are multiplied, so that the norm stays."""
        return self.slices.number**-0.5

    @property
    def strength(self) -> Tensor:
        r"""The factor of :math:`\|m \odot W x\|_1`."""
        return self._gain * self.nu

    def analyse(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K, H, W)
        """Returns the filter responses :math:`W x`."""
        features = [self.W(stack) for stack in self.slices.stacks(x)]
        packed = self.slices.pack(features, len(x))
        return self._gain * packed if self.slices.mean else packed

    def adjoint(self, w: Tensor) -> Tensor:  # (B, K, H, W) -> (B, C, H, W)
        r"""Applies :math:`W^{\top}`."""
        features = self.slices.unpack(w, self.W.out_channels)
        x = self.slices.unknown([self.W.adjoint(f) for f in features], len(w))
        return self._gain * x if self.slices.mean else x

    def normal(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        r"""Applies :math:`W^{\top} W`."""
        return self.slices.each(self.W.normal, x)

    @cached_property
    @torch.no_grad()
    def normal_kernel(self) -> Tensor:
        """The kernel of an image, that of ``MultiConvOperator.normal_kernel``."""
        return self.W.normal_kernel()

    def normal_symbol(self, height: int, width: int) -> Tensor | None:
        r"""
        Returns the eigenvalues of :math:`W^{\top} W` with a circular boundary, ``(1, 1
        or D, H, W)``, for unknowns of this size; ``None`` for colour filters.
        """
        if len(self.normal_kernel) != 1:
            return None
        kernels = [self.normal_kernel] * self.slices.number
        return self.slices.symbol(kernels, height, width)

    def mask(self, x: Tensor, Wx: Tensor) -> Tensor:
        """Returns the masks of ``x``, shape of its filter responses ``Wx``."""
        if self.slices.mean:
            Wx = Wx / self._gain
        features = self.slices.unpack(Wx, self.W.out_channels)
        pairs = zip(self.slices.stacks(x), features, strict=True)
        return self.slices.pack([self.mask_function(*pair) for pair in pairs], len(x))

    def masks(self, mask: Tensor) -> list[Tensor]:
        """Returns the masks of every stack of slices, ``(n, N, h, w)``."""
        return self.slices.unpack(mask, self.W.out_channels)

    def value(self, Wx: Tensor, mask: Tensor) -> Tensor:
        r"""Returns :math:`\nu \|m \odot W x\|_1` of every sample, ``(B,)``."""
        return self.strength * inner(mask, Wx.abs())

    def quadratic(
        self, x: Tensor, squared_mask: Tensor
    ) -> AttentiveQuadratic | SlicedQuadratic:
        r"""
        Returns :math:`\tfrac12 \|m \odot W x\|_2^2` for given squared masks.

        :param torch.Tensor x: unknown; its values do not matter.
        :param torch.Tensor squared_mask: :math:`m^2`, shape of :meth:`analyse`.
        """
        roots = iter(self.masks(squared_mask.sqrt()))

        def fixed(_: int) -> AttentiveQuadratic:
            root = next(roots)
            return AttentiveQuadratic(self.W, lambda _: root)

        return sliced(fixed, x, self.slices)


@dataclass(frozen=True)
class AttentiveL1Equation(IterativeEquation):
    r"""
    The equation of a SAFI or MMR reconstruction, in an image and its dual variable.

    With :math:`H = A^{\top} A`, :math:`b = A^{\top} y`, the projection :math:`P` on the
    box and :math:`c = \lambda \nu \, m(x)`,

    .. math::
        F(x, w) = \begin{pmatrix}
        \tfrac{1}{t} \big( P(x - t (H x - b + W^{\top} w)) - x \big) \\
        P_{|\cdot| \leq c}(w + \tfrac{1}{t} W x) - w
        \end{pmatrix} = 0.

    If the mask is frozen, this is the optimality condition of a convex problem, whose
    solutions do not depend on the step :math:`t > 0`. The unknown of the solvers is the
    *pair* of :math:`x (B, C, H, W)` and :math:`w (B, C N, H, W)`, one after the other
    in a vector for each sample.

    :param DataTerm data: the data term.
    :param torch.Tensor lambda_reg: regularization weight per sample, ``(B,)``.
    :param AttentiveL1 regularizer: the regularizer.
    :param tuple bounds: the box, smallest and largest value, or ``None``.
    :param SolverOptions options: how the frozen problems are solved, by ``"admm"`` or,
        in denoising, by ``"fista"`` on the dual.
    """

    data: DataTerm
    lambda_reg: Tensor
    regularizer: AttentiveL1
    bounds: Bounds | None = (0.0, 1.0)
    options: SolverOptions = SolverOptions()

    #: Depth of Anderson acceleration that suits it.
    anderson: ClassVar[int] = 0

    def __post_init__(self) -> None:
        plain = self.data.identity and self.data.quadratic
        if self.options.method == "fista" and not plain:
            raise ValueError(
                "solver='fista' solves the dual of denoising problems with least "
                "squares only. Use 'admm' or 'auto' with this physics or data_fidelity."
            )

    @property
    def _channels_last(self) -> bool:
        """Whether the channels of a dual variable come last in a pair."""
        # As in filter responses, which would be rearranged again and again otherwise.
        b, slices = self.data.b, self.regularizer.slices
        return b.device.type == "cpu" and b.shape[1] == 1 and not slices.mean

    def pair(self, x: Tensor, w: Tensor) -> Tensor:
        """Joins image ``(B, C, H, W)`` and dual ``(B, C N, H, W)``: ``(B, n)``."""
        w = w.permute(0, 2, 3, 1) if self._channels_last else w
        return torch.cat([x.flatten(1), w.flatten(1)], 1)

    def unpair(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`pair`."""
        shape = self.data.b.shape
        number = shape[1:].numel()
        x, w = p[:, :number].view(len(p), *shape[1:]), p[:, number:]
        if self._channels_last:
            return x, w.view(len(p), *shape[2:], -1).permute(0, 3, 1, 2)
        return x, w.view(len(p), -1, *shape[2:])

    def image(self, p: Tensor) -> Tensor:
        """Returns the image of a pair."""
        return self.unpair(p)[0]

    def clamp(self, x: Tensor) -> Tensor:
        """Projects an image on the box."""
        return clamp(x, self.bounds)

    @cached_property
    def circulant(self) -> tuple[Tensor, Tensor]:
        """
        Eigenvalues of H, and the samples, ``(B,)``, for which it has them: for which it
        is a circular convolution, or masks the Fourier transform. The eigenvalues have
        the shape of the image's spectrum; those of other samples are their gain, or
        those of a similar operator.
        """
        with torch.no_grad():
            b, H = self.data.b, self.data.H
            gain, exact = expand(1 / self.data.step, b), self.data.circulant
            if H is None:
                return gain, exact
            # An image without room for a kernel of W has no spectrum to speak of.
            if min(b.shape[-2:]) < self.regularizer.normal_kernel.shape[-1]:
                return gain, torch.zeros_like(exact)
            if H.similar is not None:
                return H.similar, exact
            eigenvalues, _ = H.transfer
            return eigenvalues.where(expand(exact, eigenvalues), gain), exact

    @property
    def strength(self) -> Tensor:
        r""":math:`\lambda \nu`, ``(B,)``; for the mean of three, over its root."""
        return self.lambda_reg * self.regularizer.strength

    def bound(self, mask: Tensor) -> Tensor:
        r"""Returns :math:`c = \lambda \nu m`, shape of the mask."""
        return expand(self.strength, mask) * mask

    def residuals(
        self, x: Tensor, w: Tensor, Wx: Tensor, force: Tensor, bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""
        Returns both components of F for a given bound of the dual, from
        :math:`W x` and the force :math:`W^{\top} w`.
        """
        t = self.data.step

        def ascent(w: Tensor, Wx: Tensor, bound: Tensor) -> Tensor:
            return project_linf(w + Wx / expand(t, w), bound) - w

        first = projected_descent(x, self.data.force(x) - force, t, self.bounds)
        return first, in_parts(ascent, w, Wx, bound)

    def relative(self, *parts: Tensor) -> Tensor:
        """Returns the joint norm of some tensors relative to that of b, ``(B,)``."""
        return joint_norm(parts) / self.data.b_norm

    def __call__(self, p: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Returns F, shape of the pair ``p``; with the given mask instead of that of its
        image.
        """
        x, w = self.unpair(p)
        Wx = self.regularizer.analyse(x)
        if mask is None:
            mask = self.regularizer.mask(x, Wx)
        force = self.regularizer.adjoint(w)
        return self.pair(*self.residuals(x, w, Wx, force, self.bound(mask)))

    def mask(self, p: Tensor) -> Tensor:
        """Returns the masks of the image of a pair, to be given to a call."""
        x = self.image(p)
        return self.regularizer.mask(x, self.regularizer.analyse(x))

    def freeze(self, p: Tensor) -> FrozenL1:
        """
        Returns the convex problem with the mask, and the curvature of a likelihood,
        frozen at the image of ``p``.
        """
        return FrozenL1(self.frozen_data(p), p)

    def frozen_data(self, p: Tensor) -> AttentiveL1Equation:
        """Returns the equation with the least-squares term at the image of ``p``."""
        if self.data.quadratic:
            return self
        return replace(self, data=self.data.at(self.image(p)))

    @torch.no_grad()
    def start(self, x: Tensor | None, rtol: float | None = None) -> Tensor:
        """
        Returns the first pair: of an image, or if ``None`` of the problem whose mask is
        the same everywhere.

        :param torch.Tensor x: first image ``(B, C, H, W)`` or ``None``.
        :param float rtol: factor by which to reduce the residual of that problem;
            ``None``: what suits.
        """
        data = self.data
        if x is None and data.quadratic:
            first = self.clamp(expand(data.step, data.b) * data.b)
        else:
            first = self.clamp(data.start()) if x is None else x
        w = torch.zeros_like(self.regularizer.analyse(first))
        p = self.pair(first, w)
        if x is not None:
            return p
        everyone = torch.ones_like(data.step, dtype=torch.bool)
        mask = torch.full_like(w, self.regularizer.first_mask)
        uniform = FrozenL1(self.frozen_data(p), p, mask)
        if rtol is None:
            rtol = FIRST_DENOISING_FORCING if data.identity else FIRST_FORCING
        return uniform.solve(torch.full_like(data.step, rtol), everyone).x

    def smoothed(self, p: Tensor, smoothing: float) -> SmoothedL1Equation:
        """
        Returns the equation of the image whose derivative stands for that of a pair.

        :param torch.Tensor p: the pair.
        :param float smoothing: responses of the filters below this, relative to their
            root mean square, count as small.
        """
        with torch.no_grad():
            x, w = self.unpair(p)
            Wx = self.regularizer.analyse(x)
            delta = smoothing * Wx.square().flatten(1).mean(1).sqrt()
            # The responses of a flat image are rounding.
            pixel = self.data.b_norm / self.data.b[0].numel() ** 0.5
            delta = torch.maximum(delta, torch.finfo(delta.dtype).eps * pixel)
            bound = self.bound(self.regularizer.mask(x, Wx))
            sign = (w / bound.where(bound > 0, 1)).clamp(-1, 1)
        return SmoothedL1Equation(
            self.data,
            self.lambda_reg,
            self.regularizer,
            delta,
            sign,
            self.bounds,
            self.options,
        )

    def attach(
        self, unknown: Tensor, options: AdjointOptions, mask: Tensor | None = None
    ) -> Tensor:
        """
        Makes the image of a solution differentiable, by the derivative of the smoothed
        equation; see :class:`SmoothedL1Equation`. The dual variable has none.
        """
        x, w = self.unpair(unknown.detach())
        smoothed = self.smoothed(unknown, options.smoothing)
        return self.pair(smoothed.attach(x, options, mask), w)


class FrozenL1:
    r"""
    The convex problem of one update, started at a pair :math:`(x, w)`.

    ADMM splits :math:`z = W x` and, with a box, :math:`s = x`. The mask enters only the
    threshold, so the linear system :math:`H + \rho W^{\top} W + \rho_s I` is the same
    for all masks. It is solved roughly by conjugate gradients from the last image,
    preconditioned by the circulant operator that agrees with it away from the border.
    Where :math:`H` is a circular convolution, too, or masks the Fourier transform, and
    in denoising, one descent step will do unless the penalty is large.
    """

    def __init__(
        self, equation: AttentiveL1Equation, p: Tensor, mask: Tensor | None = None
    ):
        self.equation, self.p = equation, p
        self.x, self.w = equation.unpair(p)
        self.Wx = equation.regularizer.analyse(self.x)
        if mask is None:
            mask = equation.regularizer.mask(self.x, self.Wx)
        self.bound = equation.bound(mask)

    @cached_property
    def force(self) -> Tensor:
        r"""The force :math:`W^{\top} w`."""
        return self.equation.regularizer.adjoint(self.w)

    @cached_property
    def residual(self) -> Tensor:
        """Norm of F relative to b, shape ``(B,)``."""
        return self._measure(self.x, self.w, self.Wx, self.force)

    @cached_property
    def weight(self) -> Tensor:
        """Norm of the force relative to b, shape ``(B,)``."""
        return self.equation.relative(self.force).clamp_min(LEAST_FORCE)

    def _measure(self, x: Tensor, w: Tensor, Wx: Tensor, force: Tensor) -> Tensor:
        """Returns the relative norm of F at another pair, with the mask frozen."""
        equation = self.equation
        return equation.relative(*equation.residuals(x, w, Wx, force, self.bound))

    def gap(self, p: Tensor) -> Tensor:
        r"""
        Returns the duality gap of another pair in a denoising problem, ``(B,)``.

        The value of its image :math:`x` is at most this much above the minimum. With
        :math:`w' = P_{|\cdot| \leq c}(w)`, :math:`g = b - W^{\top} w'` and the dual's
        image :math:`x' = P(g)`, it is

        .. math::
            \big( \tfrac12 \|x - b\|^2 + \|c \odot W x\|_1 \big)
            - \big( \tfrac12 \|x' - b\|^2 + \langle w', W x' \rangle \big)
            = \langle c, |W x| \rangle - \langle w', W x \rangle
            + \tfrac12 \langle x - x', x + x' - 2 g \rangle,

        where no term of the last sums is negative, so that little is lost by rounding.

        :param torch.Tensor p: a pair whose image lies in the box.
        :raises ValueError: for other problems than denoising.
        """
        equation, W = self.equation, self.equation.regularizer
        if not equation.data.identity:
            raise ValueError("The duality gap is for denoising, without a physics.")
        x, w = equation.unpair(p)
        w, Wx = project_linf(w, self.bound), W.analyse(x)
        g = equation.data.b - W.adjoint(w)
        dual = equation.clamp(g)
        coefficients = (self.bound * Wx.abs() - w * Wx).flatten(1).sum(1)
        return coefficients + 0.5 * inner(x - dual, x + dual - 2 * g)

    @torch.no_grad()
    def solve(self, rtol: Tensor, active: Tensor) -> SolverResult:
        """
        Reduces the residual of the active samples by the factor ``rtol (B,)``, without
        gradients.
        """
        target = (rtol * self.residual).where(active, torch.inf)
        use_fista = self.equation.options.method == "fista"
        result = (self._dual_fista if use_fista else self._admm)(target)
        result.x = select(active, result.x, self.p)
        result.residual = result.residual / self.residual.where(self.residual != 0, 1)
        return result

    def _dual_fista(self, target: Tensor) -> SolverResult:
        r"""
        Accelerated projected gradients on the dual,
        :math:`w \leftarrow P_c(v + W x(v))` with :math:`x(v) = P(b - W^{\top} v)`.
        """
        equation, W = self.equation, self.equation.regularizer

        def image(w: Tensor) -> Tensor:
            return equation.clamp(equation.data.b - W.adjoint(w))

        def ascend(v: Tensor, _: tuple[Tensor, ...] = ()) -> Tensor:
            return project_linf(v + W.analyse(image(v)), self.bound)

        result = proximal_gradient(
            [ascend],
            [project_linf(self.w, self.bound)],
            restart=True,
            rtol=target,
            max_iter=equation.options.inner_max_iter,
            measure=lambda new, _: equation.relative(ascend(new[0]) - new[0]),
            check_every=CHECK_EVERY,
        )
        result.x = equation.pair(image(result.x), result.x)
        return result

    # -- ADMM --

    @cached_property
    def rho(self) -> tuple[Tensor, Tensor]:
        """Penalties of the two splits, ``(B,)``; the second is 0 without a box."""
        with torch.no_grad():
            equation, gain = self.equation, 1 / self.equation.data.step
            denoising = equation.data.identity
            threshold = DENOISING_THRESHOLD if denoising else THRESHOLD
            # Without regularization any positive penalty will do.
            rho = (equation.strength / threshold).where(equation.strength > 0, gain)
            if equation.bounds is None:
                return rho, torch.zeros_like(rho)
            return rho, gain if denoising else BOX_PENALTY * gain

    def _admm(self, target: Tensor) -> SolverResult:
        equation, bound = self.equation, self.bound

        def threshold(d: Tensor, bound: Tensor) -> Tensor:
            return soft_threshold(d, bound / expand(self.rho[0], d))

        prox = [
            LocalProx(threshold, (bound,)),
            projection(equation.bounds),
        ]

        # The dual tells the multipliers of both splits: at a solution, d = z + u and
        # the proximal map of d is z. ADMM wants z - u.
        def aim(Wx: Tensor, w: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
            d = Wx + w / expand(self.rho[0], w)
            z = threshold(d, bound)
            return z, z + (z - d)

        splits = [in_parts(aim, self.Wx, self.w, bound)]
        if equation.bounds is not None:
            rest = equation.data.force(self.x) - self.force
            d = self.x + rest / expand(self.rho[1], rest)
            inside = equation.clamp(d)
            splits.append((inside, inside + (inside - d)))

        def pair(state: ADMMState) -> tuple[Tensor, Tensor]:
            def dual(z: Tensor, target: Tensor) -> Tensor:
                return expand(self.rho[0], z) * (z - target)

            x = state.x if equation.bounds is None else state.z[1]
            return x, in_parts(dual, state.z[0], state.target[0])

        def measure(state: ADMMState, _old: ADMMState) -> Tensor:
            x, w = pair(state)
            W = equation.regularizer
            return self._measure(x, w, W.analyse(x), W.adjoint(w))

        m = len(splits)
        z, targets = tuple(s[0] for s in splits), tuple(s[1] for s in splits)
        start = ADMMState(self.x, z, targets, Kx=(self.Wx, self.x)[:m])
        result = self._split(equation.data.b, prox[:m], start, measure, target)
        result.x = equation.pair(*pair(result.state))
        return result

    def _split(
        self,
        rhs: Tensor,
        prox: Sequence[LocalProx],
        start: ADMMState,
        measure: Callable[[ADMMState, ADMMState], Tensor],
        target: Tensor,
    ) -> SolverResult:
        r"""Runs ADMM with the data term :math:`\tfrac12 x^T H x - x^T rhs`."""
        equation, W = self.equation, self.equation.regularizer
        n_splits, H = len(start.z), equation.data.fast_normal
        rho, rho_s = (expand(r, rhs) for r in self.rho)
        precondition = self._circulant_inverse()
        descend = self.rho[0] * equation.data.step <= LARGEST_DESCENT_PENALTY
        if precondition is None:
            descend = torch.zeros_like(descend)
        else:
            descend = descend & equation.circulant[1]
        # Asked once: every question makes a device wait.
        all_descend, none_descends = bool(descend.all()), not bool(descend.any())

        def A(v: Tensor) -> Tensor:
            return H(v) + rho * W.normal(v) + rho_s * v

        def by_conjugate_gradients(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            correction = conjugate_gradient(
                A,
                r,
                rtol=LINEAR_FORCING,
                max_iter=LINEAR_MAX_ITER,
                preconditioner=precondition,
                verify=False,
            )
            x = x + correction.x
            return x, W.analyse(x)

        def by_descent(x: Tensor, Wx: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            # The preconditioner is the inverse but for the border, and the length of
            # the step costs only the filter responses, needed anyway.
            assert precondition is not None
            p = precondition(r)
            Wp = W.analyse(p)
            gain = inner(p, H(p) + rho_s * p)
            gain = gain + self.rho[0] * norm(Wp).square()
            length = expand(inner(r, p) / gain.where(gain > 0, 1), x)
            # New memory for features takes longer than the arithmetic.
            return x + length * p, torch.addcmul(Wx, Wp, length, out=Wp)

        def solve_x(
            targets: tuple[Tensor, ...], x: Tensor, Kx: tuple[Tensor, ...]
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            misfit = in_parts(torch.sub, targets[0], Kx[0])
            r = rhs - H(x) + rho * W.adjoint(misfit)
            if n_splits > 1:
                r = r + rho_s * (targets[1] - x)
            if all_descend:
                x, Wx = by_descent(x, Kx[0], r)
            elif none_descends:
                x, Wx = by_conjugate_gradients(x, r)
            else:  # each sample goes the way it would go alone
                ways = zip(
                    by_descent(x, Kx[0], r), by_conjugate_gradients(x, r), strict=True
                )
                x, Wx = (select(descend, a, b) for a, b in ways)
            return x, (Wx, x)[:n_splits]

        return admm(
            solve_x,
            prox,
            start,
            rho=self.rho[:n_splits],
            relaxation=RELAXATION,
            rtol=target,
            max_iter=equation.options.inner_max_iter,
            measure=measure,
            check_every=CHECK_EVERY,
        )

    def _circulant_inverse(self) -> LinearMap | None:
        """The inverse of the linear system, were all operators circulant."""
        equation = self.equation
        least = equation.regularizer.normal_kernel.shape[-1]
        height, width = (max(n, least) for n in self.x.shape[-2:])
        symbol = equation.regularizer.normal_symbol(height, width)
        if symbol is None:
            return None
        data, _ = equation.circulant
        if equation.bounds is None:
            # At a border even images are seen that neither H nor an inner filter sees.
            data = data.clamp_min(expand(BOX_PENALTY / equation.data.step, data))
        rho, rho_s = (expand(r, self.x) for r in self.rho)
        inverse = 1 / (rho * symbol + rho_s + data)
        fourier = equation.data.fourier

        def apply(v: Tensor) -> Tensor:
            # Images smaller than a kernel have no room for it.
            padding = (0, width - v.shape[-1], 0, height - v.shape[-2])
            image = convolve(inverse, F.pad(v, padding), fourier)
            return image[..., : v.shape[-2], : v.shape[-1]]

        return apply
