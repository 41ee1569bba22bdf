"""Protection of solvers from automatic mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

Method = TypeVar("Method", bound=Callable[..., Any])


def full_precision(method: Method) -> Method:
    """
    Keeps :class:`torch.autocast` away from a method of a module.

    In a network, 16-bit convolutions cost some rounding. In a solver they make an
    operator that no longer is the adjoint of the other, so that residuals stagnate far
    above the tolerance or the iteration never ends. The method computes in the dtype of
    its arguments, whatever the context of the call.

    :param Callable method: method of a :class:`torch.nn.Module`.
    """

    @wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weight = next(self.parameters(), torch.empty(0))
        with torch.autocast(weight.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, wrapper)
