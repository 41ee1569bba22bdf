"""Where the public names are: what ``__init__.py`` imports on demand."""

from .attentive_l1 import AttentiveL1Trainer
from .curve import plot_learning_curve
from .data import (
    DenoisingSampler,
    Problems,
    load_image,
    load_image_folder,
    load_images,
)
from .deal import (
    AttentiveQuadraticTrainer,
    DEALTrainer,
)
from .dictionary import DictionaryTrainer
from .engine import Trainer
from .growth import color_from_gray, grow
from .losses import deal_loss, mask_drift
from .recipes import (
    AttentiveL1Recipe,
    DEALRecipe,
    DictionaryRecipe,
    Recipe,
    SingleLevelRecipe,
)
from .retune import retune_kappa

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
