"""Regularizers as deepinv priors: what a model freezes."""

from deepinv_deal.priors.deal import DEALPrior
from deepinv_deal.priors.safi import MMRPrior, SAFIPrior

__all__ = ["DEALPrior", "MMRPrior", "SAFIPrior"]
