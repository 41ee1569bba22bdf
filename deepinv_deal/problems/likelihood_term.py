r"""The data term of a likelihood: least squares with weights that follow the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm
from deepinv_deal.problems.data_term import DataTerm, FrozenCurvature
from deepinv_deal.problems.likelihood import Likelihood
from deepinv_deal.problems.measurements import each
from deepinv_deal.problems.normal_operator import NormalOperator, random_images

#: The strongest noise that weights are made for.
LARGEST_LEVEL = 50 / 255

#: A measurement of a random image that is smaller than this, relative to the largest
#: one, does not see the image.
SEEN = 1e-5


@dataclass(frozen=True)
class LikelihoodTerm(DataTerm):
    r"""
    The negative log-likelihood :math:`\phi(s A x; y)` of an unknown, as equations see
    it.

    :math:`s` is the scale, so :math:`s x` is the image in the units of the physics. A
    likelihood without unit of its own is that of images and measurements divided by the
    intensity that the term was made with. ``b`` and ``H`` remain those of least
    squares, which tell first images and what the physics resembles.

    :param Likelihood likelihood: the likelihood.
    :param bool relative: whether weights are meant relative to the typical curvature.
    :param torch.Tensor factor: by which the likelihood is multiplied, ``(B,)``;
        ``None``: 1.
    :param DataTerm added: a least-squares term that is added; ``None``: none.
    :param torch.Tensor rescaled: by what images were divided after their intensity,
        ``(B,)``; ``None``: 1.
    """

    likelihood: Any = None
    relative: bool = False
    factor: Tensor | None = None
    added: DataTerm | None = None
    rescaled: Tensor | None = None

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
        if data.offset is not None:  # the likelihood is one of the misfit
            pedestal = expand(data.offset, data.b).expand_as(data.b)
            pedestal = pedestal if data.layout is None else data.layout.embed(pedestal)
            settings["y"] = y - (
                pedestal if data.H is None else data.physics.A(pedestal)
            )
        if data.scale is not None:
            likelihood = likelihood.in_unit(data.scale)
        return cls(**settings, likelihood=likelihood, relative=relative)

    def scaled(self, scale: Tensor) -> LikelihoodTerm:
        """Returns the same term for images in another unit, see the base class."""
        total = scale if self.rescaled is None else self.rescaled * scale
        scaled: Any = super().scaled(scale)
        return replace(scaled, rescaled=total)

    def expanded(self, number: int) -> LikelihoodTerm:
        """Returns the term of one sample for ``number`` equal ones."""
        y = self.y
        if isinstance(y, TensorList):
            y = TensorList([part.expand(number, *part.shape[1:]) for part in y])
        else:
            y = y.expand(number, *y.shape[1:])
        return replace(super().expanded(number), y=y)  # type: ignore[return-value]

    # -- prediction of measurements ------------------------------------------------

    def _predict(self, x: Tensor) -> Any:
        x = x if self.scale is None else x * expand(self.scale, x)
        image = x if self.layout is None else self.layout.embed(x)
        return image if self.H is None else self.physics.A(image)

    def _project(self, v: Any) -> Tensor:
        """Applies the adjoint of :meth:`_predict`, times the factor."""
        image = v if self.H is None else self.physics.A_adjoint(v)
        x = image if self.layout is None else self.layout.extract(image)
        x = x if self.scale is None else x * expand(self.scale, x)
        return x if self.factor is None else x * expand(self.factor, x)

    # -- as equations see it -------------------------------------------------------

    def force(self, x: Tensor) -> Tensor:
        r"""Returns :math:`-s A^{\top} \phi'(s A x; y)`, shape of ``x``."""
        derivative = self.likelihood.derivative(self._predict(x), self.y)
        force = -self._project(derivative)
        return force if self.added is None else force + self.added.force(x)

    def value(self, x: Tensor) -> Tensor:
        r"""Returns :math:`\phi(s A x; y)`, ``(B,)``."""
        value = self.likelihood.value(self._predict(x), self.y)
        value = value if self.factor is None else self.factor * value
        return value if self.added is None else value + self.added.value(x)

    @torch.no_grad()
    def frozen(self, x: Tensor) -> FrozenCurvature:
        """Returns the curvature at ``x``."""
        return self._weighted(self.likelihood.curvature(self._predict(x), self.y))

    def at(self, x: Tensor) -> FrozenTerm:
        """
        Returns the least-squares term that has the force of this one at ``x``, and its
        curvature everywhere.
        """
        return FrozenTerm.near(self, x, self.frozen(x))

    def tangent(self, x: Tensor) -> FrozenTerm:
        r"""Returns :meth:`at` with the second derivative :math:`\phi''` instead."""
        slope = self.likelihood.slope(self._predict(x.detach()), self.y)
        return FrozenTerm.near(self, x, self._weighted(slope))

    @torch.no_grad()
    def score(self, x: Tensor, white: Callable[[Tensor], Tensor]) -> Tensor:
        r"""
        Returns random forces on an image whose covariance is the frozen curvature.

        :param torch.Tensor x: the image.
        :param Callable white: returns white noise of variance 1, of a tensor's shape.
        """
        weights = self.likelihood.curvature(self._predict(x), self.y)
        noise = each(white, self._predict(x))
        force = self._project(self.likelihood.weigh_root(weights, noise))
        return force if self.factor is None else force / expand(self.factor.sqrt(), x)

    @torch.no_grad()
    def _weighted(self, weights: Any) -> FrozenCurvature:
        r"""Returns :math:`s^2 A^{\top} D A` for the diagonal of D."""

        def apply(v: Tensor) -> Tensor:
            weighted = self.likelihood.weigh(weights, self._predict(v))
            curvature = self._project(weighted)
            return curvature if self.added is None else curvature + self.added.normal(v)

        parts = list(weights) if isinstance(weights, TensorList) else [weights]
        factor: Any = 1 if self.scale is None else self.scale.square()
        factor = factor if self.factor is None else factor * self.factor
        low = torch.stack([w.flatten(1).amin(1) for w in parts]).amin(0) * factor
        high = torch.stack([w.flatten(1).amax(1) for w in parts]).amax(0) * factor
        largest = self.likelihood.largest(weights) * factor
        ones = torch.ones_like(self.b)
        stretched = self._project(each(torch.mul, weights, self._predict(ones)))
        if self.H is None:
            return FrozenCurvature(apply, stretched, largest)
        # Exact where A^T A is diagonal, and a mean where all entries of A have a sign.
        plain = self._plain_ones
        ratio = (stretched / plain.where(plain > 0, 1)).where(plain > 0, 0)
        ratio = ratio.clamp(min=expand(low, ones), max=expand(high, ones))
        return FrozenCurvature(apply, ratio, largest)

    @cached_property
    @torch.no_grad()
    def _plain_ones(self) -> Tensor:
        return self.normal(torch.ones_like(self.b))

    @property
    def quadratic(self) -> bool:
        """Whether it is least squares: no."""
        return False

    @property
    def norm_bound(self) -> Tensor:
        """An upper bound of the norm of the curvature at the first image, ``(B,)``."""
        return FrozenOperator(self._first_system[0], self).norm_bound

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
        level = self.likelihood.level(self.y, self._seen)
        if level is None:
            return None
        level = level if self.scale is None else level * self.scale.square()
        return level if self.factor is None else level * self.factor

    @cached_property
    @torch.no_grad()
    def _seen(self) -> Any:
        """Which measurements an image contributes to."""
        # A random one: a constant has one frequency only.
        return each(_is_seen, self._predict(random_images(self.b, 1)[0]))

    def normalized(self, *, learned: bool) -> LikelihoodTerm:
        """
        Returns the term divided by its typical curvature, if that is known.

        :param bool learned: divide such that weights of denoising suit it.
        """
        typical = self.typical
        if typical is None:
            return self
        factor = 1 / (typical * self.gain if learned else typical)
        return replace(
            self, factor=factor if self.factor is None else self.factor * factor
        )

    @property
    def tells_noise(self) -> bool:
        """
        Whether it says how strong the noise is, so that learned weights can serve. With
        a physics, weights without unit may be anything.
        """
        known = self.typical is not None
        return known and (self.identity or not self.likelihood.unitless)

    @cached_property
    def noise_level(self) -> Tensor | None:
        r"""
        The noise level at which denoising is about as hard, in the units of the model,
        ``(B,)``: typical noise over the root of the mean eigenvalue of :math:`A^{\top}
        A`, at most that for which weights are made. ``None``: not known.
        """
        if self.typical is None:
            return None
        level = self.typical.rsqrt()
        if not self.tells_noise or self.H is None:
            return level
        level = level * self.H.mean_eigenvalue.rsqrt()
        if self.rescaled is None:
            return level.clamp_max(LARGEST_LEVEL)
        return torch.minimum(level, LARGEST_LEVEL / self.rescaled)

    @property
    def gain(self) -> Tensor | float:
        """
        By what weights of denoising at :attr:`noise_level`, relative to the typical
        curvature, are to be multiplied, ``(B,)``.
        """
        level, typical = self.noise_level, self.typical
        if level is None or typical is None or not self.tells_noise:
            return 1.0
        return 1 / (level.square() * typical)


def _is_seen(prediction: Tensor) -> Tensor:
    """Which measurements a random image contributes to; all, if it does to none."""
    size = prediction.abs()
    largest = size.flatten(1).amax(1).view(-1, *[1] * (size.ndim - 1))
    seen = size > SEEN * largest
    return seen | ~seen.flatten(1).any(1).view(-1, *[1] * (seen.ndim - 1))


@dataclass(frozen=True)
class FrozenTerm(DataTerm):
    """
    The least-squares term that a likelihood is near an image.

    Steps and norms are those of the likelihood, so residuals of different images can be
    compared.

    :param LikelihoodTerm like: the term of the likelihood.
    """

    like: Any = None

    @classmethod
    @torch.no_grad()
    def near(
        cls, like: LikelihoodTerm, x: Tensor, curvature: FrozenCurvature
    ) -> FrozenTerm:
        """
        Returns the term at an image.

        :param LikelihoodTerm like: the term of the likelihood.
        :param torch.Tensor x: the image.
        :param FrozenCurvature curvature: its curvature there.
        """
        settings = {f.name: getattr(like, f.name) for f in fields(DataTerm)}
        b = curvature(x) + like.force(x)
        return cls(
            **settings | {"b": b, "H": FrozenOperator(curvature, like)}, like=like
        )

    @property
    def step(self) -> Tensor:
        """The step of the likelihood, ``(B,)``."""
        return self.like.step

    @property
    def b_norm(self) -> Tensor:
        """The norm of the likelihood, ``(B,)``."""
        return self.like.b_norm


class FrozenOperator(NormalOperator):
    """
    The curvature of a likelihood, for preconditioners about that of the physics.

    :param FrozenCurvature curvature: the curvature.
    :param LikelihoodTerm like: the term of the likelihood.
    """

    def __init__(self, curvature: FrozenCurvature, like: LikelihoodTerm):
        super().__init__(curvature, like.b, (like.fourier,))
        self.curvature, self.base, self.added = curvature, like.H, like.added

    @cached_property
    def circulant(self) -> Tensor:
        """Samples for which it is a circular convolution: none, ``(B,)``."""
        return torch.zeros(len(self.like), dtype=torch.bool, device=self.like.device)

    @property
    def is_circulant(self) -> bool:
        """Whether it is one for all samples: the host need not ask the device."""
        return False

    @property
    @torch.no_grad()
    def similar(self) -> Tensor:
        """The eigenvalues of the physics times the mean of the density."""
        density = self.curvature.density.mean((1, 2, 3), keepdim=True)
        if self.base is None:
            return density
        values, _ = self.base.transfer
        return values * density

    @cached_property
    def norm_bound(self) -> Tensor:
        """An upper bound of its norm, ``(B,)``."""
        bound = self.curvature.largest
        bound = bound if self.base is None else bound * self.base.norm_bound
        return bound if self.added is None else bound + self.added.norm_bound
