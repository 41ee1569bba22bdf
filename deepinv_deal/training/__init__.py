"""Training: data, loss and the recipes that reproduce the bundled weights."""

from deepinv_deal.training.data import (
    DenoisingSampler,
    Problems,
    load_image,
    load_image_folder,
    load_images,
)
from deepinv_deal.training.losses import deal_loss
from deepinv_deal.training.recipes import DEALRecipe, DEALTrainer

__all__ = [
    "DEALRecipe",
    "DEALTrainer",
    "DenoisingSampler",
    "Problems",
    "deal_loss",
    "load_image",
    "load_image_folder",
    "load_images",
]
