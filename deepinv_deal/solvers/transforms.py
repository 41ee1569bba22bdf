"""Transformations of torch that no iterative solver survives: a clear word instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from deepinv_deal._warnings import warn

Method = TypeVar("Method", bound=Callable[..., Any])


def eager(method: Method) -> Method:
    """
    Keeps transformations of torch away from the forward pass of a model.

    A solver stops when it is accurate enough, each sample for itself, which cannot be
    recorded in a graph. Within ``torch.compile`` it runs without being compiled, with a
    warning; for all others there is an error that says what to do.

    :param Callable method: method of a :class:`torch.nn.Module`.
    """
    uncompiled = torch.compiler.disable(method)

    @wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = type(self).__name__
        if torch.compiler.is_compiling() and not _exporting():
            _say_not_compiled(name)
        else:
            _refuse_transforms(name, *args, *kwargs.values())
        return uncompiled(self, *args, **kwargs)

    return cast(Method, wrapper)


def _exporting() -> bool:
    """Returns whether ``torch.export`` is at work; older versions of torch tell not."""
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())


@torch.compiler.disable
def _say_not_compiled(name: str) -> None:
    warn(
        f"{name} is not compiled: a solver that stops by itself has no graph. It runs "
        "as it does without torch.compile, and what is around it is compiled."
    )


def _refuse_transforms(name: str, *arguments: Any) -> None:
    """
    Raises an error within transformations that are not supported.

    :param str name: name of the model, for the message.
    :param object arguments: arguments of the call.
    :raises RuntimeError: within ``torch.jit.trace``, ``torch.export``, ``torch.func``
        or ``torch.vmap``, or for arguments with forward-mode tangents.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(_message(name, "torch.jit.trace"))
    if _exporting():
        raise RuntimeError(_message(name, "torch.export"))
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise RuntimeError(
            f"{name} does not work within torch.func or torch.vmap. It takes batches "
            "as it is; for gradients use backward or torch.autograd.grad, for products "
            "with the Jacobian deepinv_deal.interpret.linearize."
        )
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{name} has no forward mode. Use backward or torch.autograd.grad; "
            "products with the Jacobian are those of deepinv_deal.interpret.linearize."
        )


def _message(name: str, transform: str) -> str:
    return (
        f"{transform} cannot record {name}: a solver stops when it is accurate enough, "
        "each sample for itself, which has no graph. Call the model as it is."
    )
