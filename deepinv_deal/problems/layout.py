"""How images of a physics become the real channels that filters see, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from deepinv_deal.operators.slices import SLICE_AXES, Slices
from deepinv_deal.problems.checks import describe
from deepinv_deal.solvers.preconditioner import Fourier

ComplexMode = Literal["real_imag", "real"]
COMPLEX_MODES: tuple[str, ...] = ("real_imag", "real")


@dataclass(frozen=True)
class ImageLayout:
    r"""
    The translation between an image of the physics and what is solved for.

    What is solved for is real, ``(B, C, H, W)``. A gray model takes a complex image,
    given as complex numbers or as two channels, as two real channels
    (``complex_mode="real_imag"``) or as its real part (``"real"``).

    Of a volume ``(B, C, D, H, W)`` the filters see slices, which become channels: those
    along the axis ``slices_along``, D being the depth, or for ``"mean"`` those of all
    three orientations, see :class:`~deepinv_deal.operators.Slices`. Frames of a series
    are slices along the depth.

    :param torch.Size shape: shape of an image of the physics.
    :param bool complex_dtype: whether images of the physics hold complex numbers.
    :param bool is_complex: whether an image has a real and an imaginary part.
    :param bool real: whether only the real part is solved for.
    :param str slices_along: ``"depth"``, ``"height"``, ``"width"`` or ``"mean"``.
    """

    shape: torch.Size
    complex_dtype: bool = False
    is_complex: bool = False
    real: bool = False
    slices_along: str = "depth"

    @classmethod
    def of(
        cls, image: Tensor, in_channels: int, complex_mode: str, slices: str = "depth"
    ) -> ImageLayout:
        """
        Returns the layout of images like the given one.

        :param torch.Tensor image: any image of the physics.
        :param int in_channels: channels that the filters see, 1 (gray) or 3 (colour).
        :param str complex_mode: ``"real_imag"`` or ``"real"``.
        :param str slices: ``"depth"``, ``"height"``, ``"width"`` or ``"mean"``.
        :raises ValueError: if it is no batch of images, or not of these channels.
        """
        if not isinstance(image, Tensor) or image.ndim not in (4, 5):
            raise ValueError(
                "Images must be tensors of shape (B, C, H, W), volumes of shape (B, C, "
                f"D, H, W), got {describe(image)}. Add the batch dimension with [None]."
            )
        channels = image.shape[1] * (2 if image.is_complex() else 1)
        # A gray model takes a two-channel image for real and imaginary part.
        is_complex = in_channels == 1 and channels == 2
        if channels != in_channels and not is_complex:
            hint = "gray" if in_channels == 1 else "colour"
            has = f"{image.shape[1]} {'complex ' * image.is_complex()}channels"
            raise ValueError(
                f"The model has {hint} filters (in_channels={in_channels}), but the "
                f"image has {has} (shape {tuple(image.shape)}). Choose weights for "
                "images of this kind; DEAL(in_channels=3) has some for colour."
            )
        real = is_complex and complex_mode == "real"
        return cls(image.shape, image.is_complex(), is_complex, real, slices)

    @property
    def complex_pair(self) -> bool:
        """Whether the two halves of the channels are one complex image."""
        return self.is_complex and not self.real

    @property
    def is_image(self) -> bool:
        """Whether what is solved for is the image itself: real and flat."""
        return len(self.shape) == 4 and not self.is_complex and not self.complex_dtype

    # -- volumes -----------------------------------------------------------------

    @cached_property
    def slices(self) -> Slices | None:
        """The slices of a volume that the filters see; ``None`` for images."""
        if len(self.shape) == 4:
            return None
        channels = 1 if self.is_complex else self.shape[1] * (1 + self.complex_dtype)
        mean = self.slices_along == "mean"
        return Slices(channels, self.shape[2 + self._axis], mean)

    @property
    def _axis(self) -> int:
        """The axis of a volume whose slices become channels: 0, 1 or 2."""
        mean = self.slices_along == "mean"
        return 0 if mean else SLICE_AXES.index(self.slices_along)

    @property
    def transforms(self) -> tuple[Fourier, ...]:
        """Fourier transforms in which an operator on unknowns may be a product."""
        plane = Fourier(self.complex_pair)
        if self.slices is None:
            return (plane,)
        volume = Fourier(self.complex_pair, self.slices.depth)
        # Slices of other orientations are convolved along all three axes.
        return (volume,) if self.slices.mean else (plane, volume)

    def _flatten(self, volume: Tensor) -> Tensor:
        """Makes channels of slices: ``(B, C, D, H, W)`` to ``(B, P D C', H', W')``."""
        if self.slices is None:
            return volume
        # Real and imaginary part one after the other, colours slice by slice.
        volume = volume.movedim(2 + self._axis, 2)
        if self.slices.channels > 1:
            volume = volume.transpose(1, 2)
        return volume.flatten(1, 2)

    def channels(self, x: Tensor) -> Tensor:
        """Returns what is solved for as real images or volumes, ``(B, C, ...)``."""
        if self.slices is None:
            return x
        depth, many = self.slices.depth, self.slices.channels > 1
        if many:
            x = x.unflatten(1, (depth, -1)).transpose(1, 2)
        else:
            x = x.unflatten(1, (-1, depth))
        return x.movedim(2, 2 + self._axis)

    def features(self, stacks: list[Tensor]) -> Tensor:
        """
        Returns what filters make of the slices as images or volumes, ``(B, K, ...)``.

        :param list stacks: features ``(n, N, h, w)`` of every stack.
        """
        batch = self.shape[0]
        if self.slices is None:
            return Slices().pack(stacks, batch)
        return self.slices.voxels(stacks, batch).movedim(2, 2 + self._axis)

    # -- images ------------------------------------------------------------------

    def extract(self, image: Tensor) -> Tensor:
        """Turns an image of the physics into what is solved for."""
        if self.complex_dtype:
            parts = image.real if self.real else torch.cat([image.real, image.imag], 1)
        else:
            parts = image[:, :1] if self.real else image
        return self._flatten(parts)

    def embed(self, x: Tensor) -> Tensor:
        """Turns what is solved for into an image of the physics."""
        x = self.channels(x)
        if self.real:
            x = torch.cat([x, torch.zeros_like(x)], 1)
        if self.complex_dtype:
            return torch.complex(x[:, :1].contiguous(), x[:, 1:].contiguous())
        return x

    def checked(self, name: str, image: object) -> Tensor:
        """
        Checks that an argument is an image of the physics, and returns what is solved
        for.

        :param str name: name of the argument, for the message.
        :param torch.Tensor image: the argument.
        :raises ValueError: if it is none, or not finite.
        """
        if not isinstance(image, Tensor) or image.shape != self.shape:
            raise ValueError(
                f"{name} must be an image of shape {tuple(self.shape)}, got "
                f"{describe(image)}."
            )
        if image.is_complex() != self.complex_dtype:
            kinds = ("real", "complex")
            raise ValueError(
                f"{name} must be {kinds[self.complex_dtype]} as the images of the "
                f"physics, got {image.dtype}."
            )
        if not torch.isfinite(image).all():
            raise ValueError(f"{name} holds NaN or infinity.")
        return self.extract(image)
