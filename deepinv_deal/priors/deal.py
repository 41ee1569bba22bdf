r"""The attentive quadratic regularizer of DEAL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepinv_deal.operators import MultiConv, MultiConvOperator
from deepinv_deal.operators.multi_conv import Normalization
from deepinv_deal.priors.attentive_quadratic import (
    GRAY_LEVELS,
    AttentiveQuadraticPrior,
)
from deepinv_deal.problems.quadratic import AttentiveQuadratic
from deepinv_deal.splines import BoundSpline, LinearSpline

#: Bounds of the mask, Eq. (10): the lower one keeps the linear systems well-posed.
MASK_MIN, MASK_MAX = 1e-2, 1.0

#: Bound of the logarithm of the scaling, where all responses but zero are large.
LARGEST_EXPONENT = 30.0


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
        # Far beyond the levels of the training the spline is a straight line, and its
        # exponential would be infinite.
        exponent = self.scaling(levels).clamp(max=LARGEST_EXPONENT)
        alpha = torch.exp(exponent) / (levels + 1e-5)
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

    @property
    def reach(self) -> int:
        """Rows that a pixel of a mask sees on each side."""
        return self.W.reach + sum(v.shape[-1] // 2 for v in self.V)

    def __call__(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, H, W)
        """Returns the masks of ``x``."""
        t = self.phi[0].in_place(_abs(self.W(x)))
        t = self.phi[1].in_place(_abs(F.conv2d(t, self.V[0], padding=1)))
        t = _abs(F.conv2d(t, self.V[1], padding=1))
        overwrite = not torch.is_grad_enabled()
        t = t.mul_(self.alpha) if overwrite and t.dtype == x.dtype else self.alpha * t
        t = self.phi[2].in_place(t)
        return (torch.clamp_ if overwrite else torch.clamp)(t, MASK_MIN, MASK_MAX)


class DEALPrior(AttentiveQuadraticPrior):
    r"""
    The learned regularizer of DEAL as a deepinv prior.

    For a mask :math:`m = M_\sigma(z)` frozen at an image :math:`z`, the regularizer is
    the quadratic :math:`\tfrac12 \|m \odot W x\|_2^2` (:footcite:t:`pourya2025dealing`,
    Eq. (4), with deepinv's factor 1/2 on both terms, so :math:`\lambda` is the
    paper's). Since the mask follows the image, the prior has **no explicit energy**:
    ``grad`` is the field

    .. math::
        G_\sigma(x) = W^{\top} \big( M_\sigma(x)^2 \odot W x \big),

    which is no gradient of a function, and ``prox`` is its resolvent. deepinv's
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

    def __init__(
        self,
        in_channels: int = 1,
        num_filters: int = 128,
        normalization: Normalization = "published",
    ):
        super().__init__(in_channels)
        self.num_filters = num_filters
        channels = (in_channels, 4 * in_channels, 8 * in_channels, num_filters)
        self.W = MultiConv(channels, normalization=normalization)
        self.mask_network = MaskNetwork(channels)
        # Last, as ever: the state of an optimizer counts the parameters.
        kappa = self.kappa
        del self.kappa
        self.kappa = kappa

    @property
    def normalization(self) -> Normalization:
        """Norm rule of the filters."""
        return self.W.normalization

    def regularizer(self, sigma: Tensor) -> AttentiveQuadratic:
        """
        Returns the filters and the mask as functions, for the current weights.

        :param torch.Tensor sigma: noise levels in [0, 1] units, ``(B,)``.
        """
        levels = GRAY_LEVELS * sigma
        mask = self.mask_network.bind(levels)
        return AttentiveQuadratic(self.W.operator(), mask, mask.reach)


def _abs(features: Tensor) -> Tensor:
    """Overwrites features that nobody else has, unless gradients need them."""
    return features.abs() if torch.is_grad_enabled() else features.abs_()


def _conv3x3(n: int) -> nn.Parameter:
    weight = torch.empty(n, n, 3, 3)
    nn.init.kaiming_uniform_(weight, a=5**0.5)  # as torch.nn.Conv2d
    return nn.Parameter(weight)
