"""Weights files: safetensors with a header, and the authors' files of plain tensors."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from deepinv_deal._atomic import replacing

Module = TypeVar("Module", bound=nn.Module)

#: What the entry ``format`` of a header says.
FORMAT = "deepinv_deal/2"


def write_weights(
    module: nn.Module,
    config: Mapping[str, Any],
    path: Path,
    metadata: Mapping[str, str],
) -> None:
    """
    Writes the weights of a module as ``.safetensors``, atomically.

    :param torch.nn.Module module: the module.
    :param dict config: the arguments of its constructor.
    :param pathlib.Path path: file to write.
    :param dict metadata: strings to store with the weights.
    """
    header = {
        "format": FORMAT,
        "prior": type(module).__name__,
        "config": json.dumps(config),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    with replacing(path) as temporary:
        # Not save_file, whose files nobody else may read.
        temporary.write_bytes(to_bytes(tensors, {**metadata, **header}))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    Reads a file written by :func:`write_weights`.

    :param pathlib.Path path: the file.
    :return: the state dict and the header.
    :raises ValueError: if it is damaged or has no such header.
    """
    with _opened(path) as file:
        names = file.keys()  # the only way to iterate over such a file
        return {name: file.get_tensor(name) for name in names}, _header(file, path)


def read_header(path: Path) -> dict[str, str]:
    """
    Reads the header of a file written by :func:`write_weights`.

    :param pathlib.Path path: the file.
    :raises ValueError: if it is damaged or has no such header.
    """
    with _opened(path) as file:
        return _header(file, path)


def _header(file: Any, path: Path) -> dict[str, str]:
    """Returns the header of an open file, whose entries ``load`` needs."""
    header = file.metadata() or {}
    if header.get("format") != FORMAT or not {"prior", "config"} <= set(header):
        raise ValueError(
            f"{path} is not a weights file of this package: its format is "
            f"{header.get('format')!r}, expected {FORMAT!r} with the entries 'prior' "
            "and 'config'."
        )
    return header


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file; a damaged one is an error that names it."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}"
        ) from error


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """
    Reads what a ``.pth`` file holds, without executing code.

    :param pathlib.Path path: the file.
    :raises ValueError: if it is damaged or holds anything but plain tensors, numbers
        and texts by name.
    """
    try:
        with warnings.catch_warnings():
            # torch remarks on unusual pickle protocols; what it cannot read it refuses.
            warnings.simplefilter("ignore", UserWarning)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make its reader raise anything
        # Not the rest, which suggests to read the file without protection.
        reason = re.split(r"\. |\n", str(error).strip() or type(error).__name__)[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of plain tensors: {reason}."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, not a state dict."
        )
    return checkpoint


def filled(module: Module, state: Mapping[str, Any], source: str) -> Module:
    """
    Loads a state dict after checking entries, shapes and values.

    :param torch.nn.Module module: the module, unchanged if a check fails.
    :param dict state: its weights.
    :param str source: what to call the weights in errors.
    :return: the module.
    :raises ValueError: for missing or extra entries, wrong shapes, NaN or infinity.
    """
    expected = module.state_dict()
    if set(state) != set(expected):
        missing = sorted(set(expected) - set(state))
        extra = sorted(set(state) - set(expected))
        raise ValueError(
            f"{source}: missing entries {missing}, unknown entries {extra}."
        )
    for key, value in expected.items():
        found = getattr(state[key], "shape", type(state[key]).__name__)
        if found != value.shape:
            found = tuple(found) if isinstance(found, torch.Size) else found
            raise ValueError(
                f"{source}: {key} must have shape {tuple(value.shape)}, got {found}."
            )
        if not torch.isfinite(state[key]).all():
            raise ValueError(
                f"{source}: {key} holds NaN or infinity; the file is damaged."
            )
    module.load_state_dict(dict(state))
    return module
