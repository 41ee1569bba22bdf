"""Weights files: safetensors with a header that says what they are the weights of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

#: Names of the weights in this package, ``NAME.safetensors``, and what they are for.
BUNDLED = {
    "deal_gray": "DEALPrior",
    "deal_gray_64": "DEALPrior",
    "deal_color": "DEALPrior",
    "cpr_5": "SmoothPlusSparsePrior",
    "cpr_25": "SmoothPlusSparsePrior",
    "ncpr_5": "SmoothPlusSparsePrior",
    "ncpr_25": "SmoothPlusSparsePrior",
    "patch_25": "PatchSynthesisPrior",
    "mmr_5": "MMRPrior",
    "mmr_15": "MMRPrior",
    "mmr_25": "MMRPrior",
    "safi_5": "SAFIPrior",
    "safi_15": "SAFIPrior",
    "safi_25": "SAFIPrior",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Gives a temporary file to write, which replaces ``path`` if all went well.

    Whoever reads ``path``, or is left with it after a crash, finds a whole file.

    :param pathlib.Path path: the file to replace.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_weights(
    module: nn.Module, path: str | os.PathLike[str], header: Mapping[str, str]
) -> None:
    """
    Writes the weights of a module as ``.safetensors``, atomically.

    :param torch.nn.Module module: the module.
    :param str path: file to write.
    :param dict header: strings to store with the weights.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    with replacing(Path(path)) as temporary:
        # Not save_file, whose files nobody else may read.
        temporary.write_bytes(
            save(tensors, {"format": format_of(type(module)), **header})
        )


def read_weights(
    path: str | os.PathLike[str], kind: type[nn.Module]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    Reads a file written by :func:`write_weights`.

    :param str path: the file.
    :param type kind: class of the module.
    :return: the state dict and the header.
    :raises ValueError: if it is damaged or belongs to another class.
    """
    with _opened(path) as file:
        header = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    expected = format_of(kind)
    if header.get("format") != expected:
        raise ValueError(
            f"{path} is not a weights file of {kind.__name__}: its format is "
            f"{header.get('format')!r}, expected {expected!r}."
        )
    return state, header


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Opens a safetensors file; a damaged one is an error that names it."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}"
        ) from error


#: What stands around the name of the class in the header's entry ``format``.
_FORMAT = ("deepinv_deal.", "/1")


def format_of(kind: type[nn.Module]) -> str:
    """Returns the name of the format of a class, as it stands in the header."""
    return kind.__name__.join(_FORMAT)


def checked(module: Module, state: Mapping[str, Any], source: str) -> Module:
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


def bundled(kind: type[nn.Module]) -> list[str]:
    """Returns the names of the weights in this package that are for a class."""
    return [name for name, prior in BUNDLED.items() if prior == kind.__name__]


def owner(pretrained: str | os.PathLike[str]) -> str:
    """
    Returns the name of the class of prior whose weights a bundled name or file holds.

    :param str pretrained: a bundled name, or the path of a ``.safetensors`` file.
    :raises ValueError: if neither says it.
    :raises FileNotFoundError: if the file does not exist.
    """
    name = os.fspath(pretrained)
    if name in BUNDLED:
        return BUNDLED[name]
    if Path(name).suffix == ".safetensors":
        with _opened(_existing(name)) as file:
            header = file.metadata() or {}
        pattern = r"(\w+)".join(map(re.escape, _FORMAT))
        found = re.fullmatch(pattern, header.get("format", ""))
        if found:
            return found[1]
    raise ValueError(
        f"pretrained={name!r} does not say which model it is for. Bundled weights are "
        f"{', '.join(BUNDLED)}; files of this package are .safetensors."
    )


def find_weights(
    pretrained: str | os.PathLike[str],
    kind: type[nn.Module],
    *,
    also: Sequence[str] = (),
) -> Path:
    """
    Returns the file of a bundled name or path.

    :param str pretrained: a name in :func:`bundled`, or the path of a ``.safetensors``
        or ``.pth`` file.
    :param type kind: class of the module.
    :param list also: other names that the caller takes, for the error.
    :raises ValueError: for an unknown name, or one of another class.
    :raises FileNotFoundError: if the file does not exist.
    """
    name = os.fspath(pretrained)
    known = bundled(kind)
    if name in known:
        return Path(__file__).parent / f"{name}.safetensors"
    if name in BUNDLED:
        raise ValueError(
            f"pretrained={name!r} holds weights of a {BUNDLED[name]}, not of a "
            f"{kind.__name__}."
        )
    if Path(name).suffix not in (".safetensors", ".pth", ".pt"):
        names = "".join(f"{choice!r}, " for choice in (*known, *also))
        raise ValueError(
            f"pretrained={name!r} is unknown. Give {names}None (random weights), or "
            "the path of a .safetensors or .pth file."
        )
    return _existing(name)


def _existing(name: str) -> Path:
    """Returns the path of a weights file; a missing one is an error that names it."""
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"The weights file {name!r} does not exist.")
    return path
