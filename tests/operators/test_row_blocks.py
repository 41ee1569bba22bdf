"""Large images in blocks of rows."""

from __future__ import annotations

import pytest
import torch
from problems import images, random_model, random_prior, relative_error

from deepinv_deal.operators import row_blocks
from deepinv_deal.operators.row_blocks import in_row_blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of as few rows as there may be."""
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1)


@pytest.mark.parametrize("height", [1, 8, 9, 17, 30])
def test_blocks_give_what_the_whole_gives_and_see_few_rows(height, small_blocks):
    seen = []
    kernel = torch.tensor([[0.0, 1, 0], [2, 5, 3], [-1, 0, 4]])[None, None].double()

    def twice(x, w):
        seen.append(x.shape[-2])
        for _ in range(2):
            x = torch.nn.functional.conv2d(x, kernel, padding=1)
        return w * x

    x, w = images(2, 1, height, 7), images(2, 1, height, 7, seed=1)
    with torch.no_grad():
        whole = twice(x, w)
        seen.clear()
        assert torch.equal(in_row_blocks(twice, x, w, reach=2, channels=1), whole)
    assert max(seen) <= 12  # 8 rows and 2 on each side
    assert len(seen) == -(-height // 8)
    seen.clear()
    x.requires_grad_()
    assert torch.equal(in_row_blocks(twice, x, w, reach=2, channels=1), whole)
    assert seen == [height], "recorded for a gradient, features are kept anyway"


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_regularizer_and_mask_are_those_of_the_whole_image(channels, monkeypatch):
    prior = random_prior(3 if channels == 3 else 1, 4)
    x = images(2, channels, 203, 6)
    with torch.no_grad():
        regularizer = prior.bind(0.1, x)
        mask = regularizer.mask(x)
        normal = regularizer.normal(x, mask.square())
        monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1)
        assert relative_error(regularizer.mask(x), mask) < 1e-14
        assert relative_error(regularizer.normal(x, mask.square()), normal) < 1e-14


def test_an_image_is_reconstructed_and_differentiated_in_blocks(monkeypatch):
    model = random_model()
    y = images(1, 1, 200, 5).requires_grad_()

    def run():
        x_hat = model(y, sigma=0.1)
        return x_hat.detach(), torch.autograd.grad(x_hat.square().sum(), y)[0]

    x_hat, gradient = run()
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1)
    x_blocks, gradient_blocks = run()
    assert relative_error(x_blocks, x_hat) < 1e-9
    assert relative_error(gradient_blocks, gradient) < 1e-8
