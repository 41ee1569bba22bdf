"""The attentive l1 regularizers SAFI and MMR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepinv.optim.prior import Prior
from torch import Tensor, nn
from torch.nn import functional as F

from deepinv_deal._batch import as_batch
from deepinv_deal.operators import MultiConv, Slices
from deepinv_deal.operators.multi_conv import Convolution
from deepinv_deal.priors.config import Configurable
from deepinv_deal.problems.bounds import Bounds
from deepinv_deal.problems.checks import check_floating, per_sample
from deepinv_deal.problems.data_term import DataTerm, operator_term
from deepinv_deal.problems.l1 import AttentiveL1, AttentiveL1Equation, MaskFunction
from deepinv_deal.problems.options import DEFAULT_RTOL, SolverOptions
from deepinv_deal.solvers import full_precision
from deepinv_deal.splines import BoundSpline, LinearSpline

#: Size of all kernels and number of knots of all splines, as published.
KERNEL_SIZE, NUM_KNOTS = 7, 21

#: First value of the learned regularization weight, as published.
INITIAL_LAMBDA = 1e-4


class AttentiveMask(nn.Module):
    r"""
    The mask network of SAFI.

    In :footcite:t:`pourya2024iteratively`, the mask of an image is

    .. math::
        m(x) = \mathrm{sigmoid}\big( s_3(V_3\, s_2(V_2\, s_1(V_1 x))) \big)

    with 7x7 convolutions :math:`V_i` and one linear spline per channel. The splines
    start at zero, so the first mask is constant 1/2.

    :param int num_filters: number of channels, one mask each.
    """

    def __init__(self, num_filters: int):
        super().__init__()
        self.V = nn.ParameterList()
        self.splines = nn.ModuleList()
        for c_in in (1, num_filters, num_filters):
            weight = torch.empty(num_filters, c_in, KERNEL_SIZE, KERNEL_SIZE)
            nn.init.kaiming_uniform_(weight, a=5**0.5)  # as torch.nn.Conv2d
            self.V.append(nn.Parameter(weight))
            self.splines.append(
                LinearSpline(
                    NUM_KNOTS, -1, 1, num_splines=num_filters, init=torch.zeros_like
                )
            )

    def bind(self) -> MaskFunction:
        """Fixes the current weights: a function of the image."""
        splines = [m.bind() for m in self.splines if isinstance(m, LinearSpline)]
        layers = list(zip(map(Convolution, self.V), splines, strict=True))

        def mask(x: Tensor, Wx: Tensor) -> Tensor:  # noqa: ARG001 - MMR's mask needs it
            for convolution, spline in layers:
                x = spline.in_place(convolution(x))
            return x.sigmoid() if torch.is_grad_enabled() else x.sigmoid_()

        return mask


class ConcavePotential(nn.Module):
    r"""
    The potential of MMR, and the mask that majorises it.

    In :footcite:t:`pourya2024iteratively`, responses :math:`u = W x` are penalised by

    .. math::
        \Psi(u) = \sum_c \big\langle 1, \psi_c( G_c |u_c| ) \big\rangle, \qquad
        \psi_c'(g) = \mathrm{clip}(s_c(a_c g), 0, 1), \quad \psi_c(0) = 0,

    with local averages :math:`G_c` (two 7x7 kernels of nonnegative entries with sum 1),
    scales :math:`a_c > 0` and non-increasing linear splines :math:`s_c` with
    :math:`s_c(0) = 1`. So :math:`\psi_c` is concave, and the linear functional of
    :math:`|u|` with weights

    .. math::
        m = G^{\top} \psi'( G |u| ) \in [0, 1]

    touches :math:`\Psi` at :math:`u` and lies above it elsewhere.

    :param int num_filters: number of channels :math:`c`.
    """

    def __init__(self, num_filters: int):
        super().__init__()
        self.G = nn.ParameterList()
        for _ in range(2):
            weight = torch.empty(num_filters, 1, KERNEL_SIZE, KERNEL_SIZE)
            nn.init.kaiming_uniform_(weight, a=5**0.5)  # as torch.nn.Conv2d
            self.G.append(nn.Parameter(weight))
        self.spline = LinearSpline(
            NUM_KNOTS,
            0,
            1,
            num_splines=num_filters,
            init=lambda t: (t == 0).to(t.dtype),
            slope_max=0.0,
            anchor=1.0,
        )
        self.scale = nn.Parameter(torch.ones(num_filters))

    def bind(self, nu: Tensor) -> BoundPotential:
        r"""
        Fixes the current weights.

        :param torch.Tensor nu: number by which filter responses were divided.
        """
        kernels = []
        for weight in self.G:
            total = weight.abs().sum((2, 3), keepdim=True)
            kernels.append(weight.abs() / total)
        return BoundPotential(
            (kernels[0], kernels[1]),
            self.spline.bind(),
            (nu * self.scale.abs()).view(1, -1, 1, 1),
            nu,
        )


@dataclass(frozen=True)
class BoundPotential:
    """The potential for given tensors: plain functions of filter responses."""

    kernels: tuple[Tensor, Tensor]
    spline: BoundSpline
    scale: Tensor  # (1, N, 1, 1)
    nu: Tensor

    def average(self, g: Tensor) -> Tensor:
        """Applies G."""
        for kernel in self.kernels:
            g = F.conv2d(g, kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
        return g

    def average_adjoint(self, g: Tensor) -> Tensor:
        r"""Applies :math:`G^{\top}`."""
        for kernel in reversed(self.kernels):
            flipped = kernel.flip(-2, -1)
            g = F.conv2d(g, flipped, padding=kernel.shape[-1] // 2, groups=len(kernel))
        return g

    def __call__(self, x: Tensor, Wx: Tensor) -> Tensor:  # noqa: ARG002 - as SAFI's
        """Returns the mask."""
        slopes = self.spline(self.scale * self.average(Wx.abs())).clamp(0, 1)
        return self.average_adjoint(slopes)

    def value(self, Wx: Tensor) -> Tensor:
        r"""Returns :math:`\Psi` of every sample, ``(B,)``."""
        # psi(g) = Psi(a g) / a with the integral Psi of the clipped spline; for a = 0
        # the limit is g.
        scale = self.scale.clamp_min(torch.finfo(Wx.dtype).eps)
        integral = self.spline.clipped_integral(scale * self.average(Wx.abs()))
        return (self.nu / scale * integral).flatten(1).sum(1)


class AttentiveL1Prior(Prior, Configurable):
    r"""
    Base class of l1 regularizers :math:`\|m(x) \odot W x\|_1` whose mask follows the
    image: what SAFI's and MMR's priors have in common.

    A subclass says what the mask is, in :meth:`bind_mask`, and how it is rescaled, in
    :meth:`stretch_mask`; all else works unchanged: :class:`deepinv_deal.SAFI` solves
    inverse problems with it, :class:`deepinv_deal.training.AttentiveL1Trainer` trains
    it. ``examples/own_attentive_l1.py`` is one.

    :param int num_filters: number of filters and masks.
    :param float sigma: noise level that the weights are trained for, in [0, 1] units.
    :raises ValueError: if ``sigma`` is not positive and finite.
    """

    #: Whether the regularizer depends on a noise level.
    needs_sigma = False

    #: Settings of the solver that exist for it, see :class:`SolverOptions`.
    solver_settings: tuple[str, ...] = ("inner_max_iter", "forcing")

    #: The mask, the same everywhere, with whose solution the iteration starts.
    first_mask: float = 1.0

    @staticmethod
    def methods(bounds: Bounds | None) -> tuple[str, ...]:  # noqa: ARG004 - with any
        """Returns the names of the methods that solve its frozen problems."""
        return ("admm", "fista")

    def __init__(self, num_filters: int, sigma: float = 25 / 255):
        super().__init__()
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma must be positive and finite, got {sigma}.")
        self.explicit_prior = False
        self.in_channels, self.num_filters = 1, num_filters
        self.register_buffer("sigma", torch.tensor(float(sigma)))
        self.W = MultiConv(
            (1, num_filters, num_filters),
            KERNEL_SIZE,
            normalization="none",
            zero_mean="every",
        )
        self.lambda_reg = nn.Parameter(torch.tensor(INITIAL_LAMBDA))

    def bind_mask(self, nu: Tensor) -> MaskFunction:
        r"""
        Fixes the weights of the mask: a function of an image and its filter responses.

        :param torch.Tensor nu: number by which the responses are divided.
        :return: ``mask(x, Wx)`` of images ``(B, 1, H, W)`` and responses :math:`W x /
            \nu`, values in [0, 1] of the shape of the latter.
        :raises NotImplementedError: in the base class.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define bind_mask(nu), which returns the mask "
            "as a function of an image and its filter responses."
        )

    def bind(self, slices: Slices | None = None) -> AttentiveL1:
        """
        Fixes the current weights: the regularizer as a function of tensors.

        :param Slices slices: the slices of volumes; ``None``: for images.
        """
        # The norm only balances the unknowns of the solver: no model depends on it.
        nu = self.W.sqnorm("exact").detach().sqrt()
        mask = self.bind_mask(nu)
        W = self.W.operator(nu)
        return AttentiveL1(W, nu, mask, slices or Slices(), self.first_mask)

    def default_lambda(self, sigma: float | Tensor | None, x: Tensor) -> Tensor:
        r"""
        Returns the learned :math:`\lambda \geq 0` for denoising, shape ``(B,)``.

        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``,
            to which the weights are rescaled; ``None``: the one that they serve.
        :param torch.Tensor x: image batch; its values do not matter.
        """
        learned = self.lambda_reg.clamp_min(0).expand(len(x))
        return learned if sigma is None else as_batch(sigma, x) / self.sigma * learned

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        r"""
        Makes weights for images of one scale those for images of another, in place.

        Afterwards, without a box, denoising :math:`a y` gives :math:`a` times what
        denoising :math:`y` gave before. So weights trained at a noise level are a start
        for those at :math:`a` times that level, and ``sigma`` becomes that.

        :param float factor: :math:`a > 0`.
        :raises ValueError: if the factor is not positive.
        """
        if not factor > 0:
            raise ValueError(f"factor must be positive, got {factor}.")
        self.lambda_reg.mul_(factor)
        self.sigma.mul_(factor)
        self.stretch_mask(factor)

    def stretch_mask(self, factor: float) -> None:
        """
        Gives ``factor`` times an image the mask that the image had, in place.

        :param float factor: the factor, positive.
        :raises NotImplementedError: in the base class.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define stretch_mask(factor) to serve another "
            "noise level."
        )

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Raises: no function has the fixed points as minimisers. See frozen_fn."""
        raise NotImplementedError(
            f"{type(self).__name__} has no energy: its mask depends on the image, and "
            "no function has its fixed points as minimisers. frozen_fn(x, z) evaluates "
            "the regularizer with the mask frozen at z; MMRPrior has an energy."
        )

    def splines(self) -> list[LinearSpline]:
        """Returns all learned splines."""
        return [m for m in self.modules() if isinstance(m, LinearSpline)]

    @full_precision
    def mask(self, x: Tensor) -> Tensor:
        """
        Returns the mask of an image.

        :param torch.Tensor x: images, shape ``(B, 1, H, W)``, values about [0, 1].
        :return: values in [0, 1], shape ``(B, num_filters, H, W)``; with two-channel
            images ``(B, 2 num_filters, H, W)``.
        """
        check_floating("x", x)
        bound = self.bind()
        return bound.mask(x, bound.analyse(x))

    @full_precision
    def frozen_fn(self, x: Tensor, z: Tensor) -> Tensor:
        r"""Returns :math:`\|m(z) \odot W x\|_1` per sample, ``(B,)``."""
        bound = self.bind()
        return bound.value(bound.analyse(x), bound.mask(z, bound.analyse(z)))

    @full_precision
    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        r"""
        Returns :math:`W^{\top} (m(x) \odot \mathrm{sign}(W x))`, shape of ``x``: a
        subgradient with the mask frozen.
        """
        check_floating("x", x)
        bound = self.bind()
        Wx = bound.analyse(x)
        return bound.strength * bound.adjoint(bound.mask(x, Wx) * Wx.sign())

    @full_precision
    def prox(
        self,
        x: Tensor,
        *args: Any,
        gamma: float | Tensor = 1.0,
        rtol: float = DEFAULT_RTOL,
        max_iter: int = 100,
        **kwargs: Any,
    ) -> Tensor:
        r"""
        Returns a fixed point :math:`z = \arg\min_u \tfrac12 \|u - x\|_2^2 + \gamma
        \|m(z) \odot W u\|_1`.

        This is denoising of ``x`` with :math:`\lambda = \gamma` and without a box,
        differentiable by implicit differentiation. A :class:`ConvergenceWarning` tells
        if it did not converge.

        :param torch.Tensor x: images, shape ``(B, 1, H, W)``.
        :param float, torch.Tensor gamma: :math:`\gamma`, one or ``(B,)``.
        :param float rtol: tolerance on the imbalance of forces.
        :param int max_iter: largest number of outer iterations.
        """
        check_floating("x", x)
        weight = per_sample("gamma", gamma, x)
        equation = self.equation(operator_term(x), lambda_reg=weight, bounds=None)
        with torch.no_grad():
            start = equation.start(None)
        p, result = equation.solve(start, rtol=rtol, max_iter=max_iter)
        what = f"{type(self).__name__}.prox"
        result.report(what, rtol, "Raise max_iter or relax rtol.")
        return equation.image(p)

    def equation(
        self,
        data: DataTerm,
        *,
        sigma: None = None,
        lambda_reg: float | Tensor | None = None,
        bounds: Bounds | None = (0.0, 1.0),
        options: SolverOptions = SolverOptions(),  # noqa: B008 - immutable
    ) -> AttentiveL1Equation:
        """
        Returns the equation of a reconstruction with this prior.

        :param DataTerm data: the data term.
        :param None sigma: the weights serve one noise level, see :meth:`rescale`.
        :param float, torch.Tensor lambda_reg: weight, one or ``(B,)``; ``None``: the
            learned one, for denoising.
        :param tuple bounds: smallest and largest value of the image, or ``None``.
        :param SolverOptions options: how the frozen problems are solved.
        :raises ValueError: for a noise level, or a setting that does not exist.
        """
        name = type(self).__name__
        if sigma is not None:
            raise ValueError(
                f"{name} serves one noise level, that of its weights: leave sigma out, "
                f"got {sigma!r}."
            )
        options.check(name, self.methods(bounds), self.solver_settings)
        if lambda_reg is None:
            weight = self.default_lambda(None, data.b)
        else:
            weight = as_batch(lambda_reg, data.b)
        return AttentiveL1Equation(
            data, weight, self.bind(data.slices), bounds, options
        )


class SAFIPrior(AttentiveL1Prior):
    r"""
    The learned regularizer of SAFI as a deepinv prior.

    For a mask :math:`m(z) \in (0, 1)` frozen at an image :math:`z`, the regularizer is
    :math:`\|m(z) \odot W x\|_1` with a multi-convolution :math:`W` of two 7x7 layers
    whose kernels all have zero mean, and the mask network :class:`AttentiveMask`
    (:footcite:t:`pourya2024iteratively`). Since the mask follows the image, there is
    **no explicit energy**.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.priors import SAFIPrior
    >>> prior = SAFIPrior(num_filters=8)
    >>> x = torch.rand(2, 1, 16, 17)
    >>> prior.mask(x).shape, prior.grad(x).shape
    (torch.Size([2, 8, 16, 17]), torch.Size([2, 1, 16, 17]))

    :param int num_filters: number of filters and masks.
    :param float sigma: noise level that the weights are trained for, in [0, 1] units.
    """

    #: That of a new mask network: its splines start at zero.
    first_mask = 0.5

    def __init__(self, num_filters: int = 64, sigma: float = 25 / 255):
        super().__init__(num_filters, sigma)
        self.mask_network = AttentiveMask(num_filters)

    def bind_mask(self, nu: Tensor) -> MaskFunction:  # noqa: ARG002 - the mask sees x
        """Fixes the weights of the mask network."""
        return self.mask_network.bind()

    def stretch_mask(self, factor: float) -> None:
        """Gives ``factor`` times an image the mask that the image had, in place."""
        self.mask_network.V[0].div_(factor)


class MMRPrior(AttentiveL1Prior):
    r"""
    The learned regularizer of MMR, the special case of SAFI with an energy.

    .. math::
        R(x) = \sum_c \big\langle 1, \psi_c( G_c |W_c x| ) \big\rangle

    with the same filters as :class:`SAFIPrior` and the concave potential
    :class:`ConcavePotential` (:footcite:t:`pourya2024iteratively`). The mask
    :math:`m = G^{\top} \psi'(G |W x|)` makes :math:`\|m \odot W \cdot\|_1` a majoriser
    of :math:`R` up to a constant, so each update lowers the energy.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.priors import MMRPrior
    >>> prior = MMRPrior(num_filters=8)
    >>> x = torch.rand(2, 1, 16, 17)
    >>> prior(x).shape, bool((prior(x) >= prior.frozen_fn(x, x)).all())
    (torch.Size([2]), True)

    :param int num_filters: number of filters and masks.
    :param float sigma: noise level that the weights are trained for, in [0, 1] units.
    """

    def __init__(self, num_filters: int = 64, sigma: float = 25 / 255):
        super().__init__(num_filters, sigma)
        self.explicit_prior = True
        self.potential = ConcavePotential(num_filters)

    def bind_mask(self, nu: Tensor) -> BoundPotential:
        """Fixes the weights of the potential."""
        return self.potential.bind(nu)

    def stretch_mask(self, factor: float) -> None:
        """Gives ``factor`` times an image the mask that the image had, in place."""
        self.potential.scale.div_(factor)

    @full_precision
    def fn(
        self, x: Tensor, *args: Any, slices: Slices | None = None, **kwargs: Any
    ) -> Tensor:
        """
        Returns R(x) of every sample, ``(B,)``, by exact integration of the splines.

        :param torch.Tensor x: images, shape ``(B, 1, H, W)``.
        :param Slices slices: the slices of volumes; ``None``: channels are images.
        """
        bound, slices = self.bind(), slices or Slices()
        potential = self.bind_mask(bound.nu)
        values = [potential.value(bound.W(stack)) for stack in slices.stacks(x)]
        each = torch.stack([v.view(len(x), -1).sum(1) for v in values])
        return each.sum(0) / slices.number
