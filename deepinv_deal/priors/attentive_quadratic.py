r"""Attentive quadratic regularizers: their equation and the base of their priors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from deepinv.optim.prior import Prior
from torch import Tensor

from deepinv_deal._batch import as_batch, expand, inner, norm
from deepinv_deal.operators import MultiConvOperator
from deepinv_deal.operators.row_blocks import in_row_blocks
from deepinv_deal.priors.config import Configurable
from deepinv_deal.priors.preconditioning import Preconditioner, Preconditioning
from deepinv_deal.solvers import (
    SolverResult,
    full_precision,
    solve_equation,
)
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.fixed_point import LEAST_FORCE, LinearProblem
from deepinv_deal.solvers.implicit import LinearSolve
from deepinv_deal.splines import LinearSpline

#: Imbalance of forces below which iterations are accelerated. Farther from the solution
#: that helps some problems and hurts others: valid blur would take twice the work.
NEAR = 0.02

#: The learned weight is a spline of the noise level in gray levels 0..255; everything
#: public is in [0, 1].
GRAY_LEVELS = 255.0


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
        evaluated in blocks of rows. ``None``: at once, for masks that see more.
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
        return in_row_blocks(
            function, x, reach=self.reach, channels=self.W.out_channels
        )

    def analyse(self, x: Tensor) -> Tensor:
        """Returns the filter responses :math:`W x`, ``(B * parts, N, H, W)``."""
        return self.W(self._split(x))

    def adjoint(self, w: Tensor, like: Tensor) -> Tensor:
        r"""Applies :math:`W^{\top}`, the adjoint of :meth:`analyse` on ``like``."""
        return self.W.adjoint(w).view_as(like)

    def value(self, x: Tensor, mask: Tensor) -> Tensor:
        r"""Returns :math:`\tfrac{1}{2} \|m \odot W x\|^2` of every sample, ``(B,)``."""
        u = mask * self.analyse(x)
        return 0.5 * inner(u, u).view(len(x), -1).sum(1)

    def to(self, dtype: torch.dtype) -> AttentiveQuadratic:
        """Returns it with filters in another precision, for masks as before."""
        return replace(self, W=self.W.to(dtype), dtype=dtype)

    def normal(self, x: Tensor, squared_mask: Tensor) -> Tensor:
        r"""Returns :math:`W^{\top} (m^2 \odot W x)`, the gradient at a frozen mask."""

        def normal(x: Tensor, squared_mask: Tensor) -> Tensor:
            w = self.W(x)
            # New memory for large features takes about as long as the product.
            w = squared_mask * w if torch.is_grad_enabled() else w.mul_(squared_mask)
            return self.W.adjoint(w)

        split, channels = self._split(x), self.W.out_channels
        split = split if self.dtype is None else split.to(self.dtype)
        squared_mask = squared_mask.expand(len(split), channels, *x.shape[2:])
        reach = 2 * self.W.reach
        return (
            in_row_blocks(normal, split, squared_mask, reach=reach, channels=channels)
            .view_as(x)
            .to(x.dtype)
        )


@dataclass(frozen=True)
class AttentiveEquation:
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

    :param Callable H: normal operator of the physics on images ``(B, C, H, W)``.
    :param torch.Tensor b: adjoint of the physics applied to the measurements.
    :param torch.Tensor lambda_reg: regularization weight per sample, ``(B,)``.
    :param AttentiveQuadratic regularizer: regularizer at the model's noise level.
    :param int inner_max_iter: largest number of conjugate gradient iterations per
        solve.
    :param str preconditioner: one of ``PRECONDITIONERS``.
    :param torch.dtype inner_dtype: precision of the convolutions in the inner solves of
        :meth:`freeze`, see :class:`deepinv_deal.DEAL`; ``None``: that of the weights.
    :param bool denoising: whether ``H`` is the identity; then iterations are
        accelerated from the first on.
    """

    H: LinearMap
    b: Tensor
    lambda_reg: Tensor
    regularizer: AttentiveQuadratic
    inner_max_iter: int = 1000
    preconditioner: Preconditioner = "none"
    inner_dtype: torch.dtype | None = None
    denoising: bool = False

    #: Depth of Anderson acceleration that suits it.
    anderson: ClassVar[int] = 5

    def force(
        self,
        x: Tensor,
        squared_mask: Tensor,
        regularizer: AttentiveQuadratic | None = None,
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
        return self.b - self.H(x) - self.force(x, squares)

    def mask(self, x: Tensor) -> Tensor:
        """Returns the masks of an iterate, to be given to a call."""
        return self.regularizer.mask(x)

    def start(self, x: Tensor | None) -> Tensor:
        """Returns the first iterate: the given image, zero if ``None``."""
        return torch.zeros_like(self.b) if x is None else x

    def image(self, x: Tensor) -> Tensor:
        """Returns the image of an iterate: itself."""
        return x

    def freeze(self, x: Tensor) -> FrozenSystem:
        """Returns the linear system with the mask frozen at ``x``."""
        return FrozenSystem(self, x)

    def adjoint_solver(self, x: Tensor) -> LinearSolve:
        """Returns conjugate gradients on the normal operator frozen at ``x``."""
        # Not in the inner precision: nobody would correct what is lost there.
        with torch.no_grad():
            return FrozenSystem(self, x, inner=False).correction

    @cached_property
    def inner_regularizer(self) -> AttentiveQuadratic:
        """The regularizer in the precision of the inner solves."""
        if self.inner_dtype is None:
            return self.regularizer
        return self.regularizer.to(self.inner_dtype)

    @property
    def precise(self) -> AttentiveEquation:
        """The same equation, with inner solves in full precision."""
        return self if self.inner_dtype is None else replace(self, inner_dtype=None)

    @cached_property
    def preconditioning(self) -> Preconditioning:
        """What is known about preconditioners of this equation's systems."""
        return Preconditioning(
            self.preconditioner, self.H, self.b, self.lambda_reg, self.regularizer.W
        )


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

    def A(self, v: Tensor) -> Tensor:
        r"""Applies :math:`H + \lambda W^{\top} m^2 W`, in the inner precision."""
        regularizer, squared_mask = self.applied
        force = self.equation.force(v, squared_mask, regularizer)
        return self.equation.preconditioning.H(v) + force

    @cached_property
    def applied(self) -> tuple[AttentiveQuadratic, Tensor]:
        """Regularizer and squared mask in the precision in which they are applied."""
        equation, mask = self.equation, self.squared_mask
        regularizer = equation.inner_regularizer if self.inner else equation.regularizer
        return regularizer, mask.to(regularizer.dtype or mask.dtype)

    @cached_property
    def force(self) -> Tensor:
        """The force of the regularizer on the image where it was frozen."""
        return self.equation.force(self.x, self.squared_mask)

    @cached_property
    def r(self) -> Tensor:  # type: ignore[override]  # only where it is asked for
        """The residual of the system at the image where it was frozen."""
        return self.equation.b - self.equation.H(self.x) - self.force

    @cached_property
    def b_norm(self) -> Tensor:
        """Norm of the right-hand side, 1 where it is zero, shape ``(B,)``."""
        b_norm = norm(self.equation.b)
        return b_norm.where(b_norm != 0, 1)

    @cached_property
    def residual(self) -> Tensor:  # type: ignore[override]  # likewise
        """Norm of the residual relative to the right-hand side, shape ``(B,)``."""
        return norm(self.r) / self.b_norm

    @cached_property
    def weight(self) -> Tensor:
        """Residual that counts as 1, shape ``(B,)``: the norm of the force."""
        return self.force_norm

    @cached_property
    def force_norm(self) -> Tensor:
        """Norm of the force relative to the right-hand side, shape ``(B,)``."""
        return (norm(self.force) / self.b_norm).clamp_min(LEAST_FORCE)

    @property
    def near(self) -> Tensor:
        """
        Samples whose iteration may be accelerated, ``(B,)``: in denoising all, else
        those whose imbalance is at most ``NEAR``.
        """
        # The systems of denoising are well conditioned, so a combination with a small
        # residual is near the solution. Elsewhere it may be far.
        if self.equation.denoising:
            return super().near
        return self.residual <= NEAR * self.force_norm

    def correction(
        self, r: Tensor, rtol: Tensor, active: Tensor | None = None
    ) -> SolverResult:
        """
        Solves ``A d = r`` to the relative tolerance ``rtol (B,)``; where ``active``,
        the solve may try out a preconditioner.
        """
        limit = self.equation.inner_max_iter
        return self.equation.preconditioning.solve(
            self.A, r, rtol, limit, self.squared_mask, active
        )


class AttentiveQuadraticPrior(Prior, Configurable):
    r"""
    Base class of quadratic regularizers whose weights follow the image.

    For a mask :math:`m = M_\sigma(z)` frozen at an image :math:`z`, the regularizer is
    the quadratic :math:`\tfrac12 \|m \odot W x\|_2^2`. Since the mask follows the
    image, the prior has **no explicit energy**: :meth:`grad` is the field

    .. math::
        G_\sigma(x) = W^{\top} \big( M_\sigma(x)^2 \odot W x \big),

    which is in general no gradient of a function, and :meth:`prox` is its resolvent.

    A subclass says what :math:`W` and :math:`M_\sigma` are, in :meth:`regularizer`; all
    else works unchanged: :class:`deepinv_deal.DEAL` and
    :class:`deepinv_deal.optim.FixedPointOptim` solve inverse problems with it, with
    implicit gradients, :class:`deepinv_deal.training.AttentiveQuadraticTrainer` trains
    it, and :func:`deepinv_deal.tune` finds its weight.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.operators import MultiConvOperator
    >>> from deepinv_deal.priors import AttentiveQuadratic, AttentiveQuadraticPrior
    >>> class EdgeStopping(AttentiveQuadraticPrior):
    ...     # Differences count less where they are larger than the noise.
    ...     def regularizer(self, sigma):
    ...         dx = torch.tensor([[0.0, 0, 0], [0, -1, 1], [0, 0, 0]])
    ...         W = MultiConvOperator([torch.stack([dx, dx.T])[:, None]])
    ...         c = 2 * sigma[:, None, None, None]
    ...         return AttentiveQuadratic(W, lambda x: 1 / (1 + (W(x) / c).square()))
    >>> model = DEAL(pretrained=None, prior=EdgeStopping())
    >>> model(torch.rand(1, 1, 16, 17), sigma=0.1, lambda_reg=2.0).shape
    torch.Size([1, 1, 16, 17])

    :param int in_channels: image channels the filters see, 1 (gray) or 3 (colour).
    """

    #: Whether the regularizer depends on a noise level.
    needs_sigma = True

    #: Whether its frozen problems are linear systems, which take a preconditioner.
    quadratic = True

    def __init__(self, in_channels: int = 1):
        super().__init__()
        self.explicit_prior = False
        self.in_channels = in_channels
        self.kappa = LinearSpline(53, -1, 51)

    def regularizer(self, sigma: Tensor) -> AttentiveQuadratic:
        """
        Returns the filters and the mask as functions, for the current weights.

        The mask should be positive: the linear systems are as well-posed as it is.

        :param torch.Tensor sigma: noise levels in [0, 1] units, ``(B,)``, one for every
            image that the functions will get.
        :raises NotImplementedError: in the base class.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define regularizer(sigma), which returns an "
            "AttentiveQuadratic."
        )

    def bind(self, sigma: float | Tensor, x: Tensor) -> AttentiveQuadratic:
        """
        Fixes the current weights at the noise level ``sigma`` for images like ``x``.

        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :param torch.Tensor x: image batch ``(B, C, H, W)``; its values do not matter.
        """
        parts = x.shape[1] // self.in_channels
        return self.regularizer(as_batch(sigma, x).repeat_interleave(parts))

    def default_lambda(self, sigma: float | Tensor, x: Tensor) -> Tensor:
        r"""
        Returns the learned :math:`\lambda = \kappa(\sigma) \geq 0`, shape ``(B,)``.
        """
        # The spline is free; a negative weight would make the systems indefinite.
        levels = GRAY_LEVELS * as_batch(sigma, x)
        return self.kappa(levels[:, None])[:, 0].clamp_min(0)

    def splines(self) -> list[LinearSpline]:
        """Returns all learned splines, for the total-variation penalty of training."""
        return [m for m in self.modules() if isinstance(m, LinearSpline)]

    def mask(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """
        Returns the mask of an image.

        :param torch.Tensor x: images, shape ``(B, C, H, W)``, values about [0, 1].
        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :return: one mask per filter, shape ``(B, num_filters, H, W)``; with a gray
            prior and a two-channel image ``(2 B, ...)``.
        """
        return self.bind(sigma, x).mask(x)

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Raises: no function has the fixed points as minimisers. See frozen_fn."""
        raise NotImplementedError(
            f"{type(self).__name__} has no energy: its mask depends on the image, and "
            "no function has its fixed points as minimisers. frozen_fn(x, z, sigma) "
            "evaluates the quadratic with the mask frozen at z."
        )

    def frozen_fn(self, x: Tensor, z: Tensor, sigma: float | Tensor) -> Tensor:
        r"""
        Returns :math:`\tfrac12 \|M_\sigma(z) \odot W x\|^2` per sample, ``(B,)``.
        """
        bound = self.bind(sigma, x)
        return bound.value(x, bound.mask(z))

    def equation(
        self,
        H: LinearMap,
        b: Tensor,
        sigma: float | Tensor,
        lambda_reg: float | Tensor | None = None,
        *,
        inner_max_iter: int = 1000,
        preconditioner: Preconditioner = "none",
    ) -> AttentiveEquation:
        """
        Returns the equation of a reconstruction with this prior.

        :param Callable H: normal operator of the data term, images to images.
        :param torch.Tensor b: its right-hand side, shape ``(B, C, H, W)``.
        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :param float, torch.Tensor lambda_reg: weight, one or ``(B,)``; ``None``: the
            learned denoising weight.
        :param int inner_max_iter: largest number of conjugate gradient iterations per
            solve.
        :param str preconditioner: ``"auto"``, ``"circulant"``, ``"diagonal"`` or
            ``"none"``.
        """
        if lambda_reg is None:
            weight = self.default_lambda(sigma, b)
        else:
            weight = as_batch(lambda_reg, b)
        return AttentiveEquation(
            H, b, weight, self.bind(sigma, b), inner_max_iter, preconditioner
        )

    def grad(
        self, x: Tensor, sigma: float | Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""
        Returns the field :math:`W^{\top}(M_\sigma(x)^2 \odot W x)`, shape of ``x``.
        """
        bound = self.bind(sigma, x)
        return bound.normal(x, bound.squared_mask(x))

    @full_precision
    def prox(
        self,
        x: Tensor,
        sigma: float | Tensor,
        *args: Any,
        gamma: float | Tensor = 1.0,
        rtol: float = 2e-2,
        max_iter: int = 100,
        **kwargs: Any,
    ) -> Tensor:
        r"""
        Returns the resolvent: :math:`z` with :math:`z + \gamma\, G_\sigma(z) = x`.

        This is denoising of ``x`` with :math:`\lambda = \gamma`, differentiable by
        implicit differentiation. A :class:`ConvergenceWarning` tells if it did not
        converge.

        :param torch.Tensor x: images, shape ``(B, C, H, W)``.
        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :param float, torch.Tensor gamma: weight, one or ``(B,)``.
        :param float rtol: tolerance on the imbalance of forces, see
            :class:`AttentiveEquation`.
        :param int max_iter: largest number of outer iterations.
        """
        equation = replace(self.equation(lambda v: v, x, sigma, gamma), denoising=True)
        z, result = solve_equation(
            equation, torch.zeros_like(x), rtol=rtol, max_iter=max_iter
        )
        advice = "Raise max_iter or relax rtol."
        result.report(f"{type(self).__name__}.prox", rtol, advice, stacklevel=4)
        return z
