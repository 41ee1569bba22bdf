"""One reconstruction problem, ready to be solved or examined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from deepinv_deal.problems.data_term import DataTerm


@dataclass(frozen=True)
class Problem:
    """
    What a model solves for given measurements, physics and hyperparameters.

    The unknown of the equation is real-valued and in the units of the model, about [0,
    1]; :meth:`image` and :meth:`~deepinv_deal.problems.DataTerm.unknown` translate.

    :param object equation: the equation that the reconstruction solves.
    :param torch.Tensor init: first image in the units of the model, ``(B, C, H, W)``;
        ``None``: the equation's own.
    :param torch.Tensor sigma: noise level of the model ``(B,)``, if it has one.
    :param torch.Tensor unit: by which the equation divides images to fit its weights to
        the noise level, ``(B,)``; ``None``: 1.
    """

    equation: Any
    init: Tensor | None = None
    sigma: Tensor | None = None
    unit: Tensor | None = None

    @property
    def data(self) -> DataTerm:
        """The data term."""
        return self.equation.data

    def start(self) -> Tensor:
        """Returns the first unknown."""
        return self.equation.start(self.init)

    def image(self, unknown: Tensor) -> Tensor:
        """Turns an unknown into an image of the physics."""
        return self.data.image(self.equation.image(unknown))

    @property
    def precise(self) -> Problem:
        """The same problem, with inner solves in full precision."""
        equation = getattr(self.equation, "precise", self.equation)
        return replace(self, equation=equation)
