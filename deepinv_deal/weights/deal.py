"""The weights of DEAL: reading, checking, converting and writing."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepinv_deal.operators.multi_conv import Normalization
from deepinv_deal.priors import DEALPrior
from deepinv_deal.weights.checkpoints import read_state_dict
from deepinv_deal.weights.files import (
    bundled,
    checked,
    find_weights,
    read_weights,
    write_weights,
)

#: Names that stand for two files, gray and colour.
BY_CHANNELS = ("bundled", "download")

#: Official weights of mehrsapo/DEAL (MIT), pinned by commit and git blob id.
_COMMIT = "4eec8298750ffebb3848e87e412c62aff6a9f411"
_OFFICIAL_URL = (
    "https://raw.githubusercontent.com/mehrsapo/DEAL/{}/trained_models/{}.pth"
)
_OFFICIAL_BLOBS = {
    "deal_gray": "a586e50fb384f9ff107a5593f91478bd840831cc",
    "deal_color": "ad07f22573e1852662e62ea239f2c30eec7c73ac",
}

#: Authors' parameter names, by ours. The last groups are plain renamings.
_AUTHORS_KEYS = {
    **{f"W.weight.{i}": f"W1.conv_layers.{i}.weight" for i in (1, 2)},
    **{f"mask_network.W.weight.{i}": f"M1.conv_layers.{i}.weight" for i in (1, 2)},
    "W.weight.0": "W1.conv_layers.0.parametrizations.weight.original",
    "mask_network.W.weight.0": "M1.conv_layers.0.parametrizations.weight.original",
    "mask_network.V.0": "M2.weight",
    "mask_network.V.1": "M3.weight",
    "mask_network.phi1.coefficients": "spline1.coefficients",
    "mask_network.phi2.coefficients": "spline2.coefficients",
    "mask_network.phi3.coefficients": "spline3.coefficients",
    "mask_network.scaling.coefficients": "spline_scaling.coefficients",
    "kappa.coefficients": "spline_lambda.coefficients",
}


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """
    Converts a state dict in the authors' layout to the layout of :class:`DEALPrior`.

    :param dict state: the authors' ``["state_dict"]``, or
        ``deepinv.models.DEAL(...).state_dict()``, with or without the prefix
        ``model.``. Buffers are ignored.
    :return: a state dict for :class:`deepinv_deal.priors.DEALPrior` with the norm rule
        ``"published"``.
    :raises ValueError: if parameters are missing.
    """
    state = {str(k).removeprefix("model."): v for k, v in state.items()}
    missing = sorted(
        k for k in _AUTHORS_KEYS.values() if not isinstance(state.get(k), Tensor)
    )
    if missing:
        raise ValueError(
            "The state dict is not in the layout of DEAL's authors: it lacks "
            f"{', '.join(missing[:4])}{', ...' * (len(missing) > 4)}. It holds "
            f"{', '.join(sorted(state)[:4]) or 'nothing'}, ..."
        )
    return {ours: state[theirs] for ours, theirs in _AUTHORS_KEYS.items()}


def to_authors_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Converts a state dict of :class:`DEALPrior` to the authors' layout.

    :param dict state: state dict of a prior with the norm rule ``"published"``.
    :return: parameters by the names of the authors' code and of
        ``deepinv.models.DEAL(...).model``; what these compute, their buffers, is left
        out.
    """
    return {theirs: state[ours] for ours, theirs in _AUTHORS_KEYS.items()}


def prior_from_state_dict(
    state: Mapping[str, Tensor],
    normalization: Normalization = "published",
    source: str = "state",
) -> DEALPrior:
    """
    Builds the prior that fits a state dict, after checking shapes and values.

    :param dict state: state dict of a :class:`DEALPrior`.
    :param str normalization: norm rule the weights were trained with.
    :param str source: what to call the weights in errors.
    :raises ValueError: for missing or extra entries, wrong shapes, NaN or infinity.
    """
    first, last = state.get("W.weight.0"), state.get("W.weight.2")
    if (
        not (isinstance(first, Tensor) and isinstance(last, Tensor))
        or first.ndim != 4
        or last.ndim != 4
    ):
        raise ValueError(
            f"{source} does not hold weights of a DEALPrior: no filters W.weight.0 and "
            "W.weight.2."
        )
    with torch.random.fork_rng(devices=[]):  # the random initial weights are replaced
        prior = DEALPrior(first.shape[1], last.shape[0], normalization)
    return checked(prior, state, source)


def save_prior(
    prior: DEALPrior,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """
    Writes a prior as ``.safetensors``, atomically.

    :param DEALPrior prior: the prior.
    :param str path: file to write.
    :param dict metadata: strings to store with the weights.
    """
    header = {"normalization": prior.normalization}
    write_weights(prior, path, {**header, **(metadata or {})})


def load_prior(pretrained: str | os.PathLike[str], in_channels: int = 1) -> DEALPrior:
    """
    Loads a prior by bundled name, ``"download"`` or file.

    :param str pretrained: a bundled name; ``"bundled"`` for ``"deal_gray"`` or
        ``"deal_color"``, by ``in_channels``; ``"download"`` for the official weights of
        the authors (fetched once, checked against their pinned content before use); or
        the path of a ``.safetensors`` file of this package or of a ``.pth`` file in the
        authors' layout (read without executing code).
    :param int in_channels: 1 or 3, chooses between gray and colour where the name does
        not.
    :raises ValueError: for an unknown name, a damaged or foreign file, or another
        number of channels where that has to choose.
    :raises FileNotFoundError: if the file does not exist.
    """
    if os.fspath(pretrained) in BY_CHANNELS:
        names = {1: "deal_gray", 3: "deal_color"}
        if in_channels not in names:
            raise ValueError(
                f"in_channels must be 1 or 3 for pretrained={pretrained!r}, got "
                f"{in_channels}. Others need weights of their own."
            )
        if pretrained == "download":
            return _load_pth(_download(names[in_channels]))
        pretrained = names[in_channels]
    path = find_weights(pretrained, DEALPrior, also=BY_CHANNELS)
    if path.suffix != ".safetensors":
        return _load_pth(path)
    state, header = read_weights(path, DEALPrior)
    normalization: Any = header.get("normalization")
    return prior_from_state_dict(state, normalization, str(path))


def _load_pth(path: Path) -> DEALPrior:
    checkpoint = read_state_dict(path)
    state = checkpoint if "W.weight.0" in checkpoint else convert_state_dict(checkpoint)
    return prior_from_state_dict(state, "published", str(path))


def _git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _download(name: str) -> Path:
    """
    Fetches official weights into torch's hub folder; content is checked before use.
    """
    from torch.hub import download_url_to_file, get_dir

    folder = Path(get_dir()) / "checkpoints"
    target = folder / f"deepinv_deal_{name}_{_COMMIT[:8]}.pth"
    if (
        not target.is_file()
        or _git_blob_id(target.read_bytes()) != _OFFICIAL_BLOBS[name]
    ):
        folder.mkdir(parents=True, exist_ok=True)
        url = _OFFICIAL_URL.format(_COMMIT, name)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            file = Path(temporary) / "weights.pth"
            try:
                download_url_to_file(url, str(file), progress=False)
            except OSError as error:
                raise OSError(
                    f"The official weights could not be downloaded from {url}: "
                    f"{error}. "
                    "The bundled weights need no network: "
                    f"{', '.join(map(repr, bundled(DEALPrior)))}."
                ) from error
            if _git_blob_id(file.read_bytes()) != _OFFICIAL_BLOBS[name]:
                raise ValueError(
                    f"The file at {url} is not the official one (its content differs "
                    "from "
                    "the pinned commit). Nothing was loaded."
                )
            os.replace(file, target)
    return target
