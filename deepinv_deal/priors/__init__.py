"""Regularizers as deepinv priors: what a model freezes."""

from deepinv_deal.priors.deal import DEALPrior
from deepinv_deal.priors.patches import PatchSynthesisPrior, SmoothPlusSparsePrior
from deepinv_deal.priors.penalties import (
    GroupPenalty,
    L1Penalty,
    WeaklyConvexPenalty,
)
from deepinv_deal.priors.safi import MMRPrior, SAFIPrior

__all__ = [
    "DEALPrior",
    "GroupPenalty",
    "L1Penalty",
    "MMRPrior",
    "PatchSynthesisPrior",
    "SAFIPrior",
    "SmoothPlusSparsePrior",
    "WeaklyConvexPenalty",
]
