"""Slices of volumes: rearrangements, adjoints, spectra."""

from __future__ import annotations

import pytest
import torch
from helpers import random as drawn

from deepinv_deal.operators import MultiConvOperator, Slices
from deepinv_deal.solvers.preconditioner import Fourier, convolve, transfer_function


def random(*shape, seed=0):
    return drawn(torch.Generator().manual_seed(seed), *shape)


SIZE = (4, 6, 7)  # depth, height, width

#: Of images, volumes, pairs of volumes, colour volumes: slices, and channels.
KINDS = {
    "images": (Slices(), 2),
    "colour": (Slices(3), 3),
    "volume": (Slices(1, 4), 4),
    "colour volume": (Slices(3, 4), 12),
    "mean": (Slices(1, 4, True), 4),
    "mean, complex": (Slices(1, 4, True), 8),
    "mean, colour": (Slices(3, 4, True), 12),
}


@pytest.fixture(params=KINDS)
def kind(request):
    slices, channels = KINDS[request.param]
    return slices, random(2, channels, *SIZE[1:])


def test_slices_of_a_volume_are_its_sections():
    slices = Slices(2, 4, True)
    volume = random(3, 4, 2, *SIZE[1:])  # (B, D, C, H, W)
    depth, height, width = slices.stacks(volume.flatten(1, 2))
    assert torch.equal(depth[4 + 3], volume[1, 3])
    assert torch.equal(height[6 + 5], volume[1, :, :, 5].transpose(0, 1))
    assert torch.equal(width[2 * 7 + 1], volume[2, ..., 1].transpose(0, 1))


def test_putting_slices_back_is_the_adjoint_of_taking_them(kind):
    slices, x = kind
    stacks = slices.stacks(x)
    assert len(stacks) == slices.number
    others = [random(*stack.shape, seed=i) for i, stack in enumerate(stacks)]
    back = slices.unknown(others, len(x))
    assert back.shape == x.shape
    left = sum((a * b).sum() for a, b in zip(stacks, others, strict=True))
    torch.testing.assert_close((back * x).sum(), left)
    # Every pixel is in one slice of every orientation.
    torch.testing.assert_close(slices.unknown(stacks, len(x)), slices.number * x)


def test_packed_features_come_back(kind):
    slices, x = kind
    features = [
        random(len(s), 5, *s.shape[2:], seed=i) for i, s in enumerate(slices.stacks(x))
    ]
    packed = slices.pack(features, len(x))
    assert packed.shape[0] == len(x) and packed.shape[2:] == x.shape[2:]
    for a, b in zip(slices.unpack(packed, 5), features, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mean", [False, True])
def test_features_are_shown_at_the_voxels_they_belong_to(mean):
    slices = Slices(1, 4, mean)
    x = random(2, 8, *SIZE[1:])  # two volumes of two parts
    features = [torch.cat([s, 2 * s], 1) for s in slices.stacks(x)]
    shown = slices.voxels(features, 2).unflatten(1, (-1, 2, 2))  # (B, o, P, N, ...)
    volumes = x.unflatten(1, (2, 4))
    for o in range(slices.number):
        torch.testing.assert_close(shown[:, o, :, 0], volumes)
        torch.testing.assert_close(shown[:, o, :, 1], 2 * volumes)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_the_symbol_is_that_of_convolutions_of_slices(mean, pair):
    # Away from borders W^T W is a convolution; here a circular one, so it is exact.
    slices = Slices(1, 4, mean)
    fourier = Fourier(pair, 4)
    W = MultiConvOperator([random(3, 1, 3, 3)])
    kernel = W.normal_kernel()
    reach = kernel.shape[-1] // 2

    def circular(stack):
        for axis in (-2, -1):
            parts = [stack.roll(i, axis) for i in range(-reach, reach + 1)]
            stack = torch.stack(parts, 1) if axis == -2 else torch.stack(parts, 2)
        return torch.einsum("nijchw,ij->nchw", stack, kernel[0, 0])

    x = random(2, 4 * (1 + pair), *SIZE[1:])
    expected = slices.each(circular, x)
    symbol = slices.symbol([kernel] * slices.number, *SIZE[1:])
    torch.testing.assert_close(convolve(symbol, x, fourier), expected)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("depth", [0, 4])
def test_an_operator_that_is_a_product_of_spectra_is_recognised(depth, pair):
    fourier = Fourier(pair, depth)
    like = random(1, 4 * (1 + pair), *SIZE[1:])
    values = fourier.symmetrized(random(*fourier.spectrum(like).shape).square())
    found, misfit = transfer_function(
        lambda x: convolve(values, x, fourier), like, fourier
    )
    torch.testing.assert_close(found, values)
    assert misfit.max() < 1e-12
    torch.testing.assert_close(fourier.inverse(fourier.spectrum(like)), like)
    other = Fourier(pair, 4 - depth)
    assert (
        transfer_function(lambda x: convolve(values, x, fourier), like, other)[1] > 0.1
    )
