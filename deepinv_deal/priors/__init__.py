"""Regularizers as deepinv priors: what a model freezes."""

from deepinv_deal.priors.attentive_l1 import AttentiveL1Equation
from deepinv_deal.priors.attentive_quadratic import (
    AttentiveEquation,
    AttentiveQuadratic,
    AttentiveQuadraticPrior,
)
from deepinv_deal.priors.config import Configurable
from deepinv_deal.priors.deal import DEALPrior
from deepinv_deal.priors.patches import (
    PatchPrior,
    PatchSynthesisPrior,
    SmoothPlusSparsePrior,
)
from deepinv_deal.priors.penalties import (
    GroupPenalty,
    L1Penalty,
    WeaklyConvexPenalty,
)
from deepinv_deal.priors.preconditioning import Preconditioning
from deepinv_deal.priors.safi import (
    AttentiveL1Prior,
    AttentiveMask,
    ConcavePotential,
    MMRPrior,
    SAFIPrior,
)

__all__ = [
    "AttentiveEquation",
    "AttentiveL1Equation",
    "AttentiveL1Prior",
    "AttentiveMask",
    "AttentiveQuadratic",
    "AttentiveQuadraticPrior",
    "ConcavePotential",
    "Configurable",
    "DEALPrior",
    "GroupPenalty",
    "L1Penalty",
    "MMRPrior",
    "PatchPrior",
    "PatchSynthesisPrior",
    "Preconditioning",
    "SAFIPrior",
    "SmoothPlusSparsePrior",
    "WeaklyConvexPenalty",
]
