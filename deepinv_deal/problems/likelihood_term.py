r"""The data term of a likelihood: least squares with weights that follow the image."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm
from deepinv_deal.problems.data_term import DataTerm, FrozenCurvature
from deepinv_deal.problems.likelihood import Likelihood


@dataclass(frozen=True)
class LikelihoodTerm(DataTerm):
    r"""
    The negative log-likelihood :math:`\phi(s A x; y)` of an unknown, as equations see
    it.

    :math:`s` is the scale, so :math:`s x` is the image in the units of the physics. A
    likelihood without unit of its own is that of :math:`A x` and :math:`y / s`. ``b``
    and ``H`` remain those of least squares, which tell first images and what the
    physics resembles.

    :param Likelihood likelihood: the likelihood.
    :param bool relative: whether weights are meant relative to the typical curvature.
    """

    likelihood: Any = None
    relative: bool = False

    @classmethod
    def from_least_squares(
        cls, data: DataTerm, y: Any, likelihood: Likelihood, *, relative: bool = False
    ) -> LikelihoodTerm:
        """
        Returns the term of a likelihood for the images of a least-squares term.

        :param DataTerm data: the term for ``likelihood.linear(y)``.
        :param torch.Tensor y: measurements.
        :param Likelihood likelihood: the likelihood.
        :param bool relative: see the class.
        """
        settings = {f.name: getattr(data, f.name) for f in fields(data)}
        settings |= {"y": y, "notes": data.notes + likelihood.check(y)}
        return cls(**settings, likelihood=likelihood, relative=relative)

    # -- prediction of measurements ------------------------------------------------

    @property
    def _unit(self) -> Tensor | None:
        return None if self.likelihood.unitless else self.scale

    @property
    def _measured(self) -> Any:
        """The measurements in the unit of the predictions."""
        if self.scale is None or self._unit is not None:
            return self.y
        if isinstance(self.y, TensorList):
            return TensorList([part / expand(self.scale, part) for part in self.y])
        return self.y / expand(self.scale, self.y)

    def _predict(self, x: Tensor) -> Any:
        x = x if self._unit is None else x * expand(self._unit, x)
        image = x if self.layout is None else self.layout.embed(x)
        return image if self.H is None else self.physics.A(image)

    def _project(self, v: Any) -> Tensor:
        """Applies the adjoint of :meth:`_predict`."""
        image = v if self.H is None else self.physics.A_adjoint(v)
        x = image if self.layout is None else self.layout.extract(image)
        return x if self._unit is None else x * expand(self._unit, x)

    # -- as equations see it -------------------------------------------------------

    def force(self, x: Tensor) -> Tensor:
        r"""Returns :math:`-s A^{\top} \phi'(s A x; y)`, shape of ``x``."""
        derivative = self.likelihood.derivative(self._predict(x), self._measured)
        return -self._project(derivative)

    def value(self, x: Tensor) -> Tensor:
        r"""Returns :math:`\phi(s A x; y)`, ``(B,)``."""
        return self.likelihood.value(self._predict(x), self._measured)

    @torch.no_grad()
    def frozen(self, x: Tensor) -> FrozenCurvature:
        """Returns the curvature at ``x``."""
        weights = self.likelihood.curvature(self._predict(x), self._measured)

        def apply(v: Tensor) -> Tensor:
            return self._project(weights * self._predict(v))

        ones = torch.ones_like(x)
        if self.H is None:
            return FrozenCurvature(apply, self._project(weights * self._predict(ones)))
        # Exact where A^T A is diagonal, and a mean where all entries of A have a sign.
        stretched, plain = apply(ones), self._plain_ones
        parts = list(weights) if isinstance(weights, TensorList) else [weights]
        factor = 1 if self._unit is None else self._unit.square()
        low = torch.stack([w.flatten(1).amin(1) for w in parts]).amin(0) * factor
        high = torch.stack([w.flatten(1).amax(1) for w in parts]).amax(0) * factor
        ratio = (stretched / plain.where(plain > 0, 1)).where(plain > 0, 0)
        ratio = ratio.clamp(min=expand(low, x), max=expand(high, x))
        return FrozenCurvature(apply, ratio)

    @cached_property
    @torch.no_grad()
    def _plain_ones(self) -> Tensor:
        return self.normal(torch.ones_like(self.b))

    @property
    def quadratic(self) -> bool:
        """Whether it is least squares: no."""
        return False

    @torch.no_grad()
    def start(self) -> Tensor:
        """Returns the constant image that fits the measurements best."""
        ones = torch.ones_like(self.b)
        gain = inner(ones, self._plain_ones if self.H is not None else ones)
        level = (inner(ones, self.b) / gain.where(gain > 0, 1)).where(gain > 0, 0)
        return expand(level, ones) * ones

    @cached_property
    @torch.no_grad()
    def _first_system(self) -> tuple[FrozenCurvature, Tensor]:
        """Curvature and right-hand side of the problem frozen at the first image."""
        x = self.start()
        curvature = self.frozen(x)
        return curvature, curvature(x) + self.force(x)

    @cached_property
    @torch.no_grad()
    def step(self) -> Tensor:
        r"""The step :math:`t` of steepest descent on the first frozen problem."""
        H, b = self._first_system
        gain = inner(b, H(b))
        return (inner(b, b) / gain).where(gain > 0, 1)

    @cached_property
    def b_norm(self) -> Tensor:
        """Norm of the right-hand side of the first frozen problem, ``(B,)``."""
        b_norm = norm(self._first_system[1])
        return b_norm.where(b_norm != 0, 1)

    # -- what is known of it -------------------------------------------------------

    @property
    def typical(self) -> Tensor | None:
        """
        Typical curvature, ``(B,)``, differentiable: what the weight of least squares is
        to be multiplied by. ``None``: not known.
        """
        level = self.likelihood.level(self._measured)
        if level is None or self._unit is None:
            return level
        return level * self._unit.square()

    @property
    def noise_level(self) -> Tensor | None:
        """Typical noise level in the units of the model, ``(B,)``, if it is known."""
        return None if self.typical is None else self.typical.rsqrt()
