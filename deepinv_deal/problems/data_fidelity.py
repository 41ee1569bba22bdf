"""Data fidelities that deepinv does not have, in its style."""

from __future__ import annotations

import math
from typing import Any

from deepinv.optim import DataFidelity
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal.problems.likelihood import Correlated, Gaussian, SmoothedAbsolute
from deepinv_deal.problems.measurements import whitening

#: Residuals below this, for images in [0, 1], count as least squares in the L1 norm.
DEFAULT_DELTA = 0.01


class WeightedL2(DataFidelity):
    r"""
    Least squares with a weight for every measurement, in deepinv's style.

    .. math::
        \tfrac12 \sum_i w_i \, |(A x)_i - y_i|^2, \qquad w_i \geq 0,

    the likelihood of Gaussian noise of variance :math:`1 / w_i`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.optim import WeightedL2
    >>> fidelity = WeightedL2(torch.tensor([[1.0, 4.0]]))
    >>> fidelity.d(torch.ones(1, 2), torch.zeros(1, 2))
    tensor([2.5000])

    :param torch.Tensor weights: weights that expand to the measurements; one dimension
        is that of the samples. For several measurements a ``TensorList``.
    """

    def __init__(self, weights: Tensor | TensorList):
        super().__init__(d=self._distance)
        self.weights = weights

    def _distance(self, u: Any, y: Any, *_: Any, **__: Any) -> Tensor:
        return Gaussian(self.weights).value(u, y)


class SmoothedL1(DataFidelity):
    r"""
    The :math:`\ell_1` norm of the misfit, made smooth (Huber), in deepinv's style.

    .. math::
        \sum_i h\big((A x)_i - y_i\big), \qquad h(r) = \begin{cases}
        \tfrac{r^2}{2 \delta} + \tfrac{\delta}{2}, & |r| \leq \delta \\
        |r|, & \text{else} \end{cases}

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.optim import SmoothedL1
    >>> SmoothedL1(0.5).d(torch.tensor([[2.0, 0.5]]), torch.zeros(1, 2))
    tensor([2.5000])

    :param float delta: misfit below which the term is quadratic.
    """

    def __init__(self, delta: float = DEFAULT_DELTA):
        if not 0 < delta < math.inf:
            raise ValueError(f"delta must be positive and finite, got {delta}.")
        self.delta = delta
        super().__init__(d=self._distance)

    def _distance(self, u: Any, y: Any, *_: Any, **__: Any) -> Tensor:
        return SmoothedAbsolute(self.delta).value(u, y)


class CorrelatedL2(DataFidelity):
    r"""
    Least squares for noise that is correlated between channels, in deepinv's style.

    .. math::
        \tfrac12 \sum_i r_i^H \Psi^{-1} r_i, \qquad r = A x - y,

    where :math:`r_i` holds the values of all channels (coils of a scanner, bands of a
    camera) at one place and :math:`\Psi` is the covariance of their noise, as measured
    by a scan without signal. The choice of the unit of :math:`\Psi` changes the weight
    of the regularizer only.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.optim import CorrelatedL2
    >>> fidelity = CorrelatedL2(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), dim=1)
    >>> fidelity.d(torch.ones(1, 2, 3), torch.zeros(1, 2, 3)).round(decimals=4)
    tensor([1.])

    :param torch.Tensor covariance: :math:`\Psi`, ``(N, N)``, symmetric or Hermitian
        and positive definite. A complex one mixes real and imaginary parts of real
        measurements ``(B, 2, ...)``, as deepinv's MRI has them.
    :param int dim: dimension of the measurements with the N channels: 2 for the coils
        of :class:`deepinv.physics.MultiCoilMRI`.
    :raises ValueError: if the covariance is no such matrix.
    """

    def __init__(self, covariance: Tensor, dim: int = 1):
        self.covariance, self.dim = covariance, dim
        whitening(covariance)
        super().__init__(d=self._distance)

    def _distance(self, u: Any, y: Any, *_: Any, **__: Any) -> Tensor:
        return Correlated(self.covariance, self.dim).value(u, y)
