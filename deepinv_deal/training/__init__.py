"""Training: data, loss and the recipes that reproduce the bundled weights."""

from deepinv_deal.files import load_image, load_image_folder, load_images
from deepinv_deal.training.attentive_l1 import AttentiveL1Recipe, AttentiveL1Trainer
from deepinv_deal.training.curve import plot_learning_curve
from deepinv_deal.training.data import (
    DenoisingSampler,
    Problems,
)
from deepinv_deal.training.deal import (
    AttentiveQuadraticTrainer,
    DEALRecipe,
    DEALTrainer,
)
from deepinv_deal.training.dictionary import DictionaryRecipe, DictionaryTrainer
from deepinv_deal.training.engine import Recipe, SingleLevelRecipe, Trainer
from deepinv_deal.training.grow import color_from_gray, grow
from deepinv_deal.training.losses import deal_loss, mask_drift
from deepinv_deal.training.retune import retune_kappa

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
