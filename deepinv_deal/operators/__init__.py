"""Linear maps with exact adjoints."""

from deepinv_deal.operators.multi_conv import MultiConv, MultiConvOperator

__all__ = ["MultiConv", "MultiConvOperator"]
