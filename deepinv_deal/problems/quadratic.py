r"""Attentive quadratic problems: regularizer, equation, and its linear systems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm, select
from deepinv_deal.operators import MultiConvOperator, Slices
from deepinv_deal.operators.blocks import BLOCK_BYTES, in_blocks
from deepinv_deal.operators.multi_conv import BlockedNormal, to_blocks
from deepinv_deal.problems.bounds import Bounds, clamp, projected_descent, projection
from deepinv_deal.problems.data_term import DataTerm
from deepinv_deal.problems.equation import IterativeEquation
from deepinv_deal.problems.grouped import GroupedQuadratic, energies
from deepinv_deal.problems.options import SolverOptions
from deepinv_deal.problems.preconditioning import Preconditioning
from deepinv_deal.solvers import (
    ADMMState,
    SolverResult,
    admm,
    conjugate_gradient,
)
from deepinv_deal.solvers.fixed_point import LEAST_FORCE, LinearProblem
from deepinv_deal.solvers.implicit import LinearSolve
from deepinv_deal.solvers.precision import tf32_convolutions

#: Imbalance of forces below which iterations are accelerated. Farther from the solution
#: that helps some problems and hurts others: valid blur would take twice the work.
NEAR = 0.02

#: The first image in denoising is the solution for this squared mask, the same for all
#: filters and pixels, to this accuracy or with so many iterations. From an image that
#: is too smooth the way is shorter than from a noisy one, whose noise has structure.
FIRST_SQUARED_MASK, FIRST_RTOL, FIRST_MAX_ITER = 0.35, 0.1, 30

#: Penalty of the split by which ADMM imposes bounds, relative to the data term, and
#: how much each of its linear solves reduces the residual.
BOUNDS_PENALTY, LINEAR_FORCING = 0.3, 0.1

#: Iterations of ADMM between two looks at the residual.
CHECK_EVERY = 3


@dataclass(frozen=True)
class AttentiveQuadratic:
    r"""
    An attentive quadratic regularizer for given weights and noise level.

    :math:`R_m(x) = \tfrac{1}{2} \|m \odot W x\|_2^2` with the mask
    :math:`m = M_\sigma(z)` frozen at an image :math:`z`. Images with more channels than
    the filters (real and imaginary part) are regularized channel by channel.

    :param MultiConvOperator W: the analysis operator, whose results are new tensors,
        which may be overwritten.
    :param Callable attention: maps images ``(B, C, H, W)`` to masks ``(B, N, H, W)``,
        one for every filter.
    :param int reach: rows that a pixel of the mask sees on each side, in an image that
        is continued by zeros in every layer. The mask of a large image is then
        evaluated in blocks. ``None``: at once, for masks that see more.
    :param torch.dtype dtype: precision in which :meth:`normal` computes; ``None``: that
        of its arguments.
    """

    W: MultiConvOperator
    attention: Callable[[Tensor], Tensor]
    reach: int | None = None
    dtype: torch.dtype | None = None

    def _split(self, x: Tensor) -> Tensor:
        """Moves independent image channels into the batch."""
        return x.reshape(-1, self.W.in_channels, *x.shape[2:])

    def mask(self, x: Tensor) -> Tensor:
        """Returns the masks of ``x (B, C, H, W)``, shape ``(B * parts, N, H, W)``."""
        return self._attend(self.attention, x)

    def squared_mask(self, x: Tensor) -> Tensor:
        """Returns their squares, without holding the masks of a large image too."""
        return self._attend(lambda split: self.attention(split).square(), x)

    def _attend(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = self._split(x)
        if self.reach is None:
            return function(x)
        return in_blocks(function, x, reach=self.reach, channels=self.W.out_channels)

    def analyse(self, x: Tensor) -> Tensor:
        """Returns the filter responses :math:`W x`, ``(B * parts, N, H, W)``."""
        return self.W(self._split(x))

    def adjoint(self, w: Tensor, like: Tensor) -> Tensor:
        r"""Applies :math:`W^{\top}`, the adjoint of :meth:`analyse` on ``like``."""
        return self.W.adjoint(w).reshape(like.shape)

    def value(self, x: Tensor, mask: Tensor) -> Tensor:
        r"""Returns :math:`\tfrac{1}{2} \|m \odot W x\|^2` of every sample, ``(B,)``."""
        u = mask * self.analyse(x)
        return 0.5 * inner(u, u).view(len(x), -1).sum(1)

    def masks(self, mask: Tensor) -> list[Tensor]:
        """Returns the masks of every stack of slices, ``(n, N, h, w)``: the mask."""
        return [mask]

    def to(self, dtype: torch.dtype) -> AttentiveQuadratic:
        """Returns it with filters in another precision, for masks as before."""
        return replace(self, W=self.W.to(dtype), dtype=dtype)

    # -- what preconditioners know of it -----------------------------------------

    @cached_property
    @torch.no_grad()
    def _correlations(self) -> Tensor:
        return self.W.correlations()

    def diagonal(self, squared_mask: Tensor, batch: int) -> Tensor:
        r"""
        Returns about the diagonal of :math:`W^{\top} m^2 W`, ``(B, C, H, W)``: a filter
        counts with its energy, and its mask is taken to be smooth.
        """
        energy = energies(self._correlations)
        # Not by a convolution, which would copy the masks of a large image.
        diagonal = torch.einsum("cn,bnhw->bchw", energy, squared_mask)
        return diagonal.reshape(batch, -1, *diagonal.shape[2:])

    def symbol(self, squared_mask: Tensor, batch: int) -> Tensor:
        r"""
        Returns the eigenvalues of :math:`W^{\top} m^2 W` for the mean masks of a sample
        and circular boundaries, ``(B, C, H, W)`` with the channels of one image.
        """
        kernels = self.mean_kernels(squared_mask, batch)
        return Slices().symbol([kernels], *squared_mask.shape[2:])

    def mean_kernels(self, squared_mask: Tensor, batch: int) -> Tensor:
        """Returns the kernels of these convolutions, ``(B, C, n, n)``."""
        mean = squared_mask.mean((2, 3)).view(batch, -1, squared_mask.shape[1]).mean(1)
        own = self._correlations.diagonal(dim1=0, dim2=1)  # (N, n, n, C)
        return torch.einsum("bf,fijc->bcij", mean, own)

    def grouped(self, squared_mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns about :meth:`normal`, much faster: a ``GroupedQuadratic``."""
        return self._of_images(GroupedQuadratic.of(squared_mask, self._correlations))

    def uniform(self, square: float, like: Tensor) -> Callable[[Tensor], Tensor]:
        r"""
        Returns about :math:`x \mapsto m^2 W^{\top} W x` for one number :math:`m^2`, by
        Fourier transforms; for images of the size of ``like``.
        """
        size = like.shape[2:]
        return self._of_images(
            GroupedQuadratic.uniform(square, self._correlations, *size)
        )

    def _of_images(self, R: GroupedQuadratic) -> Callable[[Tensor], Tensor]:
        """Returns a map of the images that the filters see as one of the unknown."""
        return lambda x: R(self._split(x)).reshape(x.shape)

    @cached_property
    def blocked(self) -> BlockedNormal | None:
        """The form of :meth:`normal` for accelerators; ``None`` where it is none."""
        if type(self.W) is not MultiConvOperator or not BlockedNormal.pays(
            self.W.kernels
        ):
            return None
        return BlockedNormal([kernel.detach() for kernel in self.W.kernels])

    def arranged(self, squared_mask: Tensor) -> ArrangedMask | Tensor:
        """Returns a squared mask in the form that :meth:`normal` takes fastest."""
        if self.blocked is None or squared_mask.shape[1] != self.W.out_channels:
            return squared_mask
        return ArrangedMask(to_blocks(squared_mask))

    def normal(self, x: Tensor, squared_mask: Tensor | ArrangedMask) -> Tensor:
        r"""Returns :math:`W^{\top} (m^2 \odot W x)`, the gradient at a frozen mask."""
        split, channels = self._split(x), self.W.out_channels
        split = split if self.dtype is None else split.to(self.dtype)
        blocked = self.blocked
        learned = any(kernel.requires_grad for kernel in self.W.kernels)
        if blocked is not None and learned and torch.is_grad_enabled():
            blocked = BlockedNormal(self.W.kernels)
        if isinstance(squared_mask, ArrangedMask):
            assert blocked is not None
            return blocked(split, squared_mask.blocks).reshape(x.shape).to(x.dtype)

        def normal(x: Tensor, squared_mask: Tensor) -> Tensor:
            if blocked is not None:
                return blocked(x, to_blocks(squared_mask))
            w = self.W(x)
            # New memory for large features takes about as long as the product.
            w = squared_mask * w if torch.is_grad_enabled() else w.mul_(squared_mask)
            return self.W.adjoint(w)

        squared_mask = squared_mask.expand(len(split), channels, *x.shape[2:])
        reach = 2 * self.W.reach
        return (
            in_blocks(normal, split, squared_mask, reach=reach, channels=channels)
            .reshape(x.shape)
            .to(x.dtype)
        )


@dataclass(frozen=True)
class ArrangedMask:
    """A squared mask in blocks of pixels, as :class:`BlockedNormal` takes it."""

    blocks: Tensor


@dataclass(frozen=True)
class SlicedQuadratic:
    r"""
    The mean of attentive quadratic regularizers of all three orientations of a volume.

    .. math::
        R_m(x) = \tfrac13 \sum_{o=1}^3 \tfrac12 \|m_o \odot W S_o x\|_2^2

    with the slices :math:`S_o x` of :class:`~deepinv_deal.operators.Slices`. It has the
    methods of :class:`AttentiveQuadratic`; masks are packed, ``(B, K, H, W)``.

    :param tuple parts: the regularizer of every orientation.
    :param Slices slices: the slices.
    """

    parts: tuple[AttentiveQuadratic, ...]
    slices: Slices

    @property
    def W(self) -> MultiConvOperator:  # noqa: N802 - as of its parts
        """The analysis operator of slices."""
        return self.parts[0].W

    def _each(self, x: Tensor) -> Iterator[tuple[AttentiveQuadratic, Tensor]]:
        return zip(self.parts, self.slices.stacks(x), strict=True)

    def mask(self, x: Tensor) -> Tensor:
        """Returns the masks of ``x (B, C, H, W)``, packed."""
        return self.slices.pack([R.mask(s) for R, s in self._each(x)], len(x))

    def squared_mask(self, x: Tensor) -> Tensor:
        """Returns their squares."""
        return self.slices.pack([R.squared_mask(s) for R, s in self._each(x)], len(x))

    def analyse(self, x: Tensor) -> Tensor:
        r"""Returns the filter responses :math:`W S_o x`, packed."""
        return self.slices.pack([R.analyse(s) for R, s in self._each(x)], len(x))

    def masks(self, mask: Tensor) -> list[Tensor]:
        """Returns the masks of every stack of slices, ``(n, N, h, w)``."""
        return self.slices.unpack(mask, self.W.out_channels)

    def value(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns the regularizer of every sample, ``(B,)``."""
        u = mask * self.analyse(x)
        return inner(u, u) / (2 * len(self.parts))

    def to(self, dtype: torch.dtype) -> SlicedQuadratic:
        """Returns it with filters in another precision, for masks as before."""
        return replace(self, parts=tuple(R.to(dtype) for R in self.parts))

    @property
    def dtype(self) -> torch.dtype | None:
        """Precision in which :meth:`normal` computes; ``None``: that of arguments."""
        return self.parts[0].dtype

    def arranged(self, squared_mask: Tensor) -> Tensor | tuple[Any, ...]:
        """Returns a squared mask in the form that :meth:`normal` takes fastest."""
        pairs = zip(self.parts, self.masks(squared_mask), strict=True)
        return tuple(R.arranged(mask) for R, mask in pairs)

    def normal(self, x: Tensor, squared_mask: Tensor | tuple[Any, ...]) -> Tensor:
        r"""
        Returns :math:`\tfrac13 \sum_o S_o^{\top} W^{\top} (m_o^2 \odot W S_o x)`.
        """
        if isinstance(squared_mask, Tensor):
            squared_mask = tuple(self.masks(squared_mask))
        forces = [
            R.normal(stack, mask)
            for (R, stack), mask in zip(self._each(x), squared_mask, strict=True)
        ]
        return self.slices.unknown(forces, len(x)) / len(self.parts)

    def diagonal(self, squared_mask: Tensor, batch: int) -> Tensor:
        """See :meth:`AttentiveQuadratic.diagonal`."""
        diagonals = [
            R.diagonal(mask, len(mask))
            for R, mask in zip(self.parts, self.masks(squared_mask), strict=True)
        ]
        return self.slices.unknown(diagonals, batch) / len(self.parts)

    def symbol(self, squared_mask: Tensor, batch: int) -> Tensor:
        """See :meth:`AttentiveQuadratic.symbol`: for Fourier transforms of volumes."""
        kernels = [
            R.mean_kernels(mask, batch)
            for R, mask in zip(self.parts, self.masks(squared_mask), strict=True)
        ]
        return self.slices.symbol(kernels, *squared_mask.shape[2:])

    def grouped(self, squared_mask: Tensor) -> Callable[[Tensor], Tensor]:
        """See :meth:`AttentiveQuadratic.grouped`."""
        pairs = zip(self.parts, self.masks(squared_mask), strict=True)
        return self._mean([R.grouped(mask) for R, mask in pairs])

    def uniform(self, square: float, like: Tensor) -> Callable[[Tensor], Tensor]:
        """See :meth:`AttentiveQuadratic.uniform`."""
        return self._mean([R.uniform(square, s) for R, s in self._each(like)])

    def _mean(
        self, parts: list[Callable[[Tensor], Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        """Returns the mean of maps of the slices of each orientation."""

        def apply(x: Tensor) -> Tensor:
            stacks = zip(parts, self.slices.stacks(x), strict=True)
            forces = [part(stack) for part, stack in stacks]
            return self.slices.unknown(forces, len(x)) / len(parts)

        return apply


def sliced(
    regularizer: Callable[[int], AttentiveQuadratic], x: Tensor, slices: Slices
) -> AttentiveQuadratic | SlicedQuadratic:
    """
    Returns a regularizer for unknowns like ``x``.

    :param Callable regularizer: ``regularizer(n)`` for ``n`` images per sample.
    :param torch.Tensor x: unknown ``(B, C, H, W)``; its values do not matter.
    :param Slices slices: the images that the filters see.
    """
    parts = tuple(regularizer(len(s) // len(x)) for s in slices.stacks(x))
    return SlicedQuadratic(parts, slices) if slices.mean else parts[0]


@dataclass(frozen=True)
class AttentiveEquation(IterativeEquation):
    r"""
    The equation of a reconstruction with an attentive quadratic regularizer.

    .. math::
        F(x) = b - H x - \lambda G(x) = 0, \qquad
        G(x) = W^{\top} \big( M_\sigma(x)^2 \odot W x \big), \quad
        H = A^{\top} A, \quad b = A^{\top} y

    (:footcite:t:`pourya2025dealing`, Eq. (8) at a fixed point). With the mask frozen it
    is a symmetric positive definite linear system, solved by conjugate gradients.

    An image is accurate if the forces of data and regularizer balance: the residual
    :math:`F(x)` is small against :math:`\lambda G(x)`. To compare it with :math:`b`, as
    is common for linear systems, would call the zero-filled image of an MRI scan
    accurate, since it fits the data.

    With bounds, :math:`P` the projection on them and :math:`t` the step of steepest
    descent of the data term, it is :math:`\tfrac1t (P(x + t F(x)) - x) = 0` instead,
    and the frozen problem a quadratic one with bounds.

    :param DataTerm data: the data term.
    :param torch.Tensor lambda_reg: regularization weight per sample, ``(B,)``.
    :param AttentiveQuadratic regularizer: regularizer at the model's noise level.
    :param tuple bounds: smallest and largest value of the unknown; ``None``: none.
    :param SolverOptions options: how the frozen problems are solved.
    """

    data: DataTerm
    lambda_reg: Tensor
    regularizer: AttentiveQuadratic | SlicedQuadratic
    bounds: Bounds | None = None
    options: SolverOptions = SolverOptions()

    @property
    def anderson(self) -> int:
        """Depth of Anderson acceleration that suits it."""
        return 5 if self.bounds is None else 0

    def force(
        self,
        x: Tensor,
        squared_mask: Any,
        regularizer: AttentiveQuadratic | SlicedQuadratic | None = None,
    ) -> Tensor:
        r"""
        Returns :math:`\lambda W^{\top} (m^2 \odot W x)`, shape of ``x``; with the given
        filters instead of the equation's.
        """
        regularizer = regularizer or self.regularizer
        return expand(self.lambda_reg, x) * regularizer.normal(x, squared_mask)

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Returns F(x), shape of ``x``; with the given mask instead of that of ``x``.
        """
        squares = self.regularizer.squared_mask(x) if mask is None else mask.square()
        return self.bounded(x, self.data.force(x) - self.force(x, squares))

    def bounded(self, x: Tensor, descent: Tensor) -> Tensor:
        """Returns the residual for a direction of descent: itself without bounds."""
        return projected_descent(x, descent, self.data.step, self.bounds)

    def mask(self, x: Tensor) -> Tensor:
        """Returns the masks of an iterate, to be given to a call."""
        return self.regularizer.mask(x)

    def start(self, x: Tensor | None) -> Tensor:
        """
        Returns the first iterate: the given image, else zero; in denoising about the
        solution for masks that are the same everywhere.
        """
        return clamp(self._first_image() if x is None else x, self.bounds)

    @torch.no_grad()
    def _first_image(self) -> Tensor:
        data = self.data
        if not (data.identity and data.quadratic):
            return data.start()
        regularizer = self.regularizer.uniform(FIRST_SQUARED_MASK, data.b)

        def A(v: Tensor) -> Tensor:
            return data.normal(v) + expand(self.lambda_reg, v) * regularizer(v)

        return conjugate_gradient(
            A, data.b, rtol=FIRST_RTOL, max_iter=FIRST_MAX_ITER, verify=False
        ).x

    def image(self, x: Tensor) -> Tensor:
        """Returns the image of an iterate: itself."""
        return x

    def freeze(self, x: Tensor) -> FrozenSystem | BoundedSystem:
        """Returns the problem with the mask frozen at ``x``."""
        system = FrozenSystem(self, x)
        return system if self.bounds is None else BoundedSystem(system)

    def adjoint_solver(self, x: Tensor) -> LinearSolve:
        """Returns a solver for the transposed Jacobian with the mask frozen."""
        # Not in the inner precision: nobody would correct what is lost there.
        with torch.no_grad():
            system = FrozenSystem(self, x, inner=False)
            if self.bounds is None:
                return system.correction
            return BoundedSystem(system).adjoint_correction

    def expanded(self, number: int) -> AttentiveEquation:
        """Returns the equation of one sample for ``number`` equal ones."""
        data, lambda_reg = self.data.expanded(number), self.lambda_reg.expand(number)
        return replace(self, data=data, lambda_reg=lambda_reg)

    @cached_property
    def inner_regularizer(self) -> AttentiveQuadratic | SlicedQuadratic:
        """The regularizer in the precision of the inner solves."""
        dtype = self.options.inner_dtype
        if not isinstance(dtype, torch.dtype):
            return self.regularizer
        return self.regularizer.to(dtype)

    @property
    def precise(self) -> AttentiveEquation:
        """The same equation, with inner solves in full precision."""
        return replace(self, options=replace(self.options, inner_dtype=None))

    @cached_property
    def preconditioning(self) -> Preconditioning:
        """What is known about preconditioners of this equation's systems."""
        choice, R = self.options.preconditioner, self.regularizer
        return Preconditioning(choice, self.data, self.lambda_reg, R)


class FrozenSystem(LinearProblem):
    """
    The linear system of one update, posed as a correction of the current image.

    :param AttentiveEquation equation: the equation.
    :param torch.Tensor x: image at which the mask is frozen.
    :param bool inner: apply :meth:`A` in the inner precision.
    """

    def __init__(self, equation: AttentiveEquation, x: Tensor, *, inner: bool = True):
        self.equation, self.x, self.inner = equation, x, inner
        self.squared_mask = equation.regularizer.squared_mask(x)
        self.curvature = equation.data.frozen(x)

    def H(self, v: Tensor) -> Tensor:
        """Applies the curvature of the data term."""
        if self.curvature is None:
            return self.equation.preconditioning.H(v)
        return self.curvature(v)

    def A(self, v: Tensor) -> Tensor:
        r"""Applies :math:`H + \lambda W^{\top} m^2 W`, in the inner precision."""
        regularizer, squared_mask = self.applied
        with tf32_convolutions(v.device) if self.in_tf32 else nullcontext():
            force = self.equation.force(v, squared_mask, regularizer)
        return self.H(v) + force

    @property
    def in_tf32(self) -> bool:
        """Whether the convolutions of :meth:`A` may round to 19 bits."""
        return self.inner and self.equation.options.inner_dtype == "tf32"

    @cached_property
    def applied(self) -> tuple[AttentiveQuadratic | SlicedQuadratic, Any]:
        """Regularizer and squared mask in the form in which they are applied."""
        equation, mask = self.equation, self.squared_mask
        regularizer = equation.inner_regularizer if self.inner else equation.regularizer
        mask = mask.to(regularizer.dtype or mask.dtype)
        # Large features are evaluated in blocks, which need the plain mask.
        small = mask[:1].numel() * mask.element_size() <= BLOCK_BYTES
        return regularizer, regularizer.arranged(mask) if small else mask

    @cached_property
    def force(self) -> Tensor:
        """The force of the regularizer on the image where it was frozen."""
        return self.equation.force(self.x, self.squared_mask)

    @cached_property
    def r(self) -> Tensor:  # type: ignore[override]  # only where it is asked for
        """The residual of the system at the image where it was frozen."""
        return self.data_force - self.force

    @cached_property
    def data_force(self) -> Tensor:
        """The force of the data on the image where the weights were frozen."""
        return self.equation.data.force(self.x)

    def data_force_at(self, x: Tensor) -> Tensor:
        """Returns the force of the frozen data term at another image."""
        if self.curvature is None:
            return self.equation.data.force(x)
        return self.data_force - self.curvature(x - self.x)

    @cached_property
    def residual(self) -> Tensor:  # type: ignore[override]  # likewise
        """Norm of the residual relative to the right-hand side, shape ``(B,)``."""
        return norm(self.r) / self.equation.data.b_norm

    @cached_property
    def weight(self) -> Tensor:
        """Residual that counts as 1, shape ``(B,)``: the norm of the force."""
        return self.force_norm

    @cached_property
    def force_norm(self) -> Tensor:
        """Norm of the force relative to the right-hand side, shape ``(B,)``."""
        return (norm(self.force) / self.equation.data.b_norm).clamp_min(LEAST_FORCE)

    @property
    def near(self) -> Tensor:
        """
        Samples whose iteration may be accelerated, ``(B,)``: in denoising all, else
        those whose imbalance is at most ``NEAR``.
        """
        # The systems of denoising are well conditioned, so a combination with a small
        # residual is near the solution. Elsewhere it may be far.
        if self.equation.data.identity and self.curvature is None:
            return super().near
        return self.residual <= NEAR * self.force_norm

    def correction(
        self, r: Tensor, rtol: Tensor, active: Tensor | None = None
    ) -> SolverResult:
        """
        Solves ``A d = r`` to the relative tolerance ``rtol (B,)``; where ``active``,
        the solve may try out a preconditioner.
        """
        limit = self.equation.options.inner_max_iter
        return self.equation.preconditioning.solve(
            self.A, r, rtol, limit, self.squared_mask, active, self.curvature
        )

    def correction_within(self, free: Tensor, v: Tensor, rtol: Tensor) -> SolverResult:
        r"""
        Solves :math:`(A D + \tfrac1t (I - D)) w = v`, where :math:`D` are the pixels
        that no bound holds: the transposed system of a problem with bounds.

        Conjugate gradients on :math:`D A D` find :math:`w` on :math:`D`, and the rest
        of it is :math:`t (v - A D w)`.

        :param torch.Tensor free: the pixels :math:`D`, boolean, shape of the image.
        :param torch.Tensor v: cotangent, shape of the image.
        :param torch.Tensor rtol: tolerance on the relative residual, ``(B,)``.
        """
        equation = self.equation
        result = equation.preconditioning.solve(
            lambda w: free * self.A(free * w),
            free * v,
            rtol,
            equation.options.inner_max_iter,
            self.squared_mask,
            curvature=self.curvature,
        )
        w, t = free * result.x, expand(equation.data.step, v)
        return replace(result, x=torch.where(free, w, t * (v - self.A(w))))


class BoundedSystem:
    r"""
    The quadratic problem of one update with bounds on the image.

    ADMM splits :math:`s = x`; its linear systems are those of :class:`FrozenSystem`
    plus a multiple of the identity.

    :param FrozenSystem system: the same without bounds.
    """

    def __init__(self, system: FrozenSystem):
        self.system, self.equation, self.x = system, system.equation, system.x
        self.squared_mask = system.squared_mask

    @cached_property
    def residual(self) -> Tensor:
        """Norm of the residual relative to the right-hand side, shape ``(B,)``."""
        return self._measure(self.x, self.system.r)

    @property
    def weight(self) -> Tensor:
        """Residual that counts as 1, shape ``(B,)``: the norm of the force."""
        return self.system.force_norm

    def _measure(self, x: Tensor, descent: Tensor) -> Tensor:
        return norm(self.equation.bounded(x, descent)) / self.equation.data.b_norm

    def solve(self, rtol: Tensor, active: Tensor) -> SolverResult:
        """Reduces the residual of the active samples by the factor ``rtol (B,)``."""
        equation, system = self.equation, self.system
        rho = BOUNDS_PENALTY / equation.data.step
        shift = expand(rho, self.x)

        def A(v: Tensor) -> Tensor:
            return system.A(v) + shift * v

        def solve_x(
            targets: tuple[Tensor, ...], x: Tensor, _: tuple[Tensor, ...]
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            # In full precision, whatever that of the inner operator.
            force = equation.force(x, self.squared_mask)
            r = system.data_force_at(x) - force + shift * (targets[0] - x)
            # The penalty makes the system so well conditioned that no preconditioner
            # is worth its time.
            step = conjugate_gradient(
                A,
                r,
                rtol=LINEAR_FORCING,
                max_iter=equation.options.inner_max_iter,
                verify=False,
            )
            return x + step.x, (x + step.x,)

        def measure(new: ADMMState, _old: ADMMState) -> Tensor:
            z = new.z[0]
            force = equation.force(z, self.squared_mask)
            return self._measure(z, system.data_force_at(z) - force)

        # At a solution the multiplier is the force that the bounds bear.
        d = self.x + system.r / shift
        prox = projection(equation.bounds)
        z = prox(d)
        result = admm(
            solve_x,
            [prox],
            ADMMState(self.x, (z,), (z + (z - d),), (self.x,)),
            rho=(rho,),
            rtol=(rtol * self.residual).where(active, torch.inf),
            max_iter=equation.options.inner_max_iter,
            measure=measure,
            check_every=CHECK_EVERY,
        )
        relative = result.residual / self.residual.where(self.residual != 0, 1)
        image = select(active, result.state.z[0], self.x)
        return replace(result, x=image, residual=relative)

    def adjoint_correction(self, v: Tensor, rtol: Tensor) -> SolverResult:
        r"""
        Solves :math:`-F_x^{\top} w = v` with the mask frozen, see
        :meth:`FrozenSystem.correction_within`.

        :param torch.Tensor v: cotangent, shape of the image.
        :param torch.Tensor rtol: tolerance on the relative residual, ``(B,)``.
        """
        t = expand(self.equation.data.step, v)
        target = self.x + t * self.system.r
        free = target == clamp(target, self.equation.bounds)
        return self.system.correction_within(free, v, rtol)
