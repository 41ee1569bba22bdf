"""The layouts of the authors' files, and their conversion from and to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from deepinv.optim.prior import Prior
from torch import Tensor

from deepinv_deal.priors import (
    DEALPrior,
    MMRPrior,
    PatchSynthesisPrior,
    SAFIPrior,
    SmoothPlusSparsePrior,
)
from deepinv_deal.priors.attentive_quadratic import GRAY_LEVELS
from deepinv_deal.weights.files import filled

P = TypeVar("P", bound=Prior)

#: Converts an entry; the prior that it belongs to may matter.
Conversion = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Entry:
    """
    An entry of a state dict that the authors store in another form.

    :param str name: their name.
    :param Callable ours: from their form to ours, given the prior too.
    :param Callable theirs: from our form to theirs, given the prior too.
    """

    name: str
    ours: Conversion = lambda t, _: t
    theirs: Conversion = lambda t, _: t


@dataclass(frozen=True)
class Layout:
    """
    What a checkpoint of the authors holds.

    :param dict entries: their names, by ours.
    :param Callable settings: arguments of our constructor for their state dict and
        settings.
    :param bool level: whether the constructor takes the noise level ``sigma`` too.
    :param tuple also: other entries that there may be; ``None``: any, which are copies
        and constants.
    """

    entries: Mapping[str, str | Entry]
    settings: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Any]]
    level: bool = True
    also: tuple[str, ...] | None = None

    def items(self) -> list[tuple[str, Entry]]:
        """Returns our names and the entries."""
        return [
            (name, Entry(entry) if isinstance(entry, str) else entry)
            for name, entry in self.entries.items()
        ]


def _deal_settings(
    state: Mapping[str, Tensor],
    _: Mapping[str, Any],
) -> dict[str, Any]:
    first = state["W1.conv_layers.0.parametrizations.weight.original"]
    return {
        "in_channels": first.shape[1],
        "num_filters": len(state["W1.conv_layers.2.weight"]),
        "normalization": "published",
    }


_DEAL = Layout(
    {
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
    },
    _deal_settings,
    level=False,
)


def _l1_settings(
    state: Mapping[str, Tensor],
    _: Mapping[str, Any],
) -> dict[str, Any]:
    return {"num_filters": len(state["W1.W1.weight"])}


_L1_ENTRIES: dict[str, str | Entry] = {
    "lambda_reg": Entry(
        "lmbda", lambda t, _: t.squeeze(), lambda t, _: t.reshape(1, 1)
    ),
    "W.weight.0": "W1.W1.weight",
    "W.weight.1": "W1.W1s.0.weight",
}

_MMR = Layout(
    {
        **_L1_ENTRIES,
        "potential.G.0": "W2.W1.weight",
        "potential.G.1": "W2.W1s.0.weight",
        "potential.spline.coefficients": "phigrad_spline.coefficients",
        "potential.scale": Entry(
            "cs", lambda t, _: t.flatten(), lambda t, _: t.reshape(1, -1, 1, 1)
        ),
    },
    _l1_settings,
)

_SAFI = Layout(
    {
        **_L1_ENTRIES,
        **{f"mask_network.V.{i}": f"W{n}.W1.weight" for i, n in enumerate("423")},
        **{
            f"mask_network.splines.{i}.coefficients": (
                f"phigrad_spline{i + 1}.coefficients"
            )
            for i in range(3)
        },
    },
    _l1_settings,
)


def _atoms(name: str) -> Entry:
    return Entry(name, lambda t, _: t.squeeze(1), lambda t, _: t.unsqueeze(1))


def _patch_settings(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "num_atoms": len(state["atoms"]),
        "patch_size": state["atoms"].shape[-1],
        "beta": _setting(config, "dict_params", "beta"),
        "lambda_reg": _setting(config, "prox_params", "threshold"),
        # Where means are free, training needs the inverse of a matrix, and keeps it.
        "mean": "free" if "A" in state else "fixed",
    }


_PATCH = Layout({"dictionary.atoms": _atoms("atoms")}, _patch_settings, also=("A",))


def _smooth_settings(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Any]:
    kind = _setting(config, "prox_params", "prox_type")
    penalties = {"l1norm": "group", "l0norm": "weakly_convex"}
    if kind not in penalties:
        raise ValueError(f"prox_type must be one of {list(penalties)}, got {kind!r}")
    grouped = kind != "l1norm" or _setting(config, "prox_params", "groupsize") != 1
    return {
        "penalty": penalties[kind] if grouped else "l1",
        "num_atoms": len(state["atoms"]),
        "patch_size": state["atoms"].shape[-1],
        "num_free_atoms": len(state["free_atoms"]),
        "order": _setting(config, "prox_params", "order"),
        "lambda_reg": _setting(config, "prox_params", "lambda_init"),
    }


def _log_scale(scale: Tensor, prior: SmoothPlusSparsePrior) -> Tensor:
    # The authors' l1 thresholds fall with the learned scale, the others rise.
    return scale if prior.penalty_name == "weakly_convex" else -scale


_SMOOTH = Layout(
    {
        "dictionary.atoms": _atoms("atoms"),
        "dictionary.free_atoms": _atoms("free_atoms"),
        "log_beta": Entry("beta", lambda t, _: t.log(), lambda t, _: t.exp()),
        "log_scale": Entry(
            "prox.scaling_lmbda",
            lambda t, prior: _log_scale(t.flatten(), prior),
            lambda t, prior: _log_scale(t, prior).reshape(1, -1, 1, 1),
        ),
    },
    _smooth_settings,
    also=(),
)

LAYOUTS: dict[type, Layout] = {
    DEALPrior: _DEAL,
    MMRPrior: _MMR,
    SAFIPrior: _SAFI,
    PatchSynthesisPrior: _PATCH,
    SmoothPlusSparsePrior: _SMOOTH,
}


def _setting(config: Mapping[str, Any], *names: str) -> Any:
    """Returns a setting of the authors; a missing one is an error that names it."""
    value: Any = config
    for name in names:
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"its 'config' has no {'.'.join(names)}")
        value = value[name]
    return value


def _layout(prior_type: type) -> Layout:
    if prior_type not in LAYOUTS:
        raise ValueError(
            f"There is no layout of authors for {prior_type.__name__}, only for "
            f"{', '.join(kind.__name__ for kind in LAYOUTS)}. Give a .safetensors file "
            "written by deepinv_deal.weights.save."
        )
    return LAYOUTS[prior_type]


def from_authors(
    checkpoint: Mapping[str, Any],
    prior_type: type[P],
    *,
    sigma: float | None = None,
    source: str = "The checkpoint",
) -> P:
    """
    Returns the prior of a checkpoint in the authors' layout.

    |sep|

    :Example:

    >>> import deepinv as dinv
    >>> from deepinv_deal.priors import DEALPrior
    >>> from deepinv_deal.weights import from_authors
    >>> model = dinv.models.DEAL(pretrained=None)
    >>> from_authors(model.state_dict(), DEALPrior).num_filters
    128

    :param dict checkpoint: a state dict, for example
        ``deepinv.models.DEAL(...).state_dict()``, or what a file holds: the entries
        ``"state_dict"`` and, needed for the patch models, ``"config"``.
    :param type prior_type: class of the prior, one of this package.
    :param float sigma: noise level of the training in [0, 1] units, for priors that
        have one; ``None``: that in ``"config"``, or the constructor's default.
    :param str source: what to call the checkpoint in errors.
    :raises ValueError: if entries are missing, damaged or of another model.
    """
    layout, name = _layout(prior_type), prior_type.__name__
    state, config = checkpoint.get("state_dict", checkpoint), checkpoint.get("config")
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} holds a {type(state).__name__}, not a state dict.")
    state = {str(key).removeprefix("model."): value for key, value in state.items()}
    theirs = [entry.name for _, entry in layout.items()]
    missing = [key for key in theirs if not isinstance(state.get(key), Tensor)]
    extra = [] if layout.also is None else sorted({*state} - {*theirs, *layout.also})
    if missing or extra:
        what = "lacks" if missing else "also holds"
        keys = missing or extra
        raise ValueError(
            f"{source} is not in the layout of {name}'s authors: it {what} "
            f"{', '.join(keys[:4])}{', ...' * (len(keys) > 4)}. It holds "
            f"{', '.join(sorted(state)[:4]) or 'nothing'}, ..."
        )
    config = config if isinstance(config, Mapping) else {}
    try:
        settings = layout.settings(state, config)
        if layout.level and sigma is None and "sigma" in config:
            sigma = config["sigma"] / GRAY_LEVELS
        if sigma is not None:
            settings["sigma"] = sigma
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced
            prior = prior_type(**settings)
        ours = {
            key: entry.ours(state[entry.name], prior) for key, entry in layout.items()
        }
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{source} does not fit {name}: {error}.") from error
    return filled(prior, {**prior.state_dict(), **ours}, source)


def to_authors(prior: Prior) -> dict[str, Tensor]:
    """
    Returns the weights of a prior as the authors' code names them.

    For DEAL that is also what ``deepinv.models.DEAL(...).model`` has. Copies, buffers
    and settings that their files hold beside the parameters are left out.

    |sep|

    :Example:

    >>> from deepinv_deal.priors import MMRPrior
    >>> from deepinv_deal.weights import to_authors
    >>> to_authors(MMRPrior(num_filters=8))["cs"].shape
    torch.Size([1, 8, 1, 1])

    :param Prior prior: a prior of this package.
    :return: a state dict.
    :raises ValueError: for other priors, and norm rules that their code does not have.
    """
    layout = _layout(type(prior))
    if isinstance(prior, DEALPrior) and prior.normalization != "published":
        raise ValueError(
            "The authors' code has the norm rule 'published' only, the weights have "
            f"normalization={prior.normalization!r}."
        )
    state = prior.state_dict()
    return {
        entry.name: entry.theirs(state[key], prior) for key, entry in layout.items()
    }
