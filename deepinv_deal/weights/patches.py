"""The weights of the patch models: reading, checking, converting and writing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepinv_deal.priors import PatchSynthesisPrior, SmoothPlusSparsePrior
from deepinv_deal.weights.checkpoints import read_checkpoint
from deepinv_deal.weights.files import (
    checked,
    find_weights,
    read_weights,
    write_weights,
)

Prior = TypeVar("Prior", PatchSynthesisPrior, SmoothPlusSparsePrior)

#: Noise levels of the published weights are in gray levels.
GRAY_LEVELS = 255.0

#: Authors' names of the penalties, by ours.
_PENALTIES = {"l1norm": "group", "l0norm": "weakly_convex"}


def load_patch_prior(pretrained: str | os.PathLike[str], kind: type[Prior]) -> Prior:
    """
    Loads a patch prior by bundled name or file.

    :param str pretrained: a bundled name, or the path of a
        ``.safetensors`` file of this package or of a ``.pth`` file of the authors, with
        ``"state_dict"`` and ``"config"``, read without executing code.
    :param type kind: :class:`~deepinv_deal.priors.PatchSynthesisPrior` or
        :class:`~deepinv_deal.priors.SmoothPlusSparsePrior`.
    :return: the prior, with the penalty, hyperparameters and noise level of the file.
    :raises FileNotFoundError: if the file does not exist.
    :raises ValueError: if it is damaged or belongs to another model.
    """
    path = find_weights(pretrained, kind)
    if path.suffix == ".safetensors":
        state, header = read_weights(path, kind)
        return patch_prior_from_state_dict(state, header, kind, str(path))
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, Mapping) or not all(
        isinstance(checkpoint.get(key), Mapping) for key in ("state_dict", "config")
    ):
        raise ValueError(f"{path} must hold 'state_dict' and 'config' dictionaries.")
    return convert_patch_checkpoint(checkpoint, kind, str(path))


def save_patch_prior(
    prior: PatchSynthesisPrior | SmoothPlusSparsePrior,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """
    Writes a patch prior as ``.safetensors``, atomically.

    :param PatchPrior prior: the prior.
    :param str path: file to write.
    :param dict metadata: strings to store with the weights.
    """
    header: dict[str, str] = {"boundary": prior.dictionary.boundary}
    if isinstance(prior, SmoothPlusSparsePrior):
        header |= {"penalty": prior.penalty_name, "order": repr(prior.order)}
    else:
        header |= {"mean": prior.mean}
    write_weights(prior, path, {**header, **(metadata or {})})


def patch_prior_from_state_dict(
    state: Mapping[str, Tensor],
    header: Mapping[str, Any],
    kind: type[Prior],
    source: str = "state",
) -> Prior:
    """
    Builds the patch prior that fits a state dict, after checking shapes and values.

    :param dict state: state dict of a prior.
    :param dict header: ``"boundary"`` and, for
        :class:`~deepinv_deal.priors.SmoothPlusSparsePrior`, ``"penalty"`` and
        ``"order"``, for the other ``"mean"``.
    :param type kind: class of the prior.
    :param str source: what to call the weights in errors.
    :raises ValueError: for missing or extra entries, wrong shapes, NaN or infinity.
    """
    atoms, free = (
        state.get(f"dictionary.{name}", torch.empty(0))
        for name in ("atoms", "free_atoms")
    )
    if atoms.ndim != 3 or free.ndim != 3:
        raise ValueError(
            f"{source} does not hold weights of a {kind.__name__}: no dictionary.atoms "
            "and dictionary.free_atoms."
        )
    size: dict[str, Any] = {"num_atoms": len(atoms), "patch_size": atoms.shape[-1]}
    options: dict[str, Any] = {"boundary": header.get("boundary")}
    if kind is SmoothPlusSparsePrior:
        size |= {"num_free_atoms": len(free)}
        options |= {
            "penalty": header.get("penalty"),
            "order": float(header.get("order", "nan")),
        }
    else:
        options |= {"mean": header.get("mean", "free")}
    with torch.random.fork_rng(devices=[]):  # the random initial weights are replaced
        return checked(kind(**size, **options), state, source)


def convert_patch_checkpoint(
    checkpoint: Mapping[str, Any], kind: type[Prior], source: str = "checkpoint"
) -> Prior:
    """
    Converts a checkpoint in the layout of the authors of the patch models.

    :param dict checkpoint: with entries ``"state_dict"`` and ``"config"``.
    :param type kind: see :func:`load_patch_prior`.
    :param str source: what to call the checkpoint in errors.
    :raises ValueError: if entries are missing, damaged or of another model.
    """
    state, config = checkpoint["state_dict"], checkpoint["config"]
    smooth = kind is SmoothPlusSparsePrior
    keys = ["atoms"]
    if smooth:
        keys += ["free_atoms", "beta", "prox.scaling_lmbda"]
    if set(state) != set(keys):
        other = "PatchSynthesis" if smooth else "SmoothPlusSparse"
        raise ValueError(
            f"{source} does not fit {kind.__name__}: it holds {sorted(state)}, "
            f"expected {sorted(keys)}. Is it a checkpoint of {other}?"
        )
    for key in keys:
        if not isinstance(state[key], Tensor) or not torch.isfinite(state[key]).all():
            raise ValueError(f"{source}: {key} holds NaN or infinity, or is no tensor.")
    atoms = _atoms(state["atoms"], "atoms", source)
    options, prox = config["dict_params"], config["prox_params"]
    sigma = config["sigma"] / GRAY_LEVELS
    with torch.random.fork_rng(devices=[]):  # the random initial weights are replaced
        if not smooth:
            prior: Any = PatchSynthesisPrior(
                len(atoms),
                atoms.shape[-1],
                beta=options["beta"],
                lambda_reg=prox["threshold"],
                sigma=sigma,
                mean="fixed",  # the files of "++" hold more, and are refused above
            )
        else:
            free_atoms = _atoms(state["free_atoms"], "free_atoms", source)
            name = _PENALTIES[prox["prox_type"]]
            if name == "group" and prox["groupsize"] == 1:
                name = "l1"
            prior = SmoothPlusSparsePrior(
                name,  # type: ignore[arg-type]
                len(atoms),
                atoms.shape[-1],
                len(free_atoms),
                order=prox["order"],
                beta=float(state["beta"]),
                lambda_reg=prox["lambda_init"],
                sigma=sigma,
            )
    with torch.no_grad():
        prior.dictionary.atoms.copy_(atoms)
        if smooth:
            prior.dictionary.free_atoms.copy_(free_atoms)
            scale = state["prox.scaling_lmbda"].flatten()
            # The authors' l1 thresholds fall with the learned scale, the others rise.
            prior.log_scale.copy_(scale if name == "weakly_convex" else -scale)
    return prior


def _atoms(atoms: Tensor, name: str, source: str) -> Tensor:
    if atoms.ndim != 4 or atoms.shape[1] != 1 or atoms.shape[2] != atoms.shape[3]:
        raise ValueError(
            f"{source}: {name} must have shape (number, 1, n, n), got "
            f"{tuple(atoms.shape)}."
        )
    rank = int(torch.linalg.matrix_rank(atoms.flatten(1)))
    if rank < 2:
        raise ValueError(f"{source}: {name} have rank {rank}; nothing can be learned.")
    return atoms[:, 0]
