r"""The attentive quadratic regularizer of DEAL."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from deepinv.optim.prior import Prior
from torch import Tensor, nn
from torch.nn import functional as F

from deepinv_deal._batch import expand, inner, norm
from deepinv_deal.operators import MultiConv, MultiConvOperator
from deepinv_deal.operators.multi_conv import Normalization
from deepinv_deal.priors.preconditioning import Preconditioner, Preconditioning
from deepinv_deal.solvers import SolverResult, full_precision, solve_equation
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.fixed_point import LEAST_FORCE
from deepinv_deal.solvers.implicit import LinearSolve
from deepinv_deal.splines import BoundSpline, LinearSpline

#: The networks of DEAL count noise in gray levels 0..255, everything public in [0, 1].
GRAY_LEVELS = 255.0

#: Bounds of the mask, Eq. (10): the lower one keeps the linear systems well-posed.
MASK_MIN, MASK_MAX = 1e-2, 1.0


class MaskNetwork(nn.Module):
    r"""
    The attention network of DEAL (:footcite:t:`pourya2025dealing`, Eq. (9)).

    .. math::
        M_\sigma(x) = \phi_\sigma\big( V_2\, \varphi_2( |V_1\, \varphi_1(|W_M x|)| )
        \big), \qquad
        \phi_{\sigma,c}(t) = \mathrm{clip}\big(\varphi_3(\alpha_c(\sigma) |t|), 0.01,
        1\big), \quad \alpha_c(\sigma) = \frac{e^{s_c(\sigma)}}{\sigma + 10^{-5}},

    with :math:`W_M` a multi-convolution (zero mean, not normalised), :math:`V_i` 3x3
    convolutions, :math:`\varphi_i` linear splines of the absolute value (the first two
    increasing), :math:`s_c` one spline of the noise level per filter, and
    :math:`\sigma` in gray levels.

    :param tuple channels: channels of the multi-convolution, the last is the number of
        masks.
    """

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        n = channels[-1]
        self.W = MultiConv(channels, normalization="none")
        self.V = nn.ParameterList(_conv3x3(n) for _ in range(2))
        self.phi1 = LinearSpline(31, 0, 3, slope_min=0)
        self.phi2 = LinearSpline(31, 0, 3, slope_min=0)
        self.phi3 = LinearSpline(31, 0, 3, init=lambda t: torch.exp(-(t**2)))
        self.scaling = LinearSpline(
            14, -1, 51, num_splines=n, init=lambda t: torch.full_like(t, 3.0)
        )

    def bind(self, sigma: Tensor) -> BoundMask:
        """
        Fixes the current weights and the noise levels ``sigma (B,)`` (gray levels).
        """
        levels = sigma[:, None].expand(-1, len(self.scaling.coefficients))
        alpha = torch.exp(self.scaling(levels)) / (levels + 1e-5)
        return BoundMask(
            self.W.operator(),
            tuple(v.contiguous(memory_format=torch.channels_last) for v in self.V),
            (self.phi1.bind(), self.phi2.bind(), self.phi3.bind()),
            alpha[:, :, None, None],
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Returns the masks ``(B, N, H, W)`` of ``x (B, C, H, W)``, ``sigma (B,)``."""
        return self.bind(sigma)(x)


@dataclass(frozen=True)
class BoundMask:
    """The mask network for given tensors: a plain function of the image."""

    W: MultiConvOperator
    V: tuple[Tensor, Tensor]
    phi: tuple[BoundSpline, BoundSpline, BoundSpline]
    alpha: Tensor  # (B, N, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, H, W)
        """Returns the masks of ``x``."""
        t = self.phi[0](self.W(x).abs())
        t = self.phi[1](F.conv2d(t, self.V[0], padding=1).abs())
        t = F.conv2d(t, self.V[1], padding=1).abs()
        return self.phi[2](self.alpha * t).clamp(MASK_MIN, MASK_MAX)


@dataclass(frozen=True)
class AttentiveQuadratic:
    r"""
    DEAL's regularizer for given weights and noise level.

    :math:`R_m(x) = \tfrac{1}{2} \|m \odot W x\|_2^2` with the mask
    :math:`m = M_\sigma(z)` frozen at an image :math:`z`. Images with more channels than
    the filters (real and imaginary part) are regularized channel by channel.

    :param MultiConvOperator W: the analysis operator.
    :param BoundMask mask_network: the attention network at the given noise level.
    """

    W: MultiConvOperator
    mask_network: BoundMask

    def _split(self, x: Tensor) -> Tensor:
        """Moves independent image channels into the batch."""
        return x.reshape(-1, self.W.in_channels, *x.shape[2:])

    def mask(self, x: Tensor) -> Tensor:
        """Returns the masks of ``x (B, C, H, W)``, shape ``(B * parts, N, H, W)``."""
        return self.mask_network(self._split(x))

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

    def normal(self, x: Tensor, squared_mask: Tensor) -> Tensor:
        r"""Returns :math:`W^{\top} (m^2 \odot W x)`, the gradient at a frozen mask."""
        return self.adjoint(squared_mask * self.analyse(x), x)


@dataclass(frozen=True)
class AttentiveEquation:
    r"""
    The equation of a DEAL reconstruction.

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
    """

    H: LinearMap
    b: Tensor
    lambda_reg: Tensor
    regularizer: AttentiveQuadratic
    inner_max_iter: int = 1000
    preconditioner: Preconditioner = "none"

    def force(self, x: Tensor, squared_mask: Tensor) -> Tensor:
        r"""Returns :math:`\lambda W^{\top} (m^2 \odot W x)`, shape of ``x``."""
        return expand(self.lambda_reg, x) * self.regularizer.normal(x, squared_mask)

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Returns F(x), shape of ``x``; with the given mask instead of that of ``x``.
        """
        if mask is None:
            mask = self.mask(x)
        return self.b - self.H(x) - self.force(x, mask.square())

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
        with torch.no_grad():
            return FrozenSystem(self, x).correction

    @cached_property
    def preconditioning(self) -> Preconditioning:
        """What is known about preconditioners of this equation's systems."""
        return Preconditioning(
            self.preconditioner, self.H, self.b, self.lambda_reg, self.regularizer.W
        )


class FrozenSystem:
    """
    The linear system of one DEAL update, posed as a correction of the current image.
    """

    def __init__(self, equation: AttentiveEquation, x: Tensor):
        self.equation, self.x = equation, x
        self.squared_mask = equation.regularizer.mask(x).square()

    def A(self, v: Tensor) -> Tensor:
        r"""Applies :math:`H + \lambda W^{\top} m^2 W`."""
        return self.equation.H(v) + self.equation.force(v, self.squared_mask)

    @cached_property
    def force(self) -> Tensor:
        """The force of the regularizer on the image where it was frozen."""
        return self.equation.force(self.x, self.squared_mask)

    @cached_property
    def r(self) -> Tensor:
        """The residual of the system at the image where it was frozen."""
        return self.equation.b - self.equation.H(self.x) - self.force

    @cached_property
    def b_norm(self) -> Tensor:
        """Norm of the right-hand side, 1 where it is zero, shape ``(B,)``."""
        b_norm = norm(self.equation.b)
        return b_norm.where(b_norm != 0, 1)

    @cached_property
    def residual(self) -> Tensor:
        """Norm of the residual relative to the right-hand side, shape ``(B,)``."""
        return norm(self.r) / self.b_norm

    @cached_property
    def weight(self) -> Tensor:
        """Norm of the force relative to the right-hand side, shape ``(B,)``."""
        return (norm(self.force) / self.b_norm).clamp_min(LEAST_FORCE)

    def correction(
        self, r: Tensor, rtol: Tensor, active: Tensor | None = None
    ) -> SolverResult:
        """
        Solves ``A d = r`` to the relative tolerance ``rtol (B,)``; where ``active``,
        the solve may try out a preconditioner.
        """
        return self.equation.preconditioning.solver.solve(
            self.A,
            r,
            rtol,
            self.equation.inner_max_iter,
            lambda: self.equation.preconditioning.at(self.squared_mask),
            active,
        )

    def solve(self, rtol: Tensor, active: Tensor) -> SolverResult:
        """Reduces the residual of the active samples by the factor ``rtol (B,)``."""
        # A zero right-hand side costs a sample no iterations and changes nothing.
        step = self.correction(self.r * expand(active, self.r), rtol, active)
        step.x = self.x + step.x
        return step


class DEALPrior(Prior):
    r"""
    The learned regularizer of DEAL as a deepinv prior.

    For a mask :math:`m = M_\sigma(z)` frozen at an image :math:`z`, the regularizer is
    the quadratic :math:`\tfrac12 \|m \odot W x\|_2^2` (:footcite:t:`pourya2025dealing`,
    Eq. (4), with deepinv's factor 1/2 on both terms, so :math:`\lambda` is the
    paper's). Since the mask follows the image, the prior has **no explicit energy**:
    :meth:`grad` is the field

    .. math::
        G_\sigma(x) = W^{\top} \big( M_\sigma(x)^2 \odot W x \big),

    which is no gradient of a function, and :meth:`prox` is its resolvent. deepinv's
    gradient descent and proximal gradient descent run with it, and where they converge
    they solve DEAL's equation :math:`A^{\top}(A x - y) + \lambda G_\sigma(x) = 0`; the
    solver behind :class:`deepinv_deal.DEAL` reaches it with far fewer applications of
    :math:`W`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.priors import DEALPrior
    >>> prior = DEALPrior(in_channels=1, num_filters=8)
    >>> x = torch.rand(2, 1, 16, 17)
    >>> prior.mask(x, 0.1).shape, prior.grad(x, 0.1).shape
    (torch.Size([2, 8, 16, 17]), torch.Size([2, 1, 16, 17]))

    :param int in_channels: image channels the filters see, 1 (gray) or 3 (colour).
    :param int num_filters: number of filters (and masks) :math:`N_C`.
    :param str normalization: norm rule of :math:`W`, see
        :class:`deepinv_deal.operators.MultiConv`.
    """

    #: Whether the regularizer depends on a noise level.
    needs_sigma = True

    #: Whether its frozen problems are linear systems, which take a preconditioner.
    quadratic = True

    def __init__(
        self,
        in_channels: int = 1,
        num_filters: int = 128,
        normalization: Normalization = "published",
    ):
        super().__init__()
        self.explicit_prior = False
        self.in_channels, self.num_filters = in_channels, num_filters
        channels = (in_channels, 4 * in_channels, 8 * in_channels, num_filters)
        self.W = MultiConv(channels, normalization=normalization)
        self.mask_network = MaskNetwork(channels)
        self.kappa = LinearSpline(53, -1, 51)

    def bind(self, sigma: float | Tensor, x: Tensor) -> AttentiveQuadratic:
        """
        Fixes the current weights at the noise level ``sigma`` for images like ``x``.

        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :param torch.Tensor x: image batch ``(B, C, H, W)``; its values do not matter.
        """
        parts = x.shape[1] // self.in_channels
        levels = self._levels(sigma, x).repeat_interleave(parts)
        return AttentiveQuadratic(self.W.operator(), self.mask_network.bind(levels))

    def default_lambda(self, sigma: float | Tensor, x: Tensor) -> Tensor:
        r"""
        Returns the learned :math:`\lambda = \kappa(\sigma) \geq 0`, shape ``(B,)``.
        """
        # The spline is free; a negative weight would make the systems indefinite.
        return self.kappa(self._levels(sigma, x)[:, None])[:, 0].clamp_min(0)

    def _levels(self, sigma: float | Tensor, x: Tensor) -> Tensor:
        levels = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1)
        return GRAY_LEVELS * levels.expand(len(x))

    def splines(self) -> list[LinearSpline]:
        """Returns all learned splines, for the total-variation penalty of training."""
        return [m for m in self.modules() if isinstance(m, LinearSpline)]

    def mask(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """
        Returns the mask of an image.

        :param torch.Tensor x: images, shape ``(B, C, H, W)``, values about [0, 1].
        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :return: values in [0.01, 1], shape ``(B, num_filters, H, W)``; with a gray
            prior and a two-channel image ``(2 B, ...)``.
        """
        return self.bind(sigma, x).mask(x)

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Raises: DEAL minimises no function. See :meth:`frozen_fn`."""
        raise NotImplementedError(
            "DEALPrior has no energy: its mask depends on the image, and no function "
            "has "
            "its fixed points as minimisers. frozen_fn(x, z, sigma) evaluates the "
            "quadratic with the mask frozen at z."
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
            weight = torch.as_tensor(lambda_reg, dtype=b.dtype, device=b.device)
            weight = weight.reshape(-1).expand(len(b))
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
        return bound.normal(x, bound.mask(x).square())

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

        This is DEAL denoising of ``x`` with :math:`\lambda = \gamma`, differentiable by
        implicit differentiation. A :class:`ConvergenceWarning` tells if it did not
        converge.

        :param torch.Tensor x: images, shape ``(B, C, H, W)``.
        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :param float, torch.Tensor gamma: weight, one or ``(B,)``.
        :param float rtol: tolerance on the imbalance of forces, see
            :class:`AttentiveEquation`.
        :param int max_iter: largest number of outer iterations.
        """
        equation = self.equation(lambda v: v, x, sigma, gamma)
        z, result = solve_equation(
            equation, torch.zeros_like(x), rtol=rtol, max_iter=max_iter
        )
        advice = "Raise max_iter or relax rtol."
        result.report("DEALPrior.prox", rtol, advice, stacklevel=4)
        return z


def _conv3x3(n: int) -> nn.Parameter:
    weight = torch.empty(n, n, 3, 3)
    nn.init.kaiming_uniform_(weight, a=5**0.5)  # as torch.nn.Conv2d
    return nn.Parameter(weight)
