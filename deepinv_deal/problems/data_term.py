r"""The data term: what is known of measurements, physics and units, in one object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm
from deepinv_deal.operators import Slices
from deepinv_deal.problems.checks import check_measurements
from deepinv_deal.problems.fitted import fitted
from deepinv_deal.problems.intensity import HOT, guess_unit
from deepinv_deal.problems.layout import ImageLayout
from deepinv_deal.problems.normal_operator import (
    KnownPhysics,
    NormalOperator,
    back_projection,
    check_linear,
    is_identity,
)
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.preconditioner import PLANE, Fourier


@dataclass(frozen=True)
class FrozenCurvature:
    r"""
    The curvature of a data term at an image, :math:`A^{\top} D A`.

    :param Callable apply: the map on images.
    :param torch.Tensor density: how much stronger it is than :math:`A^{\top} A` around
        every pixel, for preconditioners, ``(B, C, H, W)``.
    :param torch.Tensor largest: how much stronger it is at most, ``(B,)``.
    """

    apply: LinearMap
    density: Tensor
    largest: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """Applies it."""
        return self.apply(v)


@dataclass(frozen=True)
class DataTerm:
    r"""
    The least-squares term of a reconstruction, as all equations see it.

    .. math::
        \tfrac{1}{2} \|A x - y\|_2^2
        = \tfrac{1}{2} \langle x, H x \rangle - \langle b, x \rangle + \text{const},
        \qquad H = A^{\top} A, \quad b = A^{\top} y

    The unknown :math:`x` is real, ``(B, C, H, W)``, and in the units of the model,
    about [0, 1]: an image or volume of the physics is ``scale`` times what ``layout``
    makes of it, plus ``offset``.

    :param torch.Tensor b: right-hand side, shape of the unknown.
    :param NormalOperator H: normal operator; ``None``: the identity.
    :param ImageLayout layout: translation to images of the physics; ``None``: none.
    :param torch.Tensor scale: intensity by which images were divided, ``(B,)``;
        ``None``: 1.
    :param object physics: the physics, which only :meth:`value` needs.
    :param object y: measurements, likewise.
    :param list notes: remarks on what was decided for the user.
    :param torch.Tensor offset: pedestal that was subtracted from images of the physics,
        ``(B,)``; ``None``: none.
    :param torch.Tensor signed: samples that seem to have negative values, ``(B,)``;
        ``None``: not looked at.
    :param torch.Tensor bright: samples that seem to have values above 1, likewise.
    """

    b: Tensor
    H: NormalOperator | None = None
    layout: ImageLayout | None = None
    scale: Tensor | None = None
    physics: Any = None
    y: Any = None
    notes: list[str] = field(default_factory=list)
    offset: Tensor | None = None
    signed: Tensor | None = None
    bright: Tensor | None = None

    @classmethod
    def of(
        cls,
        y: Any,
        physics: Any,
        reference: Tensor | None,
        *,
        in_channels: int = 1,
        complex_mode: str = "real_imag",
        slices: str = "depth",
        scale: float | str | None = None,
        trial: bool = True,
        pedestal: bool = True,
    ) -> DataTerm:
        """
        Checks measurements and physics and returns their data term.

        :param torch.Tensor y: measurements.
        :param deepinv.physics.LinearPhysics physics: forward operator, or the
            :class:`KnownPhysics` that was made of it; ``None`` to denoise.
        :param torch.Tensor reference: any parameter of the model, which tells dtype and
            device; ``None``: those of the measurements are right.
        :param int in_channels: channels that the filters see.
        :param str complex_mode: see :class:`ImageLayout`.
        :param str slices: slices of volumes that the filters see, likewise.
        :param float, str scale: intensity of the images; ``"auto"``: guessed, with a
            note where it is far from [0, 1]; ``None``: 1.
        :param bool trial: whether to try the physics out; otherwise it is trusted.
        :param bool pedestal: whether images may be taken to stand on a pedestal.
        :raises TypeError: if ``y`` is no floating tensor or the physics not linear.
        :raises ValueError: if they do not fit together, or ``y`` is not finite.
        """
        known = physics if isinstance(physics, KnownPhysics) else None
        physics = physics if known is None else known.physics
        check_measurements(y, reference)
        check_linear(physics)
        physics = fitted(physics, y)
        identity = is_identity(physics)
        image = y if identity else back_projection(physics, y)
        layout = ImageLayout.of(image, in_channels, complex_mode, slices)
        b, H = layout.extract(image), None
        if not identity:
            H = known or KnownPhysics(physics, layout, b, trial=trial)
            if H.layout != layout or H.like.dtype != b.dtype:
                raise ValueError(
                    "physics was examined for images of shape "
                    f"{tuple(H.layout.shape)} in {H.like.dtype}, and y makes images "
                    f"of shape {tuple(layout.shape)} in {b.dtype}. Give the physics "
                    "itself, or examine it again."
                )
        notes = [] if H is None else list(H.notes)
        data = cls(b, H, layout, None, physics, y, notes)
        if scale is None:
            return data
        if isinstance(scale, str):
            return _in_guessed_unit(data, pedestal=pedestal)
        return data.scaled(torch.full_like(data.b[:, 0, 0, 0], float(scale)))

    def scaled(self, scale: Tensor) -> DataTerm:
        """
        Returns the same data term for images in another unit.

        :param torch.Tensor scale: intensity by which images are divided, ``(B,)``, on
            top of what they have been.
        """
        total = scale if self.scale is None else self.scale * scale
        return replace(self, b=self.b / expand(scale, self.b), scale=total)

    def expanded(self, number: int) -> DataTerm:
        """Returns the data term of one sample for ``number`` equal ones."""
        b = self.b.expand(number, -1, -1, -1)
        H = self.H
        if H is not None:
            H = NormalOperator(H, b, H.transforms)
        return replace(self, b=b, H=H)

    # -- the quadratic -------------------------------------------------------------

    @property
    def identity(self) -> bool:
        """Whether the normal operator is the identity: in denoising."""
        return self.H is None

    def normal(self, x: Tensor) -> Tensor:
        """Applies the normal operator, shape of ``x``."""
        return x if self.H is None else self.H(x)

    @property
    def fast_normal(self) -> LinearMap:
        """The normal operator in its fastest form, equal up to rounding."""
        return self.normal if self.H is None else self.H.fast

    def force(self, x: Tensor) -> Tensor:
        r"""
        Returns :math:`b - H x`, the negative gradient of the data term at ``x``.

        The equations of this package see data only through this, :meth:`normal` and
        ``b``: another likelihood has another force, and :meth:`frozen` in place of H.
        """
        return self.b - self.normal(x)

    @property
    def quadratic(self) -> bool:
        """Whether it is least squares, whose curvature is :meth:`normal` anywhere."""
        return True

    def frozen(
        self,
        x: Tensor,  # noqa: ARG002 - for likelihoods
    ) -> FrozenCurvature | None:
        """Returns the curvature at ``x``; ``None``: :meth:`normal`."""
        return None

    def at(
        self,
        x: Tensor,  # noqa: ARG002 - for likelihoods
    ) -> DataTerm:
        """Returns the least-squares term with the curvature frozen at ``x``: itself."""
        return self

    def tangent(
        self,
        x: Tensor,  # noqa: ARG002 - for likelihoods
    ) -> DataTerm:
        """Returns the least-squares term that is tangent at ``x``: itself."""
        return self

    def start(self) -> Tensor:
        """Returns the first image: zero."""
        return torch.zeros_like(self.b)

    def value(self, x: Tensor) -> Tensor:
        r"""
        Returns :math:`\tfrac12 \|A x - y\|_2^2` of an unknown, ``(B,)``; without the
        constant if there is an operator but no physics.
        """
        if self.H is None:
            return 0.5 * (x - self.b).square().flatten(1).sum(1)
        if self.physics is None:
            return inner(x, 0.5 * self.normal(x) - self.b)
        residual = self.physics.A(self.image(x)) - self.y
        parts = list(residual) if isinstance(residual, TensorList) else [residual]
        total = sum(part.abs().square().flatten(1).sum(1) for part in parts)
        return 0.5 * total / self.intensity.square()

    # -- what is known of it -------------------------------------------------------

    @property
    def complex_pair(self) -> bool:
        """Whether the two halves of the channels are one complex image."""
        return self.layout is not None and self.layout.complex_pair

    @property
    def fourier(self) -> Fourier:
        """The Fourier transform that suits the normal operator."""
        if self.H is not None:
            return self.H.fourier
        return PLANE if self.layout is None else self.layout.transforms[0]

    @property
    def slices(self) -> Slices | None:
        """The slices of a volume that filters see; ``None``: channels are images."""
        return None if self.layout is None else self.layout.slices

    @property
    def mean_slices(self) -> Slices | None:
        """These slices where they are of all three orientations, else ``None``."""
        slices = self.slices
        return slices if slices is not None and slices.mean else None

    @cached_property
    def step(self) -> Tensor:
        r"""The step :math:`t` of steepest descent from zero, ``(B,)``."""
        with torch.no_grad():
            gain = inner(self.b, self.normal(self.b))
            return (inner(self.b, self.b) / gain).where(gain > 0, 1)

    @cached_property
    def b_norm(self) -> Tensor:
        """Norm of the right-hand side, 1 where it is zero, ``(B,)``."""
        b_norm = norm(self.b.detach())
        return b_norm.where(b_norm != 0, 1)

    @property
    def circulant(self) -> Tensor:
        """Samples whose normal operator is a circular convolution, ``(B,)``."""
        if self.H is None:
            return torch.ones(len(self.b), dtype=torch.bool, device=self.b.device)
        return self.H.circulant

    @property
    def sqnorm(self) -> Tensor:
        """Squared norm of the physics, ``(B,)``."""
        return self.b.new_ones(len(self.b)) if self.H is None else self.H.sqnorm

    @property
    def norm_bound(self) -> Tensor:
        """An upper bound of the norm of the normal operator, ``(B,)``."""
        return self.sqnorm if self.H is None else self.H.norm_bound

    # -- units -----------------------------------------------------------------------

    @property
    def intensity(self) -> Tensor:
        """The scale, ``(B,)``, also where there is none."""
        return self.b.new_ones(len(self.b)) if self.scale is None else self.scale

    def image(self, x: Tensor) -> Tensor:
        """Turns an unknown into an image of the physics."""
        x = self.unscaled(x)
        return x if self.layout is None else self.layout.embed(x)

    def channels(self, x: Tensor) -> Tensor:
        """
        Turns an unknown into real channels of an image in the units of the physics.
        """
        x = self.unscaled(x)
        return x if self.layout is None else self.layout.channels(x)

    def unscaled(self, x: Tensor) -> Tensor:
        """Returns an unknown in the units of the physics."""
        x = x if self.scale is None else x * expand(self.scale, x)
        return x if self.offset is None else x + expand(self.offset, x)

    def features(self, stacks: list[Tensor]) -> Tensor:
        """
        Returns what filters make of the slices as images or volumes, ``(B, K, ...)``.

        :param list stacks: features ``(n, N, h, w)`` of every stack of slices.
        """
        assert self.layout is not None
        return self.layout.features(stacks)

    def unknown(self, name: str, image: object) -> Tensor:
        """
        Checks an image of the physics and turns it into an unknown.

        :param str name: name of the argument, for the message.
        :param torch.Tensor image: the image.
        :raises ValueError: if it is no image of the physics, or not finite.
        """
        assert self.layout is not None
        x = self.layout.checked(name, image)
        if x.dtype != self.b.dtype or x.device != self.b.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, the measurements are "
                f"{self.b.dtype} on {self.b.device}. Convert one of them."
            )
        x = x if self.offset is None else x - expand(self.offset, x)
        return x if self.scale is None else x / expand(self.scale, x)


def operator_term(b: Tensor, H: Callable[[Tensor], Tensor] | None = None) -> DataTerm:
    r"""
    Returns the data term :math:`\tfrac12 \langle x, H x \rangle - \langle b, x
    \rangle` of a normal operator given as a function.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.problems import operator_term
    >>> data = operator_term(torch.ones(1, 1, 4, 4), lambda x: 2 * x)
    >>> float(data.force(torch.zeros(1, 1, 4, 4)).sum())
    16.0

    :param torch.Tensor b: right-hand side ``(B, C, H, W)``.
    :param Callable H: symmetric positive semi-definite map; ``None``: the identity.
    """
    return DataTerm(b, None if H is None else NormalOperator(H, b))


def _in_guessed_unit(data: DataTerm, *, pedestal: bool) -> DataTerm:
    """Returns the data term in the unit that is guessed, with notes if it differs."""
    unit = guess_unit(data, pedestal=pedestal)
    data = replace(data, signed=unit.signed, bright=unit.bright)
    if unit.hot:
        data.notes.append(
            f"{unit.hot} pixels are more than {HOT:g} times as bright as the rest and "
            "spoil what is around them. Replace them, or take deepinv.optim.L1() as "
            "data_fidelity."
        )
    if unit.offset is not None:
        levels = [float(f"{o:.4g}") for o in unit.offset.tolist()]
        data.notes.append(
            f"The image stands on a pedestal: {levels} was subtracted from it and "
            "added to the result (scale='auto')."
        )
        shadow = data.normal(torch.ones_like(data.b))
        shifted = data.b - expand(unit.offset, data.b) * shadow
        data = replace(data, b=shifted, offset=unit.offset)
    if bool((unit.scale != 1).any()):
        data.notes.append(
            "The intensity is far from [0, 1]: data were divided by "
            f"{[float(f'{f:g}') for f in unit.scale.tolist()]} and the result "
            "multiplied by it (scale='auto')."
        )
    return data.scaled(unit.scale)
