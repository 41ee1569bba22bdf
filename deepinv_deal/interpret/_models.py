"""Telling the models apart, and the errors for those that do not fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepinv_deal.models import DEAL, AttentiveL1Model, SynthesisModel
from deepinv_deal.priors import AttentiveL1Prior, DEALPrior, PatchPrior

AttentiveModel = DEAL | AttentiveL1Model


def attentive(model: Any) -> AttentiveModel:
    """Checks that a model computes a mask."""
    if not isinstance(model, DEAL | AttentiveL1Model):
        raise TypeError(
            f"model must be DEAL, SAFI or MMR, got {type(model).__name__}, which has "
            "no mask. For dictionaries see deepinv_deal.interpret.atom_usage."
        )
    return model


def attentive_prior(model: Any) -> DEALPrior | AttentiveL1Prior:
    """Returns the prior of a model that computes a mask."""
    return attentive(model).prior[0]


def dictionary_prior(model: Any) -> PatchPrior:
    """Returns the prior of a model with a dictionary."""
    if not isinstance(model, SynthesisModel):
        raise TypeError(
            "model must be PatchSynthesis or SmoothPlusSparse, got "
            f"{type(model).__name__}, which has no dictionary."
        )
    return model.prior


def one_sample(name: str, x: Tensor) -> Tensor:
    """Checks that a batch holds one sample."""
    if len(x) != 1:
        raise ValueError(
            f"{name} must hold one sample, got {len(x)} (shape {tuple(x.shape)}). "
            f"Examine them one by one: {name}[i : i + 1]."
        )
    return x
