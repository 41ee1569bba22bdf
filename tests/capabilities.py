"""What every model can do, tried out: the rows of a table, see test_capabilities.py."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO

import deepinv as dinv
import pytest
import torch
from problems import DOUBLE, MODELS, generator, images

from deepinv_deal import AdjointOptions, ConvergenceError, KnownPhysics, SolverOptions

SHAPE = (1, 6, 8)

#: The columns: how they are called, how they are made, and with which settings fast.
COLUMNS = {
    "DEAL": ("DEAL", {}),
    "SAFI": ("SAFI", {"rtol": 0.1}),
    "MMR": ("MMR", {"rtol": 0.1}),
    "CPR": ("CPR", {"rtol": 1e-2}),
    "NCPR": ("NCPR", {}),  # gradients need a solution near its minimum
    "PatchSynthesis": ("two-step", {"rtol": 1e-2}),
}
ATTENTIVE, L1 = ("DEAL", "SAFI", "MMR"), ("SAFI", "MMR")
DICTIONARIES = ("CPR", "NCPR", "PatchSynthesis")

SIGMA, LAMBDA = 0.1, 0.02


def make(name, **settings):
    key, fast = COLUMNS[name]
    if settings.get("solver") == "two-step":
        fast = {}
    return MODELS[key](**{**fast, **settings})


def data(batch=2, channels=1):
    return images(batch, channels, *SHAPE[1:])


def blur():
    kernel = torch.tensor([[1.0, 2, 1], [2, 25, 2], [1, 2, 3]], dtype=DOUBLE)
    return dinv.physics.Blur((kernel / kernel.sum())[None, None], padding="circular")


def inpainting():
    mask = 0.4 + 0.6 * (torch.rand(SHAPE, generator=generator(5)) > 0.4).double()
    return dinv.physics.Inpainting(SHAPE, mask=mask)


def other(a, b):
    """Whether both are finite, and not the same."""
    assert a.isfinite().all() and b.isfinite().all()
    return not torch.equal(a, b)


# -- one function for every row ------------------------------------------------------


def denoises(name):
    y = data()
    x = make(name)(y, sigma=SIGMA)
    assert x.shape == y.shape and other(x, y)


def solves_any_linear_physics(name):
    model = make(name, lambda_reg=LAMBDA)
    for physics in (inpainting(), blur()):
        x = model(physics.A(data()), physics)
        assert x.shape == (2, *SHAPE) and other(x, data())


def takes_the_level_of_the_physics(name):
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.25))
    model = make(name)
    level = float(physics.noise_model.sigma)
    assert torch.equal(model(data(), physics), model(data(), sigma=level))
    assert other(model(data(), physics), model(data(), sigma=SIGMA))


def estimates_the_level(name):
    y = 0.5 + 0.1 * torch.randn(1, 1, 40, 40, generator=generator(), dtype=DOUBLE)
    model = make(name, warn=False, max_iter=1, sigma="estimate")
    _, info = model(y, return_info=True)
    assert any("estimated" in note for note in info.notes)


def needs_no_level(name):
    assert make(name)(data()).isfinite().all()


def takes_a_weight(name):
    model, y = make(name), data()
    low, high = (model(y, sigma=SIGMA, lambda_reg=v) for v in (0.01, 0.1))
    both = model(y, sigma=SIGMA, lambda_reg=[0.01, 0.1])
    assert other(low, high)
    expected = torch.stack([low[0], high[1]])
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-7)


def takes_relative_weights(name):
    physics = dinv.physics.LinearPhysics(A=lambda x: 3 * x, A_adjoint=lambda y: 3 * y)
    model = make(name, lambda_reg=LAMBDA, lambda_mode="relative")
    _, info = model(3 * data(), physics, return_info=True)
    expected = torch.full((2,), 9 * LAMBDA, dtype=DOUBLE)
    torch.testing.assert_close(info.lambda_reg, expected, rtol=1e-3, atol=0)


def keeps_bounds(name):
    model, y = make(name, bounds=(0.3, 0.7)), data()
    x = model(y, sigma=SIGMA)
    assert x.min() >= 0.3 and x.max() <= 0.7
    assert other(x, make(name, bounds=None)(y, sigma=SIGMA))


def differentiates_with_bounds(name):
    y = data().requires_grad_()
    make(name, bounds=(0.3, 0.7))(y, sigma=SIGMA).square().sum().backward()
    assert y.grad.isfinite().all() and y.grad.any()


def rescales_by_itself(name):
    model, y = make(name, bounds=None), data()
    x, info = model(1000 * y, sigma=1000 * SIGMA, return_info=True)
    expected = 1000 * model(y, sigma=SIGMA)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)
    # SAFI and MMR rescale themselves to the noise level, too.
    own = model(y, sigma=SIGMA, return_info=True)[1].scale
    torch.testing.assert_close(info.scale, 1000 * own)


def takes_a_scale(name):
    _, info = make(name, scale=2.0)(data(), sigma=SIGMA, return_info=True)
    assert info.scale.tolist() == pytest.approx([2, 2]) or name in L1


def takes_complex_pairs(name):
    y = data(channels=2)
    both, real = (
        make(name, complex_mode=mode)(y, sigma=SIGMA) for mode in ("real_imag", "real")
    )
    assert other(both, real) and both[:, 1].any() and not real[:, 1].any()


def takes_complex_numbers(name):
    y = data(channels=2)
    z = torch.complex(y[:, :1], y[:, 1:])
    x, pairs = (make(name)(v, sigma=SIGMA) for v in (z, y))
    assert x.is_complex() and x.shape == z.shape
    torch.testing.assert_close(torch.cat([x.real, x.imag], 1), pairs)


def volume(channels=1):
    return torch.stack([images(1, channels, 7, 8, seed=i) for i in range(6)], 2)


def takes_volumes(name):
    y = volume(2)
    for slices in ("depth", "height", "width"):
        x = make(name, slices=slices)(y, sigma=SIGMA)
        assert x.shape == y.shape and other(x, y)


def takes_all_orientations(name):
    y = volume()
    x, plane = (make(name, slices=s)(y, sigma=SIGMA) for s in ("mean", "depth"))
    assert x.shape == y.shape and other(x, plane)


def starts_anywhere(name):
    physics = inpainting()
    y = physics.A(data())
    model = make(name, warn=False, max_iter=1, lambda_reg=LAMBDA)
    starts = ["zero", "adjoint", "pseudo_inverse", data(), lambda y, physics: 0.9 * y]
    found = [model(y, physics, init=start) for start in starts]
    assert all(other(a, b) for a, b in zip(found, found[1:], strict=False))


def computes_metrics(name):
    x = data()
    y = x + 0.1 * torch.randn(x.shape, generator=generator(), dtype=DOUBLE)
    x_hat, metrics = make(name)(y, sigma=SIGMA, x_gt=x, compute_metrics=True)
    expected = dinv.metric.PSNR()(x_hat, x).tolist()
    last = [values[-1] for values in metrics["psnr"]]
    # Some methods return the best iterate, or finish with another step.
    assert last == pytest.approx(expected, abs=1e-3 if name in ATTENTIVE else 1.0)


def reports(name):
    _, info = make(name)(data(), sigma=SIGMA, return_info=True)
    finished = name == "PatchSynthesis"
    assert (info.status == (-1 if finished else 0)).all()
    assert len(info.criterion) == len(info.lambda_reg) == len(info.n_iter) == 2


def shows_masks(name):
    _, info = make(name)(data(channels=2), sigma=SIGMA, return_info=True)
    number = make(name).prior.num_filters
    assert info.mask.shape == (2, 2 * number, *SHAPE[1:])


def gradients(name, jacobian_free):
    adjoint = AdjointOptions(jacobian_free, rtol=1e-6)
    solver = {} if name != "PatchSynthesis" else {"solver": "admm"}
    model = make(name, adjoint=adjoint, **solver)
    y = data().requires_grad_()
    (gradient,) = torch.autograd.grad(model(y, sigma=SIGMA).square().sum(), y)
    assert gradient.isfinite().all() and gradient.any()
    return gradient


def differentiates_exactly(name):
    exact, free = (gradients(name, jacobian_free=free) for free in (False, True))
    # Only weights that follow the image make a difference.
    assert other(exact, free) == (name in ATTENTIVE) or name not in ATTENTIVE


def differentiates_without_jacobian(name):
    gradients(name, jacobian_free=True)


def trains_hyperparameters(name):
    names = ["lambda_reg", "sigma"]
    model = make(name, lambda_reg=LAMBDA, sigma=SIGMA, trainable_params=names)
    assert {n for n, _ in model.named_parameters()} >= set(names)
    model(data()).square().sum().backward()
    assert model.lambda_reg.grad.isfinite() and model.lambda_reg.grad != 0


def option_changes_the_way(**option):
    def check(name):
        settings = {"sigma": 0.2, "lambda_reg": 1.0 if name == "DEAL" else 0.05}
        x0 = make(name, rtol=1e-5)(data(), **settings)
        told = make(name, rtol=1e-5, solver=SolverOptions(**option))
        x = told(data(), **settings)
        assert other(x, x0)
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-3)

    return check


def knows_a_physics(name):
    physics, model = inpainting(), make(name, lambda_reg=LAMBDA)
    y = physics.A(data())
    known = model.examine(y, physics)
    assert isinstance(known, KnownPhysics)
    assert torch.equal(model(y, known), model(y, physics))


def batches(name):
    model, physics = make(name, lambda_reg=LAMBDA), inpainting()
    y = physics.A(data(3))
    together = model(y, physics)
    for i in range(3):
        alone = model(y[i : i + 1], physics)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-7)


def is_strict(name):
    model = make(name, strict=True, rtol=1e-12, max_iter=1)
    physics = inpainting()
    with pytest.raises(ConvergenceError):
        model(physics.A(data()), physics, sigma=SIGMA, lambda_reg=LAMBDA)


def shows_progress(name):
    physics = inpainting()
    y = physics.A(data())
    settings = {"sigma": SIGMA, "lambda_reg": LAMBDA, "return_info": True}
    printed = {}
    for shown in (True, None, False):
        with redirect_stderr(StringIO()) as stream:
            x, info = make(name, show_progress_bar=shown)(y, physics, **settings)
        printed[shown] = stream.getvalue(), x
    last = printed[True][0].split("\r")[-1]
    assert f": {int(info.n_iter.max())}it" in last
    assert printed[None][0] == printed[False][0] == ""  # where there is no terminal
    assert torch.equal(printed[True][1], printed[False][1])
