"""Telling the models apart, and the errors for those that do not fit."""

from __future__ import annotations

from typing import Any

import torch

from deepinv_deal.models import DEAL, AttentiveL1Model, SynthesisModel
from deepinv_deal.operators import MultiConvOperator
from deepinv_deal.priors import AttentiveL1Prior, AttentiveQuadraticPrior, PatchPrior

AttentiveModel = DEAL | AttentiveL1Model


def attentive(model: Any) -> AttentiveModel:
    """Checks that a model computes a mask."""
    if not isinstance(model, DEAL | AttentiveL1Model):
        raise TypeError(
            f"model must be DEAL, SAFI or MMR, got {type(model).__name__}, which has "
            "no mask. For dictionaries see deepinv_deal.interpret.atom_usage."
        )
    return model


def attentive_prior(model: Any) -> AttentiveQuadraticPrior | AttentiveL1Prior:
    """Returns the prior of a model that computes a mask."""
    return attentive(model).prior


def analysis_operator(model: Any) -> MultiConvOperator:
    """Returns the filters of a model that computes a mask."""
    prior = attentive_prior(model)
    if isinstance(prior, AttentiveL1Prior):
        return prior.bind().W
    return prior.regularizer(torch.zeros(1).to(next(prior.parameters()))).W


def dictionary_prior(model: Any) -> PatchPrior:
    """Returns the prior of a model with a dictionary."""
    if not isinstance(model, SynthesisModel):
        raise TypeError(
            "model must be PatchSynthesis or SmoothPlusSparse, got "
            f"{type(model).__name__}, which has no dictionary."
        )
    return model.prior
