"""How images of a physics become the real channels that filters see, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deepinv_deal.problems.checks import describe

ComplexMode = Literal["real_imag", "real"]
COMPLEX_MODES: tuple[str, ...] = ("real_imag", "real")


@dataclass(frozen=True)
class ImageLayout:
    r"""
    The translation between an image of the physics and what is solved for.

    What is solved for is real, ``(B, C, H, W)``. A gray model takes a complex image,
    given as complex numbers or as two channels, as two real channels
    (``complex_mode="real_imag"``) or as its real part (``"real"``).

    :param torch.Size shape: shape of an image of the physics.
    :param bool complex_dtype: whether images of the physics hold complex numbers.
    :param bool is_complex: whether an image has a real and an imaginary part.
    :param bool real: whether only the real part is solved for.
    """

    shape: torch.Size
    complex_dtype: bool = False
    is_complex: bool = False
    real: bool = False

    @classmethod
    def of(cls, image: Tensor, in_channels: int, complex_mode: str) -> ImageLayout:
        """
        Returns the layout of images like the given one.

        :param torch.Tensor image: any image of the physics.
        :param int in_channels: channels that the filters see, 1 (gray) or 3 (colour).
        :param str complex_mode: ``"real_imag"`` or ``"real"``.
        :raises ValueError: if it is no batch of images, or not of these channels.
        """
        if not isinstance(image, Tensor) or image.ndim != 4:
            raise ValueError(
                "Images must be tensors of shape (B, C, H, W), got "
                f"{describe(image)}. Add the batch dimension with [None]; "
                "three-dimensional images are not supported."
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
        return cls(image.shape, image.is_complex(), is_complex, real)

    @property
    def complex_pair(self) -> bool:
        """Whether the two channels that are solved for are one complex image."""
        return self.is_complex and not self.real

    def extract(self, image: Tensor) -> Tensor:
        """Turns an image of the physics into what is solved for."""
        if self.complex_dtype:
            return image.real if self.real else torch.cat([image.real, image.imag], 1)
        return image[:, :1] if self.real else image

    def embed(self, x: Tensor) -> Tensor:
        """Turns what is solved for into an image of the physics."""
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
