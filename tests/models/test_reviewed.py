"""Faults that a review found: each test failed before."""

import deepinv as dinv
import pytest
import torch
from helpers import central_difference
from problems import (
    DOUBLE,
    images,
    random_l1_model,
    random_model,
    random_prior,
    small_model,
)

from deepinv_deal import (
    MMR,
    SAFI,
    AdjointOptions,
    FixedPointOptim,
    PatchSynthesis,
    SmoothPlusSparse,
    SolverOptions,
)
from deepinv_deal.interpret import linearize

SHAPE = (1, 9, 8)


def fourier():
    mask = (images(1, 1, 9, 8, seed=3) > 0.4).double()[0].expand(2, -1, -1)
    return dinv.physics.MRI(mask=mask, img_size=(9, 8))


def test_an_optimizer_does_not_clip_complex_images():
    prior = random_l1_model(MMR).prior
    x = images(1, 2, 9, 8) - 0.8  # either sign
    physics = fourier()
    y = physics.A(x)
    optimizer = FixedPointOptim(prior, lambda_reg=1e-4, rtol=0.1, warn=False)
    assert optimizer(y, physics).min() < -0.1


def test_linearised_models_have_no_bounds():
    with pytest.raises(ValueError, match="model has bounds"):
        linearize(random_model(bounds=(0.3, 0.6)), images(1, *SHAPE), sigma=0.1)


def test_the_level_of_the_training_has_a_derivative_too():
    adjoint = AdjointOptions(rtol=1e-6)
    model, y = random_l1_model(SAFI, rtol=1e-3, adjoint=adjoint), images(1, *SHAPE)
    sigma = model.prior.sigma.clone().requires_grad_()
    x = model(y, sigma=sigma)
    (gradient,) = torch.autograd.grad(x.square().sum(), sigma)
    assert gradient.isfinite()


def test_inner_precision_does_not_limit_the_accuracy_with_bounds():
    y = images(1, 1, 16, 16, dtype=torch.float32)
    model = random_model(
        random_prior(dtype=torch.float32),
        bounds=(0.4, 0.8),
        rtol=1e-3,
        max_iter=30,
        adjoint=AdjointOptions(),
        solver=SolverOptions(inner_dtype=torch.bfloat16),
    )
    _, info = model(y, sigma=0.1, return_info=True)
    assert info.converged.all() and int(info.inner_iter) < 500


def test_the_gradient_goes_through_the_norm_of_the_physics():
    x, model = images(1, *SHAPE), random_model(lambda_mode="relative", lambda_reg=0.3)
    weights = torch.linspace(0.5, 1.5, 72, dtype=DOUBLE).view(1, *SHAPE)

    def run(gain):
        physics = dinv.physics.LinearPhysics(
            A=lambda x: gain * weights * x, A_adjoint=lambda y: gain * weights * y
        )
        return (model(weights * x, physics) * weights).sum()

    gain = torch.tensor(1.2, dtype=DOUBLE, requires_grad=True)
    (gradient,) = torch.autograd.grad(run(gain), gain)
    one = torch.ones((), dtype=DOUBLE)
    expected = central_difference(run, gain.detach(), one, 1e-4)
    # The power iteration finds the norm to four digits.
    torch.testing.assert_close(gradient, expected, rtol=5e-3, atol=0)


def test_the_norm_of_a_sample_does_not_depend_on_others():
    scales = torch.tensor([1.0, 0.3], dtype=DOUBLE).view(2, 1, 1, 1)
    mask = images(2, *SHAPE) * scales
    y = images(2, *SHAPE)
    model = random_model()

    def sqnorm(rows):
        physics = dinv.physics.Inpainting(SHAPE, mask=mask[rows])
        return model.pose(y[rows], physics).data.sqnorm

    both, alone = sqnorm(slice(None)), [sqnorm([i]) for i in (0, 1)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-14, atol=0)


def test_autocast_stays_outside_of_pose_and_solve():
    model = random_model(
        random_prior(dtype=torch.float32), rtol=1e-3, adjoint=AdjointOptions()
    )
    y = images(1, *SHAPE, dtype=torch.float32)
    expected = model(y, sigma=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        problem = model.pose(y, sigma=0.1)
        x, _ = model.solve(problem)
    torch.testing.assert_close(problem.image(x), expected)


def test_two_passes_ignore_no_tolerance_in_silence(rng):
    model = small_model(PatchSynthesis, rng, {"mean": "free"}, rtol=1e-6)
    _, info = model(images(1, *SHAPE), sigma=0.1, return_info=True)
    assert info.solver == "two-step" and info.rtol == 0


def test_an_optimizer_takes_the_tolerance_of_the_equation():
    optimizer = FixedPointOptim(random_prior(), lambda_reg=0.5, sigma=0.1)
    _, result = optimizer(images(1, *SHAPE), dinv.physics.Denoising(), return_info=True)
    assert result.converged.all()


def test_energies_in_another_unit_are_finite():
    model, y = random_l1_model(MMR, rtol=1e-3, warn=False), 100 * images(1, *SHAPE)
    level = 100 * 1.3 * float(model.prior.sigma)
    settings = {"bounds": (0.0, 90.0), "scale": 100.0, "rtol": 0.1, "warn": False}
    model = MMR(prior=model.prior, **settings)
    x = model(y, sigma=level)
    assert x.min() >= 0 and x.max() <= 90
    assert model.energy(x, y, sigma=level).isfinite().all()


def test_a_function_as_init_gets_the_physics_itself():
    physics = dinv.physics.Inpainting(SHAPE, mask=torch.ones(SHAPE, dtype=DOUBLE))
    model, y = random_model(max_iter=0, warn=False), images(1, *SHAPE)
    known = model.examine(y, physics)
    x = model(y, known, init=lambda y, physics: physics.A_adjoint(y))
    torch.testing.assert_close(x, y)


def test_init_of_another_type_is_named():
    model, y = random_model(), images(1, *SHAPE)
    with pytest.raises(ValueError, match="init is torch.float32 on cpu"):
        model(y, sigma=0.1, init=y.float())


def test_the_image_is_the_same_with_and_without_gradients(rng):
    y = images(1, *SHAPE)
    model = small_model(
        SmoothPlusSparse, rng, {"penalty": "l1"}, rtol=1e-2, solver="ipalm"
    )
    with torch.no_grad():
        expected = model(y, sigma=0.1)
    torch.testing.assert_close(model(y, sigma=0.1), expected, rtol=0, atol=1e-14)


def test_methods_that_no_bounds_allow_are_refused_at_once():
    with pytest.raises(ValueError, match="solver='fista' is no method"):
        random_model(solver="fista")
