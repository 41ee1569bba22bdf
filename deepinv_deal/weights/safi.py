"""The weights of SAFI and MMR: reading, checking, converting and writing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepinv_deal.priors.safi import AttentiveL1Prior, MMRPrior, SAFIPrior
from deepinv_deal.weights.checkpoints import read_state_dict
from deepinv_deal.weights.files import (
    checked,
    find_weights,
    read_weights,
    write_weights,
)

Prior = TypeVar("Prior", bound=AttentiveL1Prior)

#: Authors' parameter names, by ours. Transposed copies and ``cs`` of SAFI are unused.
_AUTHORS_KEYS: dict[type[AttentiveL1Prior], dict[str, str]] = {
    MMRPrior: {
        "lambda_reg": "lmbda",
        "W.weight.0": "W1.W1.weight",
        "W.weight.1": "W1.W1s.0.weight",
        "potential.G.0": "W2.W1.weight",
        "potential.G.1": "W2.W1s.0.weight",
        "potential.spline.coefficients": "phigrad_spline.coefficients",
        "potential.scale": "cs",
    },
    SAFIPrior: {
        "lambda_reg": "lmbda",
        "W.weight.0": "W1.W1.weight",
        "W.weight.1": "W1.W1s.0.weight",
        **{
            f"mask_network.V.{i}": f"{name}.weight"
            for i, name in enumerate(("W4.W1", "W2.W1", "W3.W1"))
        },
        **{
            f"mask_network.splines.{i}.coefficients": (
                f"phigrad_spline{i + 1}.coefficients"
            )
            for i in range(3)
        },
    },
}


def convert_l1_state_dict(
    state: Mapping[str, Any], kind: type[AttentiveL1Prior]
) -> dict[str, Tensor]:
    """
    Converts a state dict in the authors' layout to that of our priors.

    :param dict state: the authors' ``["state_dict"]``. Other entries are ignored.
    :param type kind: :class:`SAFIPrior` or :class:`MMRPrior`.
    :return: a state dict for ``kind``; raw parameters, constraints are ours to apply.
    :raises ValueError: if parameters are missing.
    """
    keys = _AUTHORS_KEYS[kind]
    missing = sorted(k for k in keys.values() if not isinstance(state.get(k), Tensor))
    if missing:
        raise ValueError(
            f"The state dict is not that of the authors' {kind.__name__[:-5]}: it "
            f"lacks {', '.join(missing[:4])}{', ...' * (len(missing) > 4)}. It holds "
            f"{', '.join(sorted(map(str, state))[:4]) or 'nothing'}, ..."
        )
    converted = {ours: state[theirs] for ours, theirs in keys.items()}
    converted["lambda_reg"] = converted["lambda_reg"].reshape(())
    if "potential.scale" in converted:
        converted["potential.scale"] = converted["potential.scale"].reshape(-1)
    return converted


def load_l1_prior(pretrained: str | os.PathLike[str], kind: type[Prior]) -> Prior:
    """
    Loads a SAFI or MMR prior by bundled name or file.

    :param str pretrained: a bundled name, or the path of a
        ``.safetensors`` file of this package or of a ``.pth`` file, read without
        executing code: a checkpoint of the authors, or the state dict of one of our
        priors.
    :param type kind: :class:`SAFIPrior` or :class:`MMRPrior`.
    :raises ValueError: for a damaged or foreign file.
    :raises FileNotFoundError: if the file does not exist.
    """
    path = find_weights(pretrained, kind)
    if path.suffix == ".safetensors":
        state, _ = read_weights(path, kind)
    else:
        state = dict(read_state_dict(path))
        if "W.weight.0" not in state:
            state = convert_l1_state_dict(state, kind)
    filters = state.get("W.weight.0")
    if not isinstance(filters, Tensor) or filters.ndim != 4:
        raise ValueError(f"{path} does not fit {kind.__name__}: no filters W.weight.0.")
    with torch.random.fork_rng(devices=[]):  # the random initial weights are replaced
        prior = kind(len(filters))
    return checked(prior, state, f"{path} does not fit {kind.__name__}")


def save_l1_prior(
    prior: AttentiveL1Prior,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """
    Writes a SAFI or MMR prior as ``.safetensors``, atomically.

    :param AttentiveL1Prior prior: the prior.
    :param str path: file to write.
    :param dict metadata: strings to store with the weights.
    """
    write_weights(prior, path, metadata or {})
