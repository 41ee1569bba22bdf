"""What users import: reconstruction models, denoisers at the same time."""

from deepinv_deal.models.deal import DEAL, ReconstructionInfo
from deepinv_deal.models.patches import (
    PatchSynthesis,
    SmoothPlusSparse,
    SynthesisInfo,
)
from deepinv_deal.models.safi import MMR, SAFI, AttentiveL1Info

__all__ = [
    "DEAL",
    "MMR",
    "SAFI",
    "AttentiveL1Info",
    "PatchSynthesis",
    "ReconstructionInfo",
    "SmoothPlusSparse",
    "SynthesisInfo",
]
