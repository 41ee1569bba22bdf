"""A change of unit or a constant costs nothing, for every model, by default."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from skimage.data import camera

from deepinv_deal import DEAL, MMR, PatchSynthesis, SmoothPlusSparse
from deepinv_deal.models.noise import estimated_level

MODELS = {
    "deal_gray": DEAL,
    "mmr_25": MMR,
    "cpr_25": SmoothPlusSparse,
    "patch_25": PatchSynthesis,
}
#: (factor, constant in units of the image)
UNITS = [(1e-6, 0), (1e-2, 0), (255, 0), (1e4, 0), (1, 0.5), (1, 1000), (1e4, 1000)]
SIZE = 32


def clean():
    return torch.from_numpy(camera()[100 : 100 + SIZE, 200 : 200 + SIZE] / 255)[
        None, None
    ]


def psnr(x_hat, x):
    return float(-10 * torch.log10((x_hat - x).square().mean()))


def noise_like(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)


@pytest.mark.parametrize("name", MODELS)
def test_denoising_does_not_depend_on_the_unit(name):
    model, x, sigma = MODELS[name](pretrained=name).double(), clean(), 25 / 255

    def quality(factor, constant):
        y = factor * (x + constant + sigma * noise_like(x))
        with torch.no_grad():
            return psnr(model(y, sigma=factor * sigma) / factor - constant, x)

    usual = quality(1, 0)
    for unit in UNITS:
        assert quality(*unit) > usual - 0.1, unit


@pytest.mark.parametrize("kind", ["blur", "inpainting", "super-resolution"])
def test_reconstruction_does_not_depend_on_the_unit(kind):
    kernel = dinv.physics.functional.gaussian_blur(sigma=(1.2, 1.2)).double()
    mask = (noise_like(clean())[0] < 0.3).double()
    physics = {
        "blur": dinv.physics.Blur(kernel, padding="circular"),
        "inpainting": dinv.physics.Inpainting((1, SIZE, SIZE), mask=mask),
        "super-resolution": dinv.physics.Downsampling(
            (1, SIZE, SIZE), filter="gaussian", factor=2, padding="circular"
        ),
    }[kind].double()
    model, x = DEAL().double(), clean()

    def quality(factor, constant):
        y = physics.A(factor * (x + constant))
        y = y + factor * 5 / 255 * noise_like(y)
        y = y * mask if kind == "inpainting" else y
        with torch.no_grad():
            x_hat = model(y, physics, lambda_reg=1.0)
        return psnr(x_hat / factor - constant, x)

    usual = quality(1, 0)
    for unit in UNITS:
        assert quality(*unit) > usual - 0.15, unit


def test_problems_in_the_usual_unit_are_left_alone():
    x = clean()
    y = x + 0.2 * noise_like(x)
    for model in (DEAL(), MMR(pretrained="mmr_25")):
        with torch.no_grad():
            auto, info = model.double()(y, sigma=25 / 255, return_info=True)
        assert not info.notes and (info.scale == 1).all()
        plain = type(model)(prior=model.prior, scale=None)
        with torch.no_grad():
            expected = plain(y, sigma=25 / 255)
        torch.testing.assert_close(auto, expected, rtol=0, atol=0)


def test_signed_images_are_not_confined():
    """Half of them was lost."""
    x = clean()
    y = 2 * (x + 25 / 255 * noise_like(x)) - 1
    model = MMR(pretrained="mmr_25").double()
    with torch.no_grad():
        x_hat, info = model(y, sigma=50 / 255, return_info=True)
        expected = model((y + 1) / 2, sigma=25 / 255)
    assert "not confined" in " ".join(info.notes)
    assert psnr((x_hat + 1) / 2, x) > psnr(expected, x) - 0.1


def test_a_few_hot_pixels_do_not_spoil_the_guesses():
    y = 1000 * (clean() + 0.1 * noise_like(clean()))
    y = torch.nn.functional.pad(y, (8, 8, 8, 8), mode="reflect")
    hot = y.clone()
    hot.view(-1)[[5, 700, 1500]] = 65535.0
    levels = [float(estimated_level(image)) for image in (y, hot)]
    assert levels[1] == pytest.approx(levels[0], rel=0.1)
    _, info = DEAL().double()(hot, sigma=100.0, return_info=True)
    assert any("3 pixels are more than 10 times as bright" in n for n in info.notes)
    assert info.scale == 1000
