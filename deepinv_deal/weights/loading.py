"""Reading and writing the weights of a prior."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from deepinv_deal.priors.attentive_quadratic import GRAY_LEVELS
from deepinv_deal.weights.files import (
    filled,
    read_checkpoint,
    read_weights,
    write_weights,
)
from deepinv_deal.weights.layouts import P, from_authors
from deepinv_deal.weights.registry import find


def load(
    pretrained: str | os.PathLike[str],
    prior_type: type[P],
    *,
    in_channels: int = 1,
    sigma: float | None = None,
) -> P:
    """
    Loads a prior by name or file, without executing code that the file holds.

    |sep|

    :Example:

    >>> from deepinv_deal.priors import MMRPrior
    >>> from deepinv_deal.weights import load
    >>> prior = load("mmr_15", MMRPrior)
    >>> round(255 * float(prior.sigma), 3)
    15.0

    :param str pretrained: a bundled name; ``"bundled"`` for ``"deal_gray"`` or
        ``"deal_color"``; ``"download"`` (DEAL) or ``"download_25"`` and the like for
        the authors' files, fetched once and checked against their pinned content; or
        the path of a ``.safetensors`` file that :func:`save` wrote or of a ``.pth``
        file of the authors. See :func:`names`.
    :param type prior_type: class of the prior: one of this package, or your own.
    :param int in_channels: 1 or 3, chooses between gray and colour where the name does
        not.
    :param float sigma: noise level in [0, 1] units at which a ``.pth`` file of one
        noise level was trained, where it does not say it: that of the registry or of
        the file if ``None``, else 25 / 255, the default of the constructors.
    :return: a prior with the settings of the file.
    :raises ValueError: for an unknown name, a damaged or foreign file, or settings
        that do not suit.
    :raises FileNotFoundError: if the file does not exist.
    :raises OSError: if a download fails.
    """
    path, level = find(pretrained, prior_type.__name__, in_channels)
    if path.suffix != ".safetensors":
        if sigma is None and level is not None:
            sigma = level / GRAY_LEVELS
        return from_authors(
            read_checkpoint(path), prior_type, sigma=sigma, source=str(path)
        )
    if sigma is not None:
        raise ValueError(
            f"sigma={sigma} is for .pth files, which may not say their noise level; "
            f"{path} does. Leave sigma out."
        )
    name = prior_type.__name__
    state, header = read_weights(path)
    if header["prior"] != name:
        raise ValueError(
            f"{path} is not a weights file of {name}: it holds weights of a "
            f"{header['prior']}."
        )
    try:
        config = json.loads(header["config"])
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced
            prior = prior_type(**config)
    # What a constructor does with arguments from a damaged header is not known.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be loaded: {name} was not built with the settings "
            f"{header['config']} of the file: {error}"
        ) from error
    return filled(prior, state, str(path))


def save(
    prior: P, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """
    Writes a prior as ``.safetensors``, atomically.

    The header holds the name of the class and the arguments of its constructor, as the
    method ``config`` of the prior says them.

    |sep|

    :Example:

    >>> import tempfile
    >>> from deepinv_deal.priors import SAFIPrior
    >>> from deepinv_deal.weights import load, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(SAFIPrior(num_filters=8), f"{folder}/weights.safetensors")
    ...     prior = load(f"{folder}/weights.safetensors", SAFIPrior)
    >>> prior.num_filters
    8

    :param Prior prior: a prior of this package, or your own.
    :param str path: file to write; its name must end in ``.safetensors``.
    :param dict metadata: strings to store with the weights.
    :raises ValueError: for another ending.
    :raises TypeError: if the settings of the prior cannot be stored.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(
            f"path={str(path)!r} must end in .safetensors, by which files of this "
            "package are known."
        )
    write_weights(prior, prior.config(), file, metadata or {})
