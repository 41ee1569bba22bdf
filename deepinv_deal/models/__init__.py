"""What users import: reconstruction models, denoisers at the same time."""

from deepinv_deal.models.base import ReconstructionModel
from deepinv_deal.models.deal import DEAL
from deepinv_deal.models.info import (
    AttentiveL1Info,
    ReconstructionInfo,
    SynthesisInfo,
)
from deepinv_deal.models.patches import (
    PatchSynthesis,
    SmoothPlusSparse,
    SynthesisModel,
)
from deepinv_deal.models.safi import MMR, SAFI, AttentiveL1Model

__all__ = [
    "DEAL",
    "MMR",
    "SAFI",
    "AttentiveL1Info",
    "AttentiveL1Model",
    "PatchSynthesis",
    "ReconstructionInfo",
    "ReconstructionModel",
    "SmoothPlusSparse",
    "SynthesisInfo",
    "SynthesisModel",
]
