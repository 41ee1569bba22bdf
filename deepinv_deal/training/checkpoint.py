"""Checkpoints of a training: everything that is needed to go on exactly."""

from __future__ import annotations

import errno
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._atomic import replacing

#: Settings that may change between a run and its continuation.
FREE_SETTINGS = {
    "out",
    "data",
    "val",
    "device",
    "checkpoint_every",
    "time_budget",
    "val_every",
}


def write_checkpoint(path: Path, recipe: Any, state: dict[str, Any]) -> None:
    """
    Writes the state of a training, atomically.

    :param pathlib.Path path: file.
    :param Recipe recipe: its settings, which a continuation has to repeat.
    :param dict state: tensors, numbers, and lists and dictionaries of them.
    :raises OSError: if it cannot be written; the last checkpoint is kept.
    """
    content = _on_cpu({**state, "recipe": _comparable(recipe)})
    try:
        with replacing(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        raise OSError(
            f"The checkpoint {path} could not be written: {error}. The last one is "
            "kept: make room or mend the folder, and repeat the command to go on from "
            "it."
        ) from error


def read_checkpoint(path: Path, recipe: Any, processes: int) -> dict[str, Any]:
    """
    Reads the state of a training, on the CPU.

    :param pathlib.Path path: file.
    :param Recipe recipe: settings of the continuation.
    :param int processes: number of processes that go on.
    :raises ValueError: if the file is damaged, or the settings or the number of
        processes are others.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # it may be whole, but cannot be reached
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged and cannot be read ({reason}). Start anew (--restart, "
            "or resume=False), from best.safetensors beside it (init), if it is good."
        ) from error
    ours, theirs = _comparable(recipe), state["recipe"]
    # A setting that is newer than the file had no other value.
    differing = sorted(k for k in ours if k in theirs and theirs[k] != ours[k])
    if differing:
        changes = ", ".join(f"{k}: {theirs[k]} -> {ours[k]}" for k in differing)
        raise ValueError(
            f"{path} was written with other settings ({changes}). Use the same "
            "settings to resume, or another folder to start anew."
        )
    if len(state["pools"]) != processes:
        raise ValueError(
            f"{path} was written by {len(state['pools'])} process(es), and now there "
            f"are {processes}. Resume with as many, or start another training from its "
            "weights (init)."
        )
    return state


def _comparable(recipe: Any) -> dict[str, Any]:
    return {k: v for k, v in asdict(recipe).items() if k not in FREE_SETTINGS}


def _on_cpu(state: Any) -> Any:
    """Copies the tensors of a state: a checkpoint may be read on another machine."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_on_cpu(value) for value in state)
    return state
