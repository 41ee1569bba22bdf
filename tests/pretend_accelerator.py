"""
A device for tests on machines without an accelerator: it computes on the CPU.

Its tensors say that they are on ``pretend:0``. Like those of a GPU they cannot be mixed
with tensors of the CPU, nor be read by NumPy, and code that asks for the device takes
the way of a GPU. What a GPU would do is counted: operations that would be launched,
reads for which the host would wait, and copies to the device.

Torch offers what this is made of, ``torch.utils.backend_registration``, since 2.9::

    import pretend_accelerator

    if pretend_accelerator.AVAILABLE:
        device = pretend_accelerator.register()
        model, y = model.to(device), y.to(device)
        with pretend_accelerator.counting() as counts:
            model(y)
        counts.launches, counts.waits, counts.where

Time, memory and streams are not pretended.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

#: Whether this version of torch has what it takes, and no accelerator of its own: with
#: two kinds of device, its engine of gradients asks this one for streams.
AVAILABLE = (
    hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
    and not torch.accelerator.is_available()
)

NAME = "pretend"

#: Operations that return a number or a size that depends on values.
READS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique_dim",
    "_unique2",
}

#: Operations that launch nothing.
VIEWS = {
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "view_as_complex",
    "view_as_real",
}


@dataclass
class Counts:
    """
    What a GPU would have done.

    :param int launches: operations.
    :param int waits: times that the host waits for a value.
    :param int transfers: tensors copied to the device.
    :param collections.Counter where: the waits and transfers by kind and line of code.
    """

    launches: int = 0
    waits: int = 0
    transfers: int = 0
    where: Counter[tuple[str, str]] = field(default_factory=Counter)

    def mark(self, kind: str) -> None:
        """Notes the innermost line outside of torch."""
        frame = sys._getframe(1)
        while frame.f_back is not None and _foreign(frame.f_code.co_filename):
            frame = frame.f_back
        self.where[kind, f"{frame.f_code.co_filename}:{frame.f_lineno}"] += 1


def _foreign(path: str) -> bool:
    return path == __file__ or "/torch/" in path or path.startswith("<")


_counts: list[Counts] = []


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Counts in the block."""
    counts = Counts()
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts.remove(counts)


@contextlib.contextmanager
def without_float64() -> Iterator[None]:
    """In the block, the device computes no double precision, like that of Apple."""
    _missing.add(torch.float64)
    try:
        yield
    finally:
        _missing.clear()


_missing: set[torch.dtype] = set()


def _count(what: str, kind: str = "") -> None:
    for counts in _counts:
        setattr(counts, what, getattr(counts, what) + 1)
        if kind:
            counts.mark(kind)


class PretendTensor(Tensor):
    """A tensor on the device, around one on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        wrapper.inner = inner
        return wrapper

    def __init__(self, inner: Tensor):
        pass

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.inner})"

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.numpy:
            raise TypeError(
                f"can't convert a {NAME} tensor to numpy: use .cpu() first."
            )
        if func is Tensor.backward:  # what it calls needs this method too
            kwargs["grad_tensors"] = kwargs.pop("gradient", None)
            return torch.autograd.backward(args[0], **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            # Torch would make the tensors of these in C++, which is out of reach.
            x, key, *value = args
            key = tuple(map(_index, key)) if isinstance(key, tuple) else _index(key)
            if value and not isinstance(value[0], Tensor):
                value = [x.detach().new_full((), value[0])]
            args = (x, key, *value)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _index(key: Any) -> Any:
    return torch.as_tensor(list(key)) if isinstance(key, list | range) else key


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation of which a tensor or the result is on the device."""
    name = func._schema.name.split("::")[-1]
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    there = [t for t in tensors if isinstance(t, PretendTensor)]
    here = [t for t in tensors if not isinstance(t, PretendTensor)]
    target = kwargs.get("device")
    stays = bool(there) if target is None else torch.device(target).type == NAME
    if name == "_to_copy":
        return _copy(func, args[0], kwargs, stays)
    if name in ("copy_", "_copy_from"):
        if there and here and isinstance(here[0], Tensor):
            to_device = isinstance(args[0], PretendTensor) == (name == "copy_")
            _count("transfers" if to_device else "waits", name)
    elif there and here and name.startswith(("index", "_index")):
        _count("transfers", name)
    elif there and any(t.ndim for t in here):
        shapes = [tuple(t.shape) for t in here]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two "
            f"devices, {NAME}:0 and cpu: {name} with cpu tensors of shapes {shapes}"
        )
    masks = name.startswith(("index", "_index")) and any(
        t.dtype in (torch.bool, torch.uint8)
        for t in tree_leaves(args[1:2])
        if isinstance(t, Tensor)
    )
    if there and (name in READS or masks):
        _count("waits", name)
    if stays and name not in VIEWS:
        _count("launches")
    outer = {id(t.inner): t for t in there}
    # The bits for lazy conjugates and negatives would get lost on the way.
    func = {
        "_conj": torch.ops.aten.conj_physical.default,
        "_neg_view": torch.ops.aten.neg.default,
    }.get(name, func)
    out = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))

    def wrapped(result: Any) -> Any:
        if not stays or not isinstance(result, Tensor):
            return result
        if result.dtype in _missing:
            raise TypeError(f"{NAME} has no {result.dtype}: {name}")
        # What works in place returns its argument.
        same = outer.get(id(result)) if func._schema.is_mutable else None
        return PretendTensor(result) if same is None else same

    return tree_map(wrapped, out)


def _copy(func: Any, x: Tensor, kwargs: Any, stays: bool) -> Tensor:
    was_there = isinstance(x, PretendTensor)
    if was_there and stays:
        _count("launches")
    elif was_there:
        _count("waits", "to the host")
    elif stays:
        _count("transfers", "to the device")
    source = x.inner if was_there else x
    out = func(source, **{k: v for k, v in kwargs.items() if k != "device"})
    if stays and out.dtype in _missing:
        raise TypeError(f"{NAME} has no {out.dtype}: copy")
    return PretendTensor(out) if stays else out


def _unwrapped(a: Any) -> Any:
    if isinstance(a, PretendTensor):
        return a.inner
    if isinstance(a, torch.device) and a.type == NAME:
        return torch.device("cpu")
    return a


_registered: list[Any] = []


def register() -> torch.device:
    """
    Makes the device known to torch, once, and returns it.

    :raises RuntimeError: if torch is too old, or there is another device.
    """
    device = torch.device
    if not _registered:
        if not AVAILABLE:
            raise RuntimeError(
                f"torch {torch.__version__} is older than 2.9, or it has a device."
            )

        class Module(backend_registration._DummyBackendModule):
            """What torch asks a device about."""

            def get_amp_supported_dtype(self) -> list[torch.dtype]:
                return [torch.float16, torch.bfloat16]

            def get_rng_state(self, device: Any = None) -> Tensor:
                return torch.get_rng_state()

            def set_rng_state(self, state: Tensor, device: Any = None) -> None:
                torch.set_rng_state(state)

        backend_registration._setup_privateuseone_for_python_backend(
            NAME, backend_module=Module()
        )
        library = torch.library.Library("_", "IMPL")
        library.fallback(
            lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1"
        )
        _registered.append(library)
        for name in ("tensor", "as_tensor"):
            _by_the_host(name)
    return device(NAME, 0)


def _by_the_host(name: str) -> None:
    """Lets a function that torch computes in C++ make its tensor on the CPU first."""
    original = getattr(torch, name)

    def function(data, *args, dtype=None, device=None, **kwargs):
        elsewhere = device is None or torch.device(device).type != NAME
        if elsewhere or isinstance(data, PretendTensor):
            return original(data, *args, dtype=dtype, device=device, **kwargs)
        return original(data, *args, dtype=dtype, **kwargs).to(device)

    setattr(torch, name, function)
