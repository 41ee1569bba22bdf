"""The best iterate so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepinv_deal._batch import select


class Best(NamedTuple):
    """
    The iterate with the smallest weighted residual, sample by sample.

    :param torch.Tensor x: image, ``(B, ...)``.
    :param torch.Tensor residual: its residual, ``(B,)``.
    :param torch.Tensor weighted: the residual by which iterates are compared.
    """

    x: Tensor
    residual: Tensor
    weighted: Tensor

    @classmethod
    def init(cls, x: Tensor, residual: Tensor) -> Best:
        """Returns the start, which every finite residual improves on."""
        infinite = torch.full_like(residual, torch.inf)
        return cls(x, infinite, infinite)

    def update(
        self, x: Tensor, residual: Tensor, weighted: Tensor, active: Tensor
    ) -> Best:
        """Takes over the ``active`` samples of another iterate that are better."""
        better = active & (weighted < self.weighted)
        return Best(
            select(better, x, self.x),
            residual.where(better, self.residual),
            weighted.where(better, self.weighted),
        )
