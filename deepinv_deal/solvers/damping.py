"""Shorter steps where full ones overshoot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Steps that overshoot are shortened by the first factor, others lengthened by the
#: second, and none is shorter than the third.
DAMPING, RECOVERY, SHORTEST_STEP = 0.7, 1.02, 0.2

#: A residual that rises above so many times the least one is overshooting. With rough
#: inner solves it also fluctuates, which is no reason for short steps: when it was one,
#: SAFI did not converge in MRI.
OVERSHOOT = 2.0

#: After so many iterations without a new least residual, one that does not fall is
#: overshooting, too: the iterates may go round in a cycle.
PATIENCE = 15


@dataclass(frozen=True)
class Damping:
    r"""
    Fractions :math:`\omega` of full steps, one per sample.

    :param bool enabled: whether steps are shortened at all.
    """

    enabled: bool

    def init(self, residual: Tensor) -> Tensor:
        """Returns the fraction of the first step, 1, shape of ``residual``."""
        return torch.ones_like(residual)

    def update(
        self,
        omega: Tensor,
        before: Tensor,
        after: Tensor,
        least: Tensor,
        stale: Tensor,
        plain: Tensor,
    ) -> Tensor:
        """
        Returns the fraction of the next step.

        :param torch.Tensor omega: fraction of the last step, ``(B,)``.
        :param torch.Tensor before: residual before that step.
        :param torch.Tensor after: residual after it.
        :param torch.Tensor least: residual of the best iterate before it.
        :param torch.Tensor stale: iterations since the residual was last below that.
        :param torch.Tensor plain: samples that made it, without acceleration; a
            combination that raises the residual says nothing about steps.
        """
        rose = (after > before) & (after > OVERSHOOT * least)
        overshot = rose | ((after >= before) & (stale >= PATIENCE))
        shorter = self.enabled & plain & overshot
        omega = torch.where(shorter, DAMPING * omega, RECOVERY * omega)
        return omega.clamp(SHORTEST_STEP, 1.0)
