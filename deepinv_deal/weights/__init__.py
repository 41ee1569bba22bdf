"""Bundled weights, and reading, checking and converting checkpoints."""

from deepinv_deal.weights.deal import (
    convert_state_dict,
    load_prior,
    save_prior,
)
from deepinv_deal.weights.files import BUNDLED, bundled, owner
from deepinv_deal.weights.patches import (
    convert_patch_checkpoint,
    load_patch_prior,
    save_patch_prior,
)
from deepinv_deal.weights.safi import (
    convert_l1_state_dict,
    load_l1_prior,
    save_l1_prior,
)

__all__ = [
    "BUNDLED",
    "bundled",
    "convert_l1_state_dict",
    "convert_patch_checkpoint",
    "convert_state_dict",
    "load_l1_prior",
    "load_patch_prior",
    "load_prior",
    "owner",
    "save_l1_prior",
    "save_patch_prior",
    "save_prior",
]
