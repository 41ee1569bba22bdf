"""The boundary between deepinv's physics and the solvers: checks, units, shapes."""

from __future__ import annotations

import math
import warnings
from numbers import Number
from typing import Any, Literal

import numpy as np
import torch
from deepinv.physics import Denoising, LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm

ComplexMode = Literal["real_imag", "real"]

#: An adjoint that is wrong by more than this, relative, is refused.
LARGEST_ADJOINT_ERROR = 1e-2

#: Accuracy and limit of the power iteration for the norm of a physics.
NORM_RTOL, NORM_MAX_ITER = 1e-4, 200


class ImageOperator:
    """
    The physics as a symmetric map on images that the filters can see.

    Complex images, given as two channels or as complex numbers, become two real
    channels (``complex_mode="real_imag"``) or their real part (``"real"``).

    The physics is tried on a random image: an ``A_adjoint`` that is not the adjoint of
    ``A`` raises, and an ``A_adjoint_A`` that is not their product is not used.

    :param deepinv.physics.LinearPhysics physics: forward operator, ``None`` to denoise.
    :param torch.Tensor y: measurements.
    :param int in_channels: channels the filters see.
    :param str complex_mode: ``"real_imag"`` or ``"real"``.
    :raises TypeError: if the physics is not linear or has no adjoint.
    :raises ValueError: if measurements, physics and filters do not fit together.
    """

    def __init__(self, physics: Any, y: Tensor, in_channels: int, complex_mode: str):
        if isinstance(physics, Physics) and not isinstance(physics, LinearPhysics):
            raise TypeError(
                f"physics must be linear, got {type(physics).__name__}, which is not a "
                "deepinv.physics.LinearPhysics: the data term is least squares."
            )
        if physics is not None and not hasattr(physics, "A_adjoint"):
            raise TypeError(
                "physics must be a deepinv.physics.LinearPhysics, got "
                f"{type(physics).__name__} without A_adjoint."
            )
        self.physics = physics
        self.denoising = physics is None or isinstance(physics, Denoising)
        self.notes: list[str] = []
        image = y if self.denoising else _adjoint(physics, y)
        if not isinstance(image, Tensor) or image.ndim != 4:
            raise ValueError(
                "Images must be tensors of shape (B, C, H, W), got "
                f"{describe(image)}. Add the batch dimension with [None]; "
                "three-dimensional images are not supported."
            )
        self.shape = image.shape
        self.complex_dtype = image.is_complex()
        channels = image.shape[1] * (2 if self.complex_dtype else 1)
        # A gray prior takes a two-channel image for real and imaginary part.
        self.is_complex = in_channels == 1 and channels == 2
        if channels != in_channels and not self.is_complex:
            hint = "gray" if in_channels == 1 else "colour"
            has = f"{image.shape[1]} {'complex ' * self.complex_dtype}channels"
            raise ValueError(
                f"The model has {hint} filters (in_channels={in_channels}), but the "
                f"image has {has} (shape {tuple(image.shape)}). Choose weights for "
                "images of this kind; DEAL(in_channels=3) has some for colour."
            )
        self.real = self.is_complex and complex_mode == "real"
        self.b = self.extract(image)
        self.composed = False
        if physics is not None and not self.denoising:
            self._try_out()

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

    def A_adjoint(self, y: Tensor) -> Tensor:  # noqa: ARG002 - known since construction
        """Returns the right-hand side."""
        return self.b

    def A_adjoint_A(self, x: Tensor) -> Tensor:
        """Applies the normal operator."""
        if self.denoising:
            return x
        image = self.embed(x)
        if self.composed:
            return self.extract(self.physics.A_adjoint(self.physics.A(image)))
        return self.extract(self.physics.A_adjoint_A(image))

    @torch.no_grad()
    def sqnorm(self) -> Tensor:
        """
        Returns the squared norm of the physics for every sample, ``(B,)``.

        :meth:`deepinv.physics.LinearPhysics.compute_sqnorm` would give one number for
        the whole batch.
        """
        v = self._random_images(1)[0]
        value = torch.zeros_like(self.b[:, 0, 0, 0])
        for _ in range(NORM_MAX_ITER):
            v = self.A_adjoint_A(v / expand(norm(v), v))
            previous, value = value, norm(v)
            if not ((value - previous).abs() > NORM_RTOL * value).any():
                break
        return value

    def _random_images(self, number: int) -> Tensor:
        """Images ``(number, B, C, H, W)``, the same for every sample and call."""
        rng = torch.Generator().manual_seed(0)
        shape = (number, 1, *self.b.shape[1:])
        v = torch.randn(shape, generator=rng, dtype=self.b.dtype, device="cpu")
        v = v.to(self.b.device)
        return v.expand(-1, len(self.b), *self.b.shape[1:]).contiguous()

    @torch.no_grad()
    def _try_out(self) -> None:
        u, v = (self.embed(x) for x in self._random_images(2))
        v = u + v
        name = type(self.physics).__name__
        Au, Av = self.physics.A(u), self.physics.A(v)
        product = self.physics.A_adjoint(Au)
        error = (_inner(Au, Av) - inner(product, v)).abs()
        size = (_inner(Au, Au) * _inner(Av, Av)).sqrt()
        worst = float((error / size.where(size > 0, 1)).max())
        if not worst <= LARGEST_ADJOINT_ERROR:
            raise ValueError(
                f"physics {name} is not linear, or its A_adjoint is not the adjoint of "
                f"its A: <A u, A v> and <A_adjoint A u, v> differ by {worst:.1e} "
                "(relative) on random images. Try physics.adjointness_test(u)."
            )
        tolerance = 1e3 * torch.finfo(self.b.dtype).eps
        if worst > tolerance:
            self.notes.append(
                f"A_adjoint is only approximately the adjoint of A (relative error "
                f"{worst:.1e}), so the solution is approximate too."
            )
        if not hasattr(self.physics, "A_adjoint_A"):
            self.composed = True
            return
        difference = norm(self.physics.A_adjoint_A(u) - product)
        if bool((difference > tolerance * norm(product)).any()):
            self.composed = True
            self.notes.append(
                f"A_adjoint_A of {name} is not A_adjoint times A, the product is used."
            )


def intensity(scale: float | str | None, operator: ImageOperator) -> Tensor:
    """
    Returns the intensity of the images, ``(B,)``, by which data are to be divided.

    :param float, str scale: the number itself; ``None`` for 1; or ``"auto"``: a power
        of ten where the intensity is far from [0, 1], with a note.
    :param ImageOperator operator: the problem.
    """
    b = operator.b.detach()
    ones = b.new_ones(len(b))
    if scale is None:
        return ones
    if not isinstance(scale, str):
        return scale * ones
    with torch.no_grad():
        # x is about t A^T y with the step t of steepest descent, whatever ||A|| is.
        gain = inner(b, operator.A_adjoint_A(b))
        t = (inner(b, b) / gain).where(gain > 0, ones)
        size = t * b.abs().flatten(1).amax(1)
        decade = 10 ** (size / 2).log10().ceil()
    factor = decade.where((size > 0) & size.isfinite(), ones)
    if (factor != 1).any():
        operator.notes.append(
            "The intensity is far from [0, 1]: data were divided by "
            f"{factor.tolist()} and the result multiplied by it (scale='auto')."
        )
    return factor


def _inner(a: Any, b: Any) -> Tensor:
    """Inner product of measurements per sample, ``(B,)``."""
    if isinstance(a, TensorList):
        return torch.stack([inner(u, v) for u, v in zip(a, b, strict=True)]).sum(0)
    return inner(a, b)


def _adjoint(physics: Any, y: Any) -> Any:
    shape = (
        [tuple(part.shape) for part in y] if isinstance(y, TensorList) else describe(y)
    )
    try:
        image = physics.A_adjoint(y)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(
            f"y of {shape} does not fit the physics {type(physics).__name__}: {error}"
        ) from error
    first = y[0] if isinstance(y, TensorList) else y
    if isinstance(image, Tensor) and image.ndim == 4 and len(image) != len(first):
        raise ValueError(
            f"y of {shape} holds {len(first)} samples, but the physics makes "
            f"{len(image)} images of it (shape {tuple(image.shape)}). Add the batch or "
            "channel dimension that y lacks."
        )
    return image


def is_noise_level(value: Any) -> bool:
    """Tells a noise level from a physics."""
    return isinstance(value, (Number, Tensor, np.ndarray, list, tuple, str))


def describe(value: Any) -> str:
    """Returns the shape of a tensor, the type of anything else."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {tuple(shape)}"


def check_measurements(y: Any, reference: Tensor) -> None:
    """
    Checks that measurements are finite, floating and where the model is.

    :param torch.Tensor y: measurements, or a ``TensorList`` of them.
    :param torch.Tensor reference: any parameter of the model.
    :raises TypeError: if they are no floating or complex tensors.
    :raises ValueError: for another dtype or device, no elements, NaN or infinity.
    """
    parts = list(y) if isinstance(y, TensorList) else [y]
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"y must be a torch.Tensor, got {type(part).__name__}.")
        if not (part.is_floating_point() or part.is_complex()):
            raise TypeError(
                f"y must be floating point, got {part.dtype}. Divide 8-bit images by "
                "255."
            )
        if part.dtype.to_real() != reference.dtype:
            raise ValueError(
                f"y has dtype {part.dtype}, the model {reference.dtype}. Convert one: "
                f"y.to({reference.dtype}) or model.to({part.dtype.to_real()})."
            )
        if part.device != reference.device:
            raise ValueError(
                f"y is on {part.device}, the model on {reference.device}. Move one of "
                "them."
            )
        if part.ndim == 0 or part.numel() == 0:
            raise ValueError(f"y is empty: shape {tuple(part.shape)}.")
        if not torch.isfinite(part).all():
            raise ValueError(
                "y holds NaN or infinity. Remove or mask these measurements."
            )


def check_image(name: str, image: Any, operator: ImageOperator) -> Tensor:
    """
    Checks that an argument is an image of the physics.

    :param str name: name of the argument, for the message.
    :param torch.Tensor image: the argument.
    :param ImageOperator operator: tells the shape.
    :raises ValueError: if it is not.
    """
    if not isinstance(image, Tensor) or image.shape != operator.shape:
        raise ValueError(
            f"{name} must be an image of shape {tuple(operator.shape)}, got "
            f"{describe(image)}."
        )
    if image.is_complex() != operator.complex_dtype:
        kinds = ("real", "complex")
        raise ValueError(
            f"{name} must be {kinds[operator.complex_dtype]} as the images of the "
            f"physics, got {image.dtype}."
        )
    return image


def check_init(image: Any, operator: ImageOperator) -> Tensor:
    """
    Checks a first image and returns it as what is solved for.

    :param torch.Tensor image: the argument ``init``.
    :param ImageOperator operator: tells the shape.
    :raises ValueError: if it is no image of the physics, or not finite.
    """
    x0 = operator.extract(check_image("init", image, operator))
    if not torch.isfinite(x0).all():
        raise ValueError("init holds NaN or infinity.")
    return x0


def check_complex_mode(complex_mode: str) -> None:
    """
    Checks how complex images are to be treated.

    :param str complex_mode: the argument.
    :raises ValueError: if it is not ``"real_imag"`` or ``"real"``.
    """
    if complex_mode not in ("real_imag", "real"):
        raise ValueError(
            f"complex_mode must be 'real_imag' or 'real', got {complex_mode!r}."
        )


def doubt_noise_level(level: Tensor, y: Tensor, stacklevel: int) -> None:
    """
    Warns of noise levels that cannot be in the unit of the image.

    :param torch.Tensor level: noise levels, ``(B,)``.
    :param torch.Tensor y: noisy images ``(B, C, H, W)``.
    :param int stacklevel: as in ``warnings.warn``.
    """
    largest = y.detach().abs().flatten(1).amax(1)
    level = level.detach()
    wrong = ((level > largest) & (largest > 0)).nonzero().flatten().tolist()
    if wrong:
        i = wrong[0]
        warnings.warn(
            f"sigma={level[i].item():.4g} is larger than every value of the image (at "
            f"most {largest[i].item():.4g}). Its unit is that of the image: for images "
            "in [0, 1], divide gray levels by 255.",
            stacklevel=stacklevel + 1,
        )


def per_sample(name: str, value: Any, like: Tensor) -> Tensor:
    """
    Checks a number, or one per sample, and returns it as ``(B,)``.

    :param str name: name of the argument, for the message.
    :param float, torch.Tensor value: the argument.
    :param torch.Tensor like: image batch ``(B, ...)``.
    :raises TypeError: if it is no number or tensor.
    :raises ValueError: for a wrong length, a negative, NaN or infinite value.
    """
    try:
        values = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        values = values.reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a number or a tensor, got {type(value).__name__}."
        ) from error
    if len(values) not in (1, len(like)):
        raise ValueError(
            f"{name} must hold one value, or one per sample ({len(like)}), got "
            f"{len(values)}."
        )
    checked = values.detach()
    if not bool((checked >= 0).all()) or not math.isfinite(float(checked.sum())):
        raise ValueError(
            f"{name} must not be negative and must be finite, got {checked.tolist()}."
        )
    return values.expand(len(like))
