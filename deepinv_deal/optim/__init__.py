"""The deepinv optimizer that runs a prior to its fixed point."""

from deepinv_deal.optim.fixed_point_optim import FixedPointOptim, FrozenIteration
from deepinv_deal.problems.data_fidelity import CorrelatedL2, SmoothedL1, WeightedL2

__all__ = [
    "CorrelatedL2",
    "FixedPointOptim",
    "FrozenIteration",
    "SmoothedL1",
    "WeightedL2",
]
