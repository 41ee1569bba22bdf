"""Regularizers as deepinv priors: what a model freezes."""

from deepinv_deal.priors.deal import DEALPrior

__all__ = ["DEALPrior"]
