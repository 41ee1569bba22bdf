"""Convolutions that are sampled, recognised by what the physics does."""

from __future__ import annotations

import pytest
import torch
from deepinv.physics import Blur, Downsampling, Inpainting
from problems import DOUBLE, generator, images, relative_error

from deepinv_deal import DEAL
from deepinv_deal.problems.sampled_convolution import SampledConvolution


def kernel(*size):
    k = torch.rand(1, 1, *size, generator=generator(), dtype=DOUBLE)
    return k / k.sum()


def found(physics, x):
    return SampledConvolution.of(physics, x, physics.A(x))


@pytest.mark.parametrize("size", [(5, 5), (4, 6), (3, 4)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["valid", "factor 2", "factor 3, cut"])
def test_it_is_the_normal_operator(name, channels, size):
    x = images(2, channels, 17, 14)
    if name == "valid":
        physics = Blur(kernel(*size), padding="valid")
    else:
        factor = int(name[7])
        physics = Downsampling(x.shape[1:], filter=kernel(*size), factor=factor)
    physics = physics.double()
    H, other = found(physics, x), images(2, channels, 17, 14, seed=1)
    assert H is not None
    expected = physics.A_adjoint(physics.A(other))
    assert relative_error(H(other), expected) < 1e-12
    # Models apply it in their linear systems.
    model = DEAL(pretrained=None, num_filters=4, in_channels=channels).double()
    known = model.examine(physics.A(x), physics)
    assert isinstance(known.fast, SampledConvolution) and known.is_formula.all()
    assert relative_error(known.fast(other), expected) < 1e-12


@pytest.mark.parametrize(
    "physics",
    [
        Blur(kernel(5, 5), padding="circular"),
        Blur(kernel(5, 5), padding="reflect"),
        Blur(kernel(18, 3), padding="circular"),
        Downsampling((1, 17, 14), filter=kernel(5, 5), factor=2, padding="reflect"),
        Inpainting((1, 17, 14), mask=0.5),
    ],
)
def test_others_are_none(physics):
    assert found(physics.double(), images(2, 1, 17, 14)) is None


def test_a_filter_that_the_physics_does_not_use_is_not_believed():
    physics = Blur(kernel(5, 5), padding="valid").double()
    x = images(2, 1, 17, 14)
    y = physics.A(x)
    assert SampledConvolution.of(physics, x, y) is not None
    physics.filter = physics.filter.flip(-1)
    assert SampledConvolution.of(physics, x, y) is None
    assert SampledConvolution.of(physics, x, y * 0) is None
