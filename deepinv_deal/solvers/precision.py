"""Protection of solvers from the rounding of automatic mixed precision and TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def tf32_convolutions(device: torch.device, allowed: bool = True) -> Iterator[None]:
    """
    Allows or forbids that convolutions on a GPU round their inputs to 19 bits (TF32).

    PyTorch allows it by default. The switch belongs to the whole process; it is set
    back at the end of the block.

    :param torch.device device: where the convolutions are; without CUDA nothing is
        done.
    :param bool allowed: whether to allow it.
    """
    if device.type != "cuda":
        yield
        return
    switches = _switches(allowed)
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _switches(allowed: bool) -> list[tuple[Any, str, Any]]:
    """The switches of this torch for convolutions and matrix products, and a value."""
    convolution = getattr(torch.backends.cudnn, "conv", None)
    matrix = torch.backends.cuda.matmul
    if hasattr(convolution, "fp32_precision"):  # reading the older ones may then raise
        value = "tf32" if allowed else "ieee"
        return [(owner, "fp32_precision", value) for owner in (convolution, matrix)]
    return [(owner, "allow_tf32", allowed) for owner in (torch.backends.cudnn, matrix)]


#: Whether solvers may round, too. Like torch's own switches, it belongs to the whole
#: process: the thread that computes gradients on a GPU is not that of the caller.
_rough = False


@contextmanager
def rough_solvers(rough: bool = True) -> Iterator[None]:
    """
    Lets solvers in the block round to TF32 on GPUs that have it.

    For the steps of a training, which stop long before rounding matters.

    :param bool rough: whether to do so, or nothing.
    """
    global _rough
    before, _rough = _rough, rough or _rough
    try:
        yield
    finally:
        _rough = before


@contextmanager
def solver_precision(device: torch.device) -> Iterator[None]:
    """
    Computes in the dtype of the arguments, whatever the context says.

    :param torch.device device: where the arguments are.
    """
    # "meta" has none: the checks of the arguments then say what is wrong.
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    with torch.autocast(kind, enabled=False), tf32_convolutions(device, _rough):
        yield


def full_precision(method: Method) -> Method:
    """
    Keeps :class:`torch.autocast` and TF32 away from a method of a module.

    In a network, convolutions of fewer bits cost some rounding. In a solver they make
    an operator that no longer is the adjoint of the other, so that residuals stagnate
    far above the tolerance or the iteration never ends. The method computes in the
    dtype of its arguments, whatever the context of the call.

    :param Callable method: method of a :class:`torch.nn.Module`.
    """

    @wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weight = next(self.parameters(), torch.empty(0))
        with solver_precision(weight.device):
            return method(self, *args, **kwargs)

    return cast(Method, wrapper)
