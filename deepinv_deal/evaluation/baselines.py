"""What DEAL is compared with: deepinv's total variation, and the adjoint."""

from __future__ import annotations

from typing import Any

import torch
from deepinv.models import Reconstructor
from deepinv.optim import FISTA, L2, Prior, TVPrior
from torch import Tensor

from deepinv_deal.tuning.validate import own_randomness


class Adjoint(Reconstructor):
    r"""The adjoint :math:`A^\top y`: the noisy image, the zero-filled MRI scan."""

    def forward(self, y: Any, physics: Any, **_: Any) -> Tensor:
        """
        Returns ``physics.A_adjoint(y)``, shape ``(B, C, H, W)``.

        :param torch.Tensor y: measurements.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        """
        return physics.A_adjoint(y)


class TotalVariation(Reconstructor):
    r"""
    Total variation, by deepinv's FISTA and its isotropic prior.

    The algorithm is that of :footcite:t:`beck2009fast`, the prior
    :class:`deepinv.optim.TVPrior`.

    .. math::
        \underset{x}{\arg\min} \; \tfrac12 \|A x - y\|_2^2
        + \lambda \, \mathrm{TV}(x)

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Denoising
    >>> from deepinv_deal.evaluation import TotalVariation
    >>> y = torch.rand(2, 1, 16, 17)
    >>> x_hat = TotalVariation()(y, Denoising(), lambda_reg=0.1)
    >>> x_hat.shape, bool(x_hat.var() < y.var())
    (torch.Size([2, 1, 16, 17]), True)

    :param int max_iter: largest number of iterations.
    :param bool real: the second of two channels, an imaginary part, is known to be
        zero, as with ``complex_mode="real"``.
    """

    def __init__(self, max_iter: int = 200, real: bool = False):
        super().__init__()
        self.max_iter, self.real = max_iter, real

    def forward(
        self, y: Any, physics: Any, lambda_reg: float | Tensor = 0.01, **_: Any
    ) -> Tensor:
        r"""
        Reconstructs.

        :param torch.Tensor y: measurements, in the units of the image.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        :param float lambda_reg: the weight :math:`\lambda`, absolute.
        :return: images ``(B, C, H, W)``, not clipped.
        """
        return self.solver(y, physics, lambda_reg)(y, physics)

    def solver(self, y: Any, physics: Any, lambda_reg: float | Tensor) -> FISTA:
        """
        Returns deepinv's algorithm, with its step, as it is called by the model.

        :param torch.Tensor y: measurements.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        :param float lambda_reg: the weight.
        """
        start = physics.A_adjoint(y)
        with own_randomness(physics, start.device, 0):  # it starts at a random image
            step = 1 / float(physics.compute_sqnorm(start, verbose=False))
        return FISTA(
            data_fidelity=L2(),
            prior=self.prior(),
            lambda_reg=float(lambda_reg),
            stepsize=step,
            max_iter=self.max_iter,
            early_stop=True,
            thres_conv=1e-4,
        )

    def prior(self) -> Prior:
        """Returns a new prior: deepinv's starts at the image it has seen last."""
        return _TV(self.real)


class _TV(TVPrior):
    """deepinv's total variation, of the real part on request."""

    def __init__(self, real: bool):
        super().__init__(def_crit=1e-5, n_it_max=300)
        self.real = real

    def prox(self, x: Tensor, *args: Any, gamma: Any = 1.0, **kwargs: Any) -> Tensor:
        if not self.real:
            return super().prox(x, *args, gamma=gamma, **kwargs)
        real = super().prox(x[:, :1], *args, gamma=gamma, **kwargs)
        return torch.cat([real, torch.zeros_like(real)], 1)
