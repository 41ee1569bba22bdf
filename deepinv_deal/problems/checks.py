"""Checks of what a caller gives: every error names the argument and the way out."""

from __future__ import annotations

import math
from numbers import Number, Real
from typing import Any

import numpy as np
import torch
from deepinv.utils import TensorList
from torch import Tensor, nn

from deepinv_deal._warnings import warn

#: Precisions that models compute in.
DTYPES = (torch.float32, torch.float64)


def describe(value: Any) -> str:
    """Returns the shape of a tensor, the type of anything else."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {tuple(shape)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Tells a lack of memory, which torch reports as a RuntimeError, from others."""
    # The CPU's allocator has no class of its own for it.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("out of memory", "allocate memory")
    )


def is_noise_level(value: Any) -> bool:
    """Tells a noise level from a physics."""
    return isinstance(value, (Number, Tensor, np.ndarray, list, tuple, str))


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """
    Checks that an argument is one of some words.

    :param str name: name of the argument, for the message.
    :param object value: the argument.
    :param tuple choices: what is allowed.
    :raises ValueError: if it is another.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def check_floating(name: str, value: Any) -> None:
    """
    Checks that an argument is a tensor of real or complex floating point numbers.

    :param str name: name of the argument, for the message.
    :param torch.Tensor value: the argument.
    :raises TypeError: if it is none.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(
            f"{name} must be floating point, got {value.dtype}. Divide 8-bit images by "
            "255."
        )


def check_measurements(y: Any, reference: Tensor | None) -> None:
    """
    Checks that measurements are finite, floating and where the model is.

    :param torch.Tensor y: measurements, or a ``TensorList`` of them.
    :param torch.Tensor reference: any parameter of the model; ``None`` if it has none.
    :raises TypeError: if they are no floating or complex tensors, or the model is in a
        precision in which it cannot compute.
    :raises ValueError: for another dtype or device, no elements, NaN or infinity.
    """
    if reference is not None and reference.dtype not in DTYPES:
        raise TypeError(
            f"The model is in {reference.dtype}, in which Fourier transforms and "
            "residuals cannot be computed. Use model.float(); 16-bit convolutions in "
            "the inner solves are solver=SolverOptions(inner_dtype=torch.bfloat16)."
        )
    parts = list(y) if isinstance(y, TensorList) else [y]
    for part in parts:
        check_floating("y", part)
        if reference is not None and part.dtype.to_real() != reference.dtype:
            other = part.dtype.to_real()
            or_model = f" or model.to({other})" if other in DTYPES else ""
            raise ValueError(
                f"y has dtype {part.dtype}, the model {reference.dtype}. Convert "
                f"{'one' if or_model else 'it'}: y.to({reference.dtype}){or_model}."
            )
        if reference is not None and part.device != reference.device:
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


def per_sample(
    name: str, value: Any, like: Tensor, *, positive: bool = False
) -> Tensor:
    """
    Checks a number, or one per sample, and returns it as ``(B,)``.

    A parameter in training counts as zero where it is negative.

    :param str name: name of the argument, for the message.
    :param float, torch.Tensor value: the argument.
    :param torch.Tensor like: image batch ``(B, ...)``.
    :param bool positive: whether zero is refused, too.
    :raises TypeError: if it is no number or tensor.
    :raises ValueError: for a wrong length, a negative, NaN or infinite value.
    """
    if isinstance(value, Real):  # known here: no device is waited for
        checked = [float(value)]
        values = like.new_full((1,), float(value))
    else:
        if not isinstance(value, (Tensor, np.ndarray, list, tuple)):
            raise TypeError(
                f"{name} must be a number or a tensor, got {type(value).__name__}."
            )
        # Not by way of float32, which is what torch makes of a list.
        values = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        values = values.reshape(-1)
        if isinstance(value, nn.Parameter) and value.requires_grad:
            # A step of an optimizer may go below zero. The derivative is that at zero,
            # so that the next one can come back.
            values = values + (values.clamp_min(0) - values).detach()
        checked = values.detach().tolist()
    if len(values) not in (1, len(like)):
        raise ValueError(
            f"{name} must hold one value, or one per sample ({len(like)}), got "
            f"{len(values)}."
        )
    if not all(v >= 0 and math.isfinite(v) for v in checked):
        raise ValueError(
            f"{name} must not be negative and must be finite, got {checked}."
        )
    if positive and not all(v > 0 for v in checked):
        raise ValueError(f"{name} must be positive, got {checked}.")
    return values.expand(len(like))


def doubt_noise_level(level: Tensor, y: Tensor) -> None:
    """
    Warns of noise levels that cannot be in the unit of the image.

    :param torch.Tensor level: noise levels, ``(B,)``.
    :param torch.Tensor y: noisy images ``(B, C, H, W)``.
    """
    largest = y.detach().abs().flatten(1).amax(1)
    pairs = torch.stack([level.detach(), largest]).T.tolist()
    for sigma, size in pairs:
        if sigma > size > 0:
            warn(
                f"sigma={sigma:.4g} is larger than every value of the image (at most "
                f"{size:.4g}). Its unit is that of the image: for images in [0, 1], "
                "divide gray levels by 255."
            )
            return
