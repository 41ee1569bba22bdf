"""Training: data, loss and the recipes that reproduce the bundled weights."""

from lazy_loader import attach_stub

# As in deepinv_deal/__init__.py: the options of `deepinv-deal train` are made from
# training/recipes.py, which imports no torch.
__getattr__, __dir__, _ = attach_stub(__name__, __file__)

__all__ = [
    "AttentiveL1Recipe",
    "AttentiveL1Trainer",
    "AttentiveQuadraticTrainer",
    "DEALRecipe",
    "DEALTrainer",
    "DenoisingSampler",
    "DictionaryRecipe",
    "DictionaryTrainer",
    "Problems",
    "Recipe",
    "SingleLevelRecipe",
    "Trainer",
    "color_from_gray",
    "deal_loss",
    "grow",
    "load_image",
    "load_image_folder",
    "load_images",
    "mask_drift",
    "plot_learning_curve",
    "retune_kappa",
]
