"""How accurately inner problems are worth solving."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Factor by which the first inner solve reduces the residual, unless ``largest`` is
#: less.
FIRST_FORCING = 0.1

#: No later inner solve is asked to reduce the residual by a smaller factor, except
#: where ``largest`` is smaller.
LEAST_FORCING = 1e-3

#: Part of the tolerance that the last inner solve aims at. Half of it took up to a
#: third more applications on trained weights.
AIM = 0.9


@dataclass(frozen=True)
class Forcing:
    r"""
    Choice 1 of :footcite:t:`eisenstat1996choosing`, sample by sample.

    :param float largest: largest factor by which an inner solve reduces the residual.
    :param float rtol: tolerance of the outer iteration.
    """

    largest: float
    rtol: float

    def init(self, residual: Tensor) -> Tensor:
        """Returns the factor for the first inner solve, shape of ``residual``."""
        return torch.full_like(residual, min(FIRST_FORCING, self.largest))

    def update(self, before: Tensor, predicted: Tensor, after: Tensor) -> Tensor:
        """
        Returns the factor for the next inner solve: the better a frozen problem has
        predicted the nonlinear residual, the more accurately the next one is worth
        solving.

        :param torch.Tensor before: nonlinear residual before the step, ``(B,)``.
        :param torch.Tensor predicted: residual that the frozen problem had at the end.
        :param torch.Tensor after: nonlinear residual after the step.
        """
        # The safeguard of Eisenstat and Walker, by which the factor falls slowly, is
        # left out: it cost more than it saved on trained weights.
        mismatch = (after - predicted).abs() / before
        least = min(LEAST_FORCING, self.largest)
        return mismatch.nan_to_num(self.largest).clamp(least, self.largest)

    def factor(
        self, eta: Tensor, weighted: Tensor, gained: Tensor | None = None
    ) -> Tensor:
        """
        Returns the factor to ask of a solve: ``eta`` unless less accuracy is enough.

        :param torch.Tensor eta: from :meth:`init` or :meth:`update`, ``(B,)``.
        :param torch.Tensor weighted: residual that is compared with ``rtol``.
        :param torch.Tensor gained: by how much a better start has reduced the residual
            already; the solve need not gain that again. ``None``: not at all.
        """
        # No need to aim far below the final tolerance. The new weights change the
        # residual that the frozen problem predicts, hence a little below.
        enough = (AIM * self.rtol / weighted).nan_to_num(self.largest)
        if gained is not None:
            enough = enough * gained
        return torch.maximum(eta, enough).clamp(max=self.largest)
