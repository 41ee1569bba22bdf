"""Reading the authors' checkpoints of the patch models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepinv_deal.priors import PatchSynthesisPrior, SmoothPlusSparsePrior
from deepinv_deal.weights.checkpoints import read_checkpoint

Prior = TypeVar("Prior", PatchSynthesisPrior, SmoothPlusSparsePrior)

#: Noise levels of the published weights are in gray levels.
GRAY_LEVELS = 255.0

#: Authors' names of the penalties, by ours.
_PENALTIES = {"l1norm": "group", "l0norm": "weakly_convex"}


def load_patch_prior(path: str | os.PathLike[str], kind: type[Prior]) -> Prior:
    """
    Loads a checkpoint of the authors of the patch models.

    :param str path: ``.pth`` file with ``"state_dict"`` and ``"config"``, read without
        executing code.
    :param type kind: :class:`~deepinv_deal.priors.PatchSynthesisPrior` or
        :class:`~deepinv_deal.priors.SmoothPlusSparsePrior`.
    :return: the prior, with the penalty, hyperparameters and noise level of the file.
    :raises FileNotFoundError: if the file does not exist.
    :raises ValueError: if it is damaged or belongs to another model.
    """
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, Mapping) or not all(
        isinstance(checkpoint.get(key), Mapping) for key in ("state_dict", "config")
    ):
        raise ValueError(f"{path} must hold 'state_dict' and 'config' dictionaries.")
    return convert_patch_checkpoint(checkpoint, kind, str(path))


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
