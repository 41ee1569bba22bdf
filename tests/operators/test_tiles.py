"""Convolutions by Fourier transforms of tiles, against those of PyTorch."""

from __future__ import annotations

import pytest
import torch
from helpers import random
from torch.nn import functional as F

from deepinv_deal.operators import MultiConvOperator, tiles
from deepinv_deal.operators.multi_conv import Convolution
from deepinv_deal.operators.tiles import SIDE, TiledConvolution


def convolved(kernel, x):
    return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)


@pytest.mark.parametrize("k", [7, 9, 13])
@pytest.mark.parametrize("size", [(50, 61), (26, 26), (24, 97), (5, 3), (1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_they_are_convolutions(k, size, layout, rng):
    kernel = random(rng, 4, 3, k, k)
    x = random(rng, 2, 3, *size).to(memory_format=layout)
    with torch.no_grad():
        out = TiledConvolution(kernel)(x)
        torch.testing.assert_close(out, convolved(kernel, x), rtol=0, atol=1e-11)
    assert out.shape == (2, 4, *size)


def test_the_result_does_not_depend_on_the_parts(rng, monkeypatch):
    kernel, x = random(rng, 3, 4, 7, 7), random(rng, 2, 4, 90, 40)
    with torch.no_grad():
        whole = TiledConvolution(kernel)(x)
        monkeypatch.setattr(tiles, "PART", 1)
        parts = TiledConvolution(kernel)(x)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_single_precision_is_no_less_accurate_than_direct_sums(rng):
    kernel, x = random(rng, 16, 16, 9, 9), random(rng, 1, 16, 64, 64)
    exact = convolved(kernel, x)
    with torch.no_grad():
        out = TiledConvolution(kernel.float())(x.float())
    assert out.dtype == torch.float32
    assert (out - exact).norm() < 1e-6 * exact.norm()


@pytest.fixture
def counted(monkeypatch):
    """Tells how often a convolution was one of tiles."""
    calls, convolve = [], TiledConvolution.__call__

    def recorded(self, x):
        calls.append(x.shape)
        return convolve(self, x)

    monkeypatch.setattr(TiledConvolution, "__call__", recorded)
    return calls


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
def test_they_are_taken_where_they_pay_and_never_with_gradients(counted, rng):
    many, x = random(rng, 24, 24, 7, 7), random(rng, 1, 24, 78, 100)
    convolution = Convolution(many)
    direct = convolution(x)
    assert not counted
    with torch.no_grad():
        torch.testing.assert_close(convolution(x), direct, rtol=0, atol=1e-10)
        assert len(counted) == 1
        # One tile, tiles that would waste most of their work, another precision.
        for other in (x[..., :20, :20], x[..., :33, :33]):
            convolution(other)
        Convolution(many.half())(x.half())
        # Few channels and small kernels.
        Convolution(random(rng, 24, 8, 9, 9))(x[:, :8])
        Convolution(random(rng, 24, 24, 5, 5))(x)
        Convolution(random(rng, 24, 24, 8, 8))(x)  # even: one row more
    assert len(counted) == 1


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
def test_operator_and_adjoint_remain_adjoint(counted, rng):
    W = MultiConvOperator([random(rng, 16, 1, 7, 7), random(rng, 16, 16, 7, 7)])
    x, z = random(rng, 1, 1, 70, 60), random(rng, 1, 16, 70, 60)
    with torch.no_grad():
        forward, backward = (W(x) * z).sum(), (x * W.adjoint(z)).sum()
    torch.testing.assert_close(forward, backward, rtol=1e-11, atol=0)
    assert len(counted) == 2


def test_the_kernel_is_that_of_the_beginning(rng):
    kernel, x = random(rng, 2, 2, 7, 7), random(rng, 1, 2, 60, 60)
    expected = convolved(kernel, x)
    convolution = TiledConvolution(kernel)
    kernel.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(convolution(x), expected, rtol=0, atol=1e-11)


def test_a_sample_is_not_touched_by_what_is_wrong_with_another(rng):
    kernel, x = random(rng, 2, 2, 7, 7), random(rng, 2, 2, SIDE, SIDE)
    x[1, 0, 3, 3] = torch.nan
    with torch.no_grad():
        out = TiledConvolution(kernel)(x)
    torch.testing.assert_close(out[:1], convolved(kernel, x[:1]), rtol=0, atol=1e-11)
    assert out[1].isnan().any()
