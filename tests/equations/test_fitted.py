"""Kernels with short sides, and buffers in another precision than the measurements."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from problems import generator, images

from deepinv_deal import DEAL, FixedPointOptim
from deepinv_deal.optim import WeightedL2
from deepinv_deal.priors import MMRPrior
from deepinv_deal.problems.fitted import fitted

SIZE = (12, 13)
SHORT = [(1, 1), (1, 5), (5, 1), (2, 2), (1, 2), (2, 4), (4, 4)]
DOUBLE = torch.float64


def kernel(height, width, dtype=DOUBLE):
    k = torch.rand(1, 1, height, width, generator=generator(1), dtype=DOUBLE)
    return (k / k.sum()).to(dtype)


def model(dtype=DOUBLE, **settings):
    torch.manual_seed(0)
    return DEAL(pretrained=None, num_filters=4, **settings).to(dtype).eval()


@pytest.mark.filterwarnings("ignore:You're using padding")  # deepinv, for 1 x 1
@pytest.mark.parametrize("padding", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 5), (5, 1), (2, 2), (1, 2), (2, 4), (4, 4)]
)
@pytest.mark.parametrize("kind", ["blur", "downsampling"])
def test_short_kernels_blur_as_they_did_and_have_an_adjoint(kind, size, padding):
    x = images(1, 1, *SIZE)
    k = kernel(*size)
    if kind == "blur":
        physics = dinv.physics.Blur(k, padding=padding)
    else:
        physics = dinv.physics.Downsampling(
            (1, *SIZE), filter=k, factor=2, padding=padding
        )
    y = physics.A(x)
    mended = fitted(physics, y)
    assert (mended is physics) == (size == (4, 4))
    torch.testing.assert_close(mended.A(x), y, rtol=1e-10, atol=1e-12)
    v = torch.randn(y.shape, generator=generator(2), dtype=DOUBLE)
    inner = (mended.A_adjoint(v) * x).sum()
    torch.testing.assert_close((y * v).sum(), inner, rtol=1e-10, atol=0)
    assert physics.filter.shape == k.shape  # the physics is left as it was


@pytest.mark.parametrize("padding", ["circular", "replicate"])
def test_motion_along_an_axis_is_undone(padding):
    """It was refused as if y did not fit; with 'replicate' the adjoint was wrong."""
    physics = dinv.physics.Blur(kernel(1, 5), padding=padding)
    x = images(1, 1, *SIZE)
    y = physics.A(x)
    x_hat = model()(y, physics, lambda_reg=1e-4)
    assert (x_hat - x).norm() < 0.5 * (y - x).norm()
    k = physics.filter.clone().requires_grad_()
    again = model()(y, dinv.physics.Blur(k, padding=padding), lambda_reg=1e-4)
    again.sum().backward()
    assert k.grad.abs().max() > 0


def physics_in(kind, dtype):
    mask = (torch.rand(SIZE, generator=generator(3)) < 0.7).to(dtype)
    if kind == "inpainting":
        return dinv.physics.Inpainting((1, *SIZE), mask=mask[None])
    if kind == "blur":
        return dinv.physics.Blur(kernel(3, 3, dtype), padding="circular")
    if kind == "MRI":
        return dinv.physics.MRI(mask=mask, img_size=SIZE)
    maps = torch.rand(2, *SIZE, generator=generator(4)).to(dtype.to_complex())
    return dinv.physics.MultiCoilMRI(mask=mask, coil_maps=maps, img_size=SIZE)


@pytest.mark.parametrize("other", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["inpainting", "blur", "MRI", "coils"])
def test_buffers_of_another_precision_are_converted(kind, other):
    """NumPy's float64: 'expected scalar type Double but found Float'."""
    own = torch.float64 if other == torch.float32 else torch.float32
    channels = 1 if kind in ("inpainting", "blur") else 2
    x = images(1, channels, *SIZE).to(own)
    right, wrong = physics_in(kind, own), physics_in(kind, other)
    y = right.A(x)
    expected, found = (model(own)(y, p, lambda_reg=0.1) for p in (right, wrong))
    assert found.dtype == own
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_ways_fit_the_physics_too():
    x = images(1, 1, *SIZE)
    physics = dinv.physics.Blur(kernel(1, 5), padding="circular")
    y = physics.A(x)
    weighted = model(data_fidelity=WeightedL2(torch.ones_like(y)), rtol=1e-8)
    plain = model(rtol=1e-8)
    found, expected = (m(y, physics, lambda_reg=0.1) for m in (weighted, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    optim = FixedPointOptim(MMRPrior(4).double(), lambda_reg=0.01)
    assert optim(y, physics).shape == x.shape
