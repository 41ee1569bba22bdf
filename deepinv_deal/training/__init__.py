"""Training: data, loss and the recipes that reproduce the bundled weights."""

from lazy_loader import attach_stub

# As in deepinv_deal/__init__.py: the options of `deepinv-deal train` are made from
# training/recipes.py, which imports no torch.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
