"""Images to train on."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three images with edges."""
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(3):
        image = np.kron(rng.integers(0, 255, (6, 8)), np.ones((5, 5))).astype(np.uint8)
        Image.fromarray(image).save(path / f"{i}.png")
    return path
