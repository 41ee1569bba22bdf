"""The deepinv optimizer that runs a prior to its fixed point."""

from deepinv_deal.optim.fixed_point_optim import FixedPointOptim, FrozenIteration

__all__ = ["FixedPointOptim", "FrozenIteration"]
