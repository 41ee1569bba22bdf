"""
Weights of priors: by name, from files of this package, and from those of the authors.
"""

from deepinv_deal.weights.layouts import from_authors, to_authors
from deepinv_deal.weights.loading import load, save
from deepinv_deal.weights.registry import BUNDLED, OFFICIAL, names, owner

__all__ = [
    "BUNDLED",
    "OFFICIAL",
    "from_authors",
    "load",
    "names",
    "owner",
    "save",
    "to_authors",
]
