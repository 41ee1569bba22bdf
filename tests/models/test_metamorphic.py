"""How the answer must change when the problem changes in a way that is understood."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch
from problems import EACH_MODEL, MODELS, images, relative_error

from deepinv_deal import _batch

SHAPE = (2, 1, 6, 8)
SIGMA = 0.1

#: Where both sides take the same iterations, few are enough.
ROUGH = {"NCPR": {"rtol": 1e-3}}

every_model = pytest.mark.parametrize("name", EACH_MODEL)


def thorough(*names):
    """Dictionaries solved accurately take seconds."""
    slow = ("NCPR", "PatchSynthesis")
    marks = {name: [pytest.mark.slow] * (name in slow) for name in names}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks[name]) for name in names]
    )


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def identity(factor=1.0):
    return dinv.physics.LinearPhysics(
        A=lambda x: factor * x, A_adjoint=lambda y: factor * y
    )


@every_model
def test_a_permuted_batch_gives_the_permuted_images(name):
    model, y = MODELS[name](**ROUGH.get(name, {})), images(3, *SHAPE[1:])
    weights = torch.tensor([0.01, 0.02, 0.04], dtype=y.dtype)
    order = [2, 0, 1]
    expected = model(y, sigma=SIGMA, lambda_reg=weights)[order]
    permuted = model(y[order], sigma=SIGMA, lambda_reg=weights[order])
    torch.testing.assert_close(permuted, expected, rtol=0, atol=1e-9)
    assert relative_error(permuted, expected[order]) > 1e-3


@every_model
@pytest.mark.parametrize("blurred", [False, True], ids=["denoising", "blur"])
def test_parts_in_which_large_tensors_are_evaluated_do_not_matter(
    name, blurred, monkeypatch
):
    # Bounds in another unit are one number for each sample.
    settings = {"bounds": (0.0, 0.7), "scale": 0.5, "max_iter": 3, "warn": False}
    if name in ("two-step", "PatchSynthesis"):  # take no bounds
        settings = {}
    if name in ("SAFI", "MMR"):
        settings["lambda_reg"] = 0.02
    model, y = MODELS[name](**settings), images(*SHAPE)
    physics = None
    if blurred:
        kernel = torch.tensor([[0.1, 0.2, 0.1], [0.0, 0.4, 0.2]], dtype=y.dtype)
        physics = dinv.physics.Blur(
            filter=kernel[None, None, :, :2], padding="circular"
        )
    expected = model(y, physics, sigma=SIGMA)
    for size in (57, 2):
        monkeypatch.setattr(_batch, "PART", size)
        actual = model(y, physics, sigma=SIGMA)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@every_model
@pytest.mark.parametrize("dim", [-2, -1])
def test_flipped_filters_give_flipped_images(name, dim):
    model, y = MODELS[name](**ROUGH.get(name, {})), images(*SHAPE)
    flipped = copy.deepcopy(model)
    for p in flipped.parameters():
        if p.ndim > 2:  # kernels and atoms; splines and weights have no direction
            p.copy_(p.flip(dim))
    expected = model(y, sigma=SIGMA)
    actual = flipped(y.flip(dim), sigma=SIGMA).flip(dim)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)
    assert relative_error(model(y.flip(dim), sigma=SIGMA).flip(dim), expected) > 1e-6


@pytest.mark.parametrize("name", ["CPR", "NCPR"])
def test_shifts_of_circular_patches_shift_the_image(name):
    model, y = MODELS[name](**ROUGH.get(name, {})), images(*SHAPE)
    shift = {"shifts": (2, 4), "dims": (-2, -1)}  # even: groups are blocks of 2 x 2
    expected = model(y, sigma=SIGMA).roll(**shift)
    shifted = model(y.roll(**shift), sigma=SIGMA)
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["DEAL", "SAFI", "MMR", "two-step"])
def test_the_weight_leads_from_the_data_away_from_them(name):
    model, y = MODELS[name](rtol=1e-4), images(*SHAPE)
    unit = 1000 if name == "DEAL" else 1  # its masks take most of the weight
    changes = [
        relative_error(model(y, sigma=SIGMA, lambda_reg=unit * weight), y)
        for weight in (1e-9, 1e-3, 1e-2, 1e-1)
    ]
    assert changes[0] < 1e-3 and changes == sorted(changes)
    assert changes[-1] > 0.01


@thorough(*MODELS)
def test_the_identity_as_physics_is_denoising(name):
    solver = {"two-step": {"solver": "two-step"}, "CPR": {"solver": "fista"}}
    settings = solver.get(name, {})
    if name != "two-step":  # which has no tolerance
        settings = {"rtol": 1e-4, **settings}
    model, y = MODELS[name](**settings), images(*SHAPE)
    expected = model(y, sigma=SIGMA, lambda_reg=0.02)
    actual = model(y, identity(), sigma=SIGMA, lambda_reg=0.02)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@thorough("SAFI", "MMR", "PatchSynthesis")
@pytest.mark.parametrize("factor", [0.1, 30.0])
def test_the_unit_of_the_measurements_does_not_matter(name, factor):
    """Scaling A and y by c scales the data term by c squared: so scale the other."""
    # SAFI and MMR take the same iterations on both sides.
    rtol = 1e-7 if name == "PatchSynthesis" else 1e-2
    model, y = MODELS[name](rtol=rtol), images(*SHAPE)
    c = factor**2
    one, other = {"lambda_reg": 0.02}, {"lambda_reg": 0.02 * c}
    if name == "PatchSynthesis":  # beta multiplies the regularizer, lambda in it
        one, other = {"beta": 0.5}, {"beta": 0.5 * c}
    expected = model(y, identity(), **one)
    actual = model(factor * y, identity(factor), **other)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
