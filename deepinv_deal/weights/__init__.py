"""Bundled weights, and reading, checking and converting checkpoints."""

from deepinv_deal.weights.io import (
    BUNDLED,
    convert_state_dict,
    load_prior,
    save_prior,
)

__all__ = ["BUNDLED", "convert_state_dict", "load_prior", "save_prior"]
