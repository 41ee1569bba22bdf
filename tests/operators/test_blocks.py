"""Large images in blocks."""

from __future__ import annotations

import pytest
import torch
from problems import images, random_model, random_prior, relative_error

from deepinv_deal.operators import MultiConvOperator, blocks
from deepinv_deal.operators.blocks import in_blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks as small as they may be."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)


@pytest.mark.parametrize(
    "size", [(1, 7), (16, 7), (17, 33), (33, 7), (60, 50), (7, 60)]
)
def test_blocks_give_what_the_whole_gives_and_see_little(size, small_blocks):
    seen = []
    kernel = torch.tensor([[0.0, 1, 0], [2, 5, 3], [-1, 0, 4]])[None, None].double()

    def twice(x, w):
        seen.append(x.shape[-2:])
        for _ in range(2):
            x = torch.nn.functional.conv2d(x, kernel, padding=1)
        return w * x

    x, w = images(2, 1, *size), images(2, 1, *size, seed=1)
    with torch.no_grad():
        whole = twice(x, w)
        seen.clear()
        blocks = in_blocks(twice, x, w, reach=2, channels=1)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-13)
    # 16 rows and columns, and 2 on each side
    assert max(max(shape) for shape in seen) <= 20
    assert len(seen) == -(-size[0] // 16) * -(-size[1] // 16)
    seen.clear()
    x.requires_grad_()
    assert torch.equal(in_blocks(twice, x, w, reach=2, channels=1), whole)
    assert seen == [size]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_regularizer_and_mask_are_those_of_the_whole_image(channels, monkeypatch):
    prior = random_prior(3 if channels == 3 else 1, 4)
    x = images(2, channels, 100, 95)
    sizes = []
    convolve = MultiConvOperator.__call__

    def recorded(self, x):
        sizes.append(x.shape[-2:])
        return convolve(self, x)

    with torch.no_grad():
        regularizer = prior.bind(0.1, x)
        mask = regularizer.mask(x)
        normal = regularizer.normal(x, mask.square())
        monkeypatch.setattr(blocks, "LEAST_REACHES", 1)
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
        monkeypatch.setattr(MultiConvOperator, "__call__", recorded)
        assert relative_error(regularizer.mask(x), mask) < 1e-14
        assert relative_error(regularizer.squared_mask(x), mask.square()) < 1e-14
        assert relative_error(regularizer.normal(x, mask.square()), normal) < 1e-14
        one = torch.ones((), dtype=x.dtype)  # the same for all, as any tensor may be
        all_in = regularizer.normal(x, one.expand_as(mask))
        assert relative_error(regularizer.normal(x, one), all_in) == 0
    assert max(s[0] for s in sizes) < 100 and max(s[1] for s in sizes) < 95


@pytest.mark.parametrize(("multiple", "heights"), [(1, [3, 3, 3, 1]), (2, [4, 4, 2])])
def test_blocks_have_the_size_asked_for_and_start_at_multiples(multiple, heights):
    x, seen = images(1, 2, 10, 5), []

    def double(x):
        seen.append(x.shape[-2])
        return 2 * x

    with torch.no_grad():
        out = in_blocks(
            double, x, reach=0, channels=2, block_bytes=3 * 10 * 8, multiple=multiple
        )
    assert torch.equal(out, 2 * x) and seen == heights


def test_blocks_are_whole_rows_if_enough_of_them_fit_in_else_squares():
    def sizes(bytes_):
        seen = []

        def look(x):
            seen.append(tuple(x.shape[-2:]))
            return x

        in_blocks(look, x, reach=1, channels=1, block_bytes=bytes_)
        return seen

    x = images(1, 1, 40, 90)
    with torch.no_grad():
        # 10 rows, and one more on each side
        assert sizes(12 * 90 * 8) == [(11, 90), (12, 90), (12, 90), (11, 90)]
        # 8 rows do not fit in: 5 blocks of 18 columns, and twice 20 rows
        assert sizes(20 * 22 * 8)[:5] == [(21, 19)] + 3 * [(21, 20)] + [(21, 19)]


def test_images_of_a_batch_are_cut_as_one_is():
    seen = []

    def look(x):
        seen.append(tuple(x.shape[-2:]))
        return x

    with torch.no_grad():
        for batch in (1, 5):
            x = images(batch, 1, 40, 90)
            in_blocks(look, x, reach=1, channels=1, block_bytes=12 * 90 * 8)
    assert len(seen) == 8 and seen[:4] == seen[4:]


def test_blocks_of_nothing_and_of_single_rows(small_blocks):
    with torch.no_grad():
        for x in (images(1, 1, 5, 6)[:0], images(1, 1, 5, 6)):
            out = in_blocks(lambda x: 2 * x, x, reach=0, channels=1)
            assert torch.equal(out, 2 * x)


def test_an_image_is_reconstructed_and_differentiated_in_blocks(monkeypatch):
    model = random_model()
    y = images(1, 1, 400, 5).requires_grad_()

    def run():
        x_hat = model(y, sigma=0.1)
        return x_hat.detach(), torch.autograd.grad(x_hat.square().sum(), y)[0]

    x_hat, gradient = run()
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    x_blocks, gradient_blocks = run()
    assert relative_error(x_blocks, x_hat) < 1e-9
    assert relative_error(gradient_blocks, gradient) < 1e-8
