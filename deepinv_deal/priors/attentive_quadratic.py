r"""The base of attentive quadratic priors."""

from __future__ import annotations

from typing import Any

import torch
from deepinv.optim.prior import Prior
from torch import Tensor

from deepinv_deal._batch import as_batch
from deepinv_deal.operators import Slices
from deepinv_deal.priors.config import Configurable
from deepinv_deal.problems.bounds import Bounds
from deepinv_deal.problems.checks import check_floating, per_sample
from deepinv_deal.problems.data_term import DataTerm, operator_term
from deepinv_deal.problems.options import DEFAULT_RTOL, SolverOptions
from deepinv_deal.problems.quadratic import (
    AttentiveEquation,
    AttentiveQuadratic,
    SlicedQuadratic,
    sliced,
)
from deepinv_deal.solvers import full_precision
from deepinv_deal.splines import LinearSpline

#: The learned weight is a spline of the noise level in gray levels 0..255; everything
#: public is in [0, 1].
GRAY_LEVELS = 255.0


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

    #: Settings of the solver that exist for it, see :class:`SolverOptions`.
    solver_settings: tuple[str, ...] = (
        "inner_max_iter",
        "forcing",
        "anderson",
        "preconditioner",
        "inner_dtype",
    )

    @staticmethod
    def methods(bounds: Bounds | None) -> tuple[str, ...]:
        """Returns the names of the methods that solve its frozen problems."""
        return ("cg",) if bounds is None else ("admm",)

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

    def bind(
        self, sigma: float | Tensor, x: Tensor, slices: Slices | None = None
    ) -> AttentiveQuadratic | SlicedQuadratic:
        """
        Fixes the current weights at the noise level ``sigma`` for images like ``x``.

        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :param torch.Tensor x: image batch ``(B, C, H, W)``; its values do not matter.
        :param Slices slices: the slices of a volume that is given as such a batch;
            ``None``: channels are images.
        """
        level, slices = as_batch(sigma, x), slices or Slices(self.in_channels)
        return sliced(
            lambda number: self.regularizer(level.repeat_interleave(number)), x, slices
        )

    def _bind_checked(
        self, sigma: float | Tensor, x: Tensor
    ) -> AttentiveQuadratic | SlicedQuadratic:
        """Does the same for arguments of a user."""
        check_floating("x", x)
        return self.bind(per_sample("sigma", sigma, x), x)

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

    @full_precision
    def mask(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """
        Returns the mask of an image.

        :param torch.Tensor x: images, shape ``(B, C, H, W)``, values about [0, 1].
        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :return: one mask per filter, shape ``(B, num_filters, H, W)``; with a gray
            prior and a two-channel image ``(B, 2 num_filters, H, W)``, those of the
            first channel first.
        """
        mask = self._bind_checked(sigma, x).mask(x)
        return mask.reshape(len(x), -1, *mask.shape[2:])

    @full_precision
    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Raises: no function has the fixed points as minimisers. See frozen_fn."""
        raise NotImplementedError(
            f"{type(self).__name__} has no energy: its mask depends on the image, and "
            "no function has its fixed points as minimisers. frozen_fn(x, z, sigma) "
            "evaluates the quadratic with the mask frozen at z."
        )

    @full_precision
    def frozen_fn(self, x: Tensor, z: Tensor, sigma: float | Tensor) -> Tensor:
        r"""
        Returns :math:`\tfrac12 \|M_\sigma(z) \odot W x\|^2` per sample, ``(B,)``.
        """
        bound = self._bind_checked(sigma, x)
        return bound.value(x, bound.mask(z))

    def equation(
        self,
        data: DataTerm,
        *,
        sigma: float | Tensor | None = None,
        lambda_reg: float | Tensor | None = None,
        bounds: Bounds | None = None,
        options: SolverOptions = SolverOptions(),  # noqa: B008 - immutable
    ) -> AttentiveEquation:
        """
        Returns the equation of a reconstruction with this prior.

        :param DataTerm data: the data term.
        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``.
        :param float, torch.Tensor lambda_reg: weight, one or ``(B,)``; ``None``: the
            learned denoising weight.
        :param tuple bounds: smallest and largest value of the image, or ``None``.
        :param SolverOptions options: how the frozen problems are solved.
        :raises ValueError: if the noise level is missing or a setting does not exist.
        """
        if sigma is None:
            raise ValueError(
                "sigma is missing: give the noise level of the prior, in [0, 1] units."
            )
        options.check(type(self).__name__, self.methods(bounds), self.solver_settings)
        if lambda_reg is None:
            weight = self.default_lambda(sigma, data.b)
        else:
            weight = as_batch(lambda_reg, data.b)
        regularizer = self.bind(sigma, data.b, data.slices)
        return AttentiveEquation(data, weight, regularizer, bounds, options)

    @full_precision
    def grad(
        self, x: Tensor, sigma: float | Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""
        Returns the field :math:`W^{\top}(M_\sigma(x)^2 \odot W x)`, shape of ``x``.
        """
        bound = self._bind_checked(sigma, x)
        return bound.normal(x, bound.squared_mask(x))

    @full_precision
    def prox(
        self,
        x: Tensor,
        sigma: float | Tensor,
        *args: Any,
        gamma: float | Tensor = 1.0,
        rtol: float = DEFAULT_RTOL,
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
        check_floating("x", x)
        options = SolverOptions(preconditioner="none")
        equation = self.equation(
            operator_term(x),
            sigma=per_sample("sigma", sigma, x),
            lambda_reg=per_sample("gamma", gamma, x),
            options=options,
        )
        z, result = equation.solve(torch.zeros_like(x), rtol=rtol, max_iter=max_iter)
        advice = "Raise max_iter or relax rtol."
        result.report(f"{type(self).__name__}.prox", rtol, advice)
        return z
