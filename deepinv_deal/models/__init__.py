"""What users import: reconstruction models, denoisers at the same time."""

from deepinv_deal.models.deal import DEAL, ReconstructionInfo
from deepinv_deal.models.patches import (
    PatchSynthesis,
    SmoothPlusSparse,
    SynthesisInfo,
)

__all__ = [
    "DEAL",
    "PatchSynthesis",
    "ReconstructionInfo",
    "SmoothPlusSparse",
    "SynthesisInfo",
]
