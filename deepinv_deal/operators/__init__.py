"""Linear maps with exact adjoints."""

from deepinv_deal.operators.multi_conv import MultiConv, MultiConvOperator
from deepinv_deal.operators.patches import PatchConv, PatchDictionary, PatchFrame
from deepinv_deal.operators.slices import Slices

__all__ = [
    "MultiConv",
    "MultiConvOperator",
    "PatchConv",
    "PatchDictionary",
    "PatchFrame",
    "Slices",
]
