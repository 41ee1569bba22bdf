"""Reading ``.pth`` files without executing code."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """
    Reads what a ``.pth`` file holds, if that is plain tensors.

    :param str path: the file.
    :raises FileNotFoundError: if it does not exist.
    :raises ValueError: if it is damaged or holds anything that would execute code.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The weights file {str(file)!r} does not exist.")
    try:
        with warnings.catch_warnings():
            # torch remarks on unusual pickle protocols; what it cannot read it refuses.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make its reader raise anything
        # Not the rest, which suggests to read the file without protection.
        reason = re.split(r"\. |\n", str(error).strip() or type(error).__name__)[0]
        raise ValueError(
            f"{file} cannot be read as a checkpoint of plain tensors: {reason}."
        ) from error


def read_state_dict(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """
    Reads a state dict, or the entry ``"state_dict"`` of a checkpoint.

    :param str path: the file.
    :raises FileNotFoundError: if it does not exist.
    :raises ValueError: if it is damaged or holds something else.
    """
    state = read_checkpoint(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict.")
    return state
