"""Regularizers as deepinv priors: what is learned."""

from deepinv_deal.priors.attentive_quadratic import AttentiveQuadraticPrior
from deepinv_deal.priors.config import Configurable
from deepinv_deal.priors.deal import DEALPrior
from deepinv_deal.priors.patches import (
    PatchPrior,
    PatchSynthesisPrior,
    SmoothPlusSparsePrior,
)
from deepinv_deal.priors.safi import (
    AttentiveL1Prior,
    AttentiveMask,
    ConcavePotential,
    MMRPrior,
    SAFIPrior,
)
from deepinv_deal.problems import AttentiveL1, AttentiveQuadratic

__all__ = [
    "AttentiveL1",
    "AttentiveL1Prior",
    "AttentiveMask",
    "AttentiveQuadratic",
    "AttentiveQuadraticPrior",
    "ConcavePotential",
    "Configurable",
    "DEALPrior",
    "MMRPrior",
    "PatchPrior",
    "PatchSynthesisPrior",
    "SAFIPrior",
    "SmoothPlusSparsePrior",
]
