"""Shorter steps where full ones overshoot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Steps are shortened by the first factor when the residual rises, and lengthened by
#: the second otherwise, but no shorter than the third.
DAMPING, RECOVERY, SHORT_STEP = 0.7, 1.2, 0.6

#: Where they turn back, they are lengthened slowly, and may become shorter.
SLOW_RECOVERY, SHORTEST_STEP = 1.05, 0.2

#: Cosine between two steps below which the second turns back.
TURNED = -0.5


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
        turned: Tensor,
        plain: Tensor,
    ) -> Tensor:
        """
        Returns the fraction of the next step.

        :param torch.Tensor omega: fraction of the last step, ``(B,)``.
        :param torch.Tensor before: residual before that step.
        :param torch.Tensor after: residual after it.
        :param torch.Tensor turned: cosine between that step and the one before.
        :param torch.Tensor plain: samples that made it, without acceleration; a
            combination that raises the residual says nothing about steps.
        """
        # Overshooting shows as steps that go back and forth. A rise alone may come from
        # rough inner solves, and shortening for long would slow down.
        turns_back = turned < TURNED
        least = omega.clamp(max=SHORT_STEP).where(~turns_back, SHORTEST_STEP)
        shorter = torch.maximum(DAMPING * omega, least)
        longer = omega * torch.where(turns_back, SLOW_RECOVERY, RECOVERY)
        rises = after >= before
        omega = shorter.where(self.enabled & plain & rises, longer)
        return omega.clamp(max=1.0)
