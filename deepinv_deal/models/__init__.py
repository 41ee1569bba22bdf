"""What users import: reconstruction models, denoisers at the same time."""

from deepinv_deal.models.deal import DEAL
from deepinv_deal.models.info import ReconstructionInfo
from deepinv_deal.models.patches import (
    PatchSynthesis,
    SmoothPlusSparse,
    SynthesisInfo,
    SynthesisModel,
)
from deepinv_deal.models.problem import Problem
from deepinv_deal.models.safi import MMR, SAFI, AttentiveL1Info, AttentiveL1Model

__all__ = [
    "DEAL",
    "MMR",
    "SAFI",
    "AttentiveL1Info",
    "AttentiveL1Model",
    "PatchSynthesis",
    "Problem",
    "ReconstructionInfo",
    "SmoothPlusSparse",
    "SynthesisInfo",
    "SynthesisModel",
]
