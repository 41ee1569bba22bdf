"""One reconstruction problem, ready to be solved or examined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.models.image_operator import ImageOperator, check_image
from deepinv_deal.priors import AttentiveEquation, AttentiveL1Equation

AnyEquation = TypeVar("AnyEquation", AttentiveEquation, AttentiveL1Equation)


@dataclass(frozen=True)
class Problem(Generic[AnyEquation]):
    """
    What a model solves for given measurements, physics and hyperparameters.

    The unknown of the equation is real-valued and in the units of the model, about [0,
    1]; :meth:`image` and :meth:`unknown` translate.

    :param ImageOperator operator: the checked physics.
    :param torch.Tensor scale: intensity by which data were divided, ``(B,)``.
    :param object equation: the equation that the reconstruction solves.
    :param torch.Tensor init: first unknown ``(B, C, H, W)``; ``None``: the equation's.
    :param torch.Tensor sigma: noise level of the model ``(B,)``, if it has one.
    """

    operator: ImageOperator
    scale: Tensor
    equation: AnyEquation
    init: Tensor | None = None
    sigma: Tensor | None = None

    def image(self, x: Tensor) -> Tensor:
        """Turns an unknown into an image of the physics."""
        return self.operator.embed(x * expand(self.scale, x))

    @property
    def precise(self) -> Problem[AnyEquation]:
        """The same problem, with inner solves in full precision."""
        equation = getattr(self.equation, "precise", self.equation)
        return replace(self, equation=equation)

    def unknown(self, name: str, image: Tensor) -> Tensor:
        """
        Checks an image of the physics and turns it into an unknown.

        :param str name: name of the argument, for the message.
        :param torch.Tensor image: the image.
        :raises ValueError: if it is no image of the physics.
        """
        x = self.operator.extract(check_image(name, image, self.operator))
        return x / expand(self.scale, x)
