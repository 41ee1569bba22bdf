"""Volumes and series: every model, slices of all orientations, coupled physics."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from helpers import random
from problems import (
    DOUBLE,
    MODELS,
    TIGHT,
    dense,
    generator,
    images,
    random_model,
    random_prior,
    relative_error,
)

from deepinv_deal import DEAL, SolverOptions
from deepinv_deal.optim import FixedPointOptim

SHAPE = (1, 4, 6, 7)
AXES = {"depth": 2, "height": 3, "width": 4}


def make(name, **settings):
    """A model whose masks follow the image mildly, solved accurately."""
    if name == "DEAL":
        settings = {"rtol": 1e-9, "lambda_reg": 0.1, **settings}
        return random_model(random_prior(gain=1.0), **settings)
    return MODELS[name](**{"rtol": 1e-4, "lambda_reg": 0.02, **settings})


def volumes(batch=2, channels=1, shape=SHAPE[1:]):
    depth, *plane = shape
    slices = [images(batch, channels, *plane, seed=i) for i in range(depth)]
    return torch.stack(slices, 2)


def kernel():
    k = torch.rand(1, 1, 3, 3, 3, generator=generator(), dtype=DOUBLE)
    return k / k.sum()


def blur(padding="circular"):
    return dinv.physics.Blur(kernel(), padding=padding)


def sampled():
    return (torch.rand(SHAPE[1:], generator=generator(1)) > 0.4).double()


PHYSICS = {
    "blur": blur,
    "valid blur": lambda: blur("valid"),
    "inpainting": lambda: dinv.physics.Inpainting(SHAPE, mask=sampled()[None]),
    "MRI": lambda: dinv.physics.MRI(
        mask=sampled(), three_d=True, img_size=(2, *SHAPE[1:])
    ),
    "frames": lambda: dinv.physics.DynamicMRI(mask=sampled(), img_size=(2, *SHAPE[1:])),
}


def truth(name, batch=2):
    x = volumes(batch)
    return torch.cat([x, x.flip(2)], 1) if name in ("MRI", "frames") else x


# -- one axis ------------------------------------------------------------------------


@pytest.mark.parametrize("slices", AXES)
@pytest.mark.parametrize("name", ["DEAL", "SAFI", "MMR", "CPR", "two-step"])
def test_a_volume_to_denoise_equals_its_slices(name, slices):
    accuracy = {"DEAL": 1e-8, "SAFI": 1e-6, "MMR": 1e-6, "CPR": 1e-8}.get(name)
    settings = {} if name == "two-step" else {"rtol": accuracy}
    model = MODELS[name](slices=slices, **settings)
    y, axis = volumes(shape=(5, 6, 7)), AXES[slices]
    x, info = model(y, sigma=0.1, return_info=True)
    each = [model(y.select(axis, i), sigma=0.1) for i in range(y.shape[axis])]
    assert x.shape == y.shape and info.succeeded.shape == (2,)
    # Sparse coding of one pass stops by all patches together.
    tolerance = 1e-3 if name == "two-step" else 1e-6
    assert relative_error(x, torch.stack(each, axis)) < tolerance
    if info.has_mask:
        number = model.prior.num_filters
        assert info.mask.shape == (2, number, *y.shape[2:])
        alone = model(y.select(axis, 1), sigma=0.1, return_info=True)[1].mask
        torch.testing.assert_close(info.mask.select(axis, 1), alone, rtol=0, atol=1e-4)


def test_colour_and_complex_volumes_equal_their_slices():
    colour = random_model(random_prior(3, gain=1.0), lambda_reg=0.1)
    y = volumes(channels=3)
    each = [colour(y[:, :, i], sigma=0.1) for i in range(4)]
    assert relative_error(colour(y, sigma=0.1), torch.stack(each, 2)) < 1e-8
    gray, y = make("DEAL"), volumes(channels=2)
    for mode in ("real_imag", "real"):
        gray.complex_mode = mode
        each = [gray(y[:, :, i], sigma=0.1) for i in range(4)]
        x = gray(y, sigma=0.1)
        assert relative_error(x, torch.stack(each, 2)) < 1e-8
        z = gray(torch.complex(y[:, :1], y[:, 1:]), sigma=0.1)
        torch.testing.assert_close(torch.cat([z.real, z.imag], 1), x)


def test_a_series_of_independent_frames_equals_its_frames():
    model, physics, x = make("DEAL"), PHYSICS["frames"](), truth("frames")
    y = physics.A(x)
    each = [
        model(y[:, :, i], dinv.physics.MRI(mask=sampled()[i], img_size=(2, 6, 7)))
        for i in range(4)
    ]
    assert relative_error(model(y, physics), torch.stack(each, 2)) < 1e-7


# -- coupled physics -----------------------------------------------------------------


@pytest.mark.parametrize("slices", ["depth", "width", "mean"])
@pytest.mark.parametrize("physics", PHYSICS)
def test_the_solution_balances_the_dense_forces(physics, slices):
    A, x = PHYSICS[physics](), truth(physics, 1)
    y = A.A(x)
    model = make("DEAL", slices=slices, rtol=1e-8)
    x_hat, info = model(y, A, return_info=True)
    assert bool(info.converged) and x_hat.shape == x.shape
    matrix = dense(A.A, tuple(x.shape[1:]))
    error = matrix.T @ (y - A.A(x_hat)).flatten()
    force = 0.1 * regularizer_force(model, x_hat, slices).flatten()
    assert relative_error(error, force) < 1e-6


def regularizer_force(model, x, slices):
    """The prior's field, slice by slice."""
    total = torch.zeros_like(x)
    for name, axis in AXES.items():
        if slices not in (name, "mean"):
            continue
        for part in range(x.shape[1]):
            volume = x[:, part : part + 1]
            fields = [
                model.prior.grad(volume.select(axis, i), 15 / 255)
                for i in range(x.shape[axis])
            ]
            total[:, part : part + 1] += torch.stack(fields, axis)
    return total / (3 if slices == "mean" else 1)


@pytest.mark.parametrize("physics", ["blur", "MRI", "frames"])
def test_convolutions_of_volumes_are_solved_in_few_steps(physics):
    A = PHYSICS[physics]()
    y = A.A(truth(physics))
    steps = {}
    for choice in ("auto", "none"):
        model = make("DEAL", solver=SolverOptions(preconditioner=choice), rtol=1e-6)
        x, info = model(y, A, return_info=True)
        steps[choice] = x, int(info.inner_iter.sum())
    assert relative_error(steps["auto"][0], steps["none"][0]) < 1e-5
    assert model.pose(y, A).data.H.is_circulant
    if physics == "blur":
        assert 2 * steps["auto"][1] < steps["none"][1]


@pytest.mark.parametrize(
    "slices", [pytest.param("depth", marks=pytest.mark.slow), "mean"]
)
def test_l1_models_solve_coupled_volumes(slices):
    A = dinv.physics.Blur(
        kernel()[..., 1:2, 1:2], padding="circular"
    )  # along the depth
    y = A.A(volumes(1, shape=(3, 5, 6)))
    model = make("SAFI", slices=slices, rtol=0.03)
    x, info = model(y, A, return_info=True)
    assert bool(info.converged)
    # Inside the box, the force of the data is that of the regularizer.
    equation = model.pose(y, A).equation
    p, _ = equation.solve(equation.start(None), rtol=0.03, max_iter=200)
    image, w = equation.unpair(p)
    torch.testing.assert_close(equation.data.image(image), x)
    force, inside = equation.regularizer.adjoint(w), (image > 1e-3) & (image < 0.999)
    assert relative_error(equation.data.force(image)[inside], force[inside]) < 0.1


@pytest.mark.parametrize("slices", ["depth", "mean"])
@pytest.mark.parametrize("name", ["SAFI", "MMR"])
def test_the_operator_of_l1_models_is_the_mean_of_the_orientations(name, slices):
    model, y = make(name, slices=slices), volumes()
    R = model.pose(y, sigma=0.1).equation.regularizer
    x = y.flatten(1, 2)
    w = R.analyse(random_like(x))
    torch.testing.assert_close((R.analyse(x) * w).sum(), (x * R.adjoint(w)).sum())
    torch.testing.assert_close(R.normal(x), R.adjoint(R.analyse(x)))
    Wx = R.analyse(x)
    total = 0.0
    for axis in AXES.values() if slices == "mean" else (2,):
        for i in range(y.shape[axis]):
            z = y.select(axis, i)
            total = total + model.prior.frozen_fn(z, z)
    mean = total / (3 if slices == "mean" else 1)
    torch.testing.assert_close(R.value(Wx, R.mask(x, Wx)), mean)


def test_the_quadratic_is_the_mean_of_the_orientations():
    model, y = make("DEAL", slices="mean"), volumes()
    equation = model.pose(y, sigma=0.1).equation
    R, x = equation.regularizer, y.flatten(1, 2)
    total = 0.0
    for axis in AXES.values():
        for i in range(y.shape[axis]):
            z = y.select(axis, i)
            total = total + model.prior.frozen_fn(z, z, 0.1)
    torch.testing.assert_close(R.value(x, R.mask(x)), total / 3)
    # Its gradient with the mask frozen is the force.
    x = x.clone().requires_grad_()
    mask = R.mask(x).detach()
    (gradient,) = torch.autograd.grad(R.value(x, mask).sum(), x)
    torch.testing.assert_close(gradient, R.normal(x, mask.square()))


def random_like(x):
    return random(generator(9), *x.shape)


def test_the_energy_of_mmr_is_the_mean_of_the_orientations_and_falls():
    y = volumes()
    energies = {}
    for slices in (*AXES, "mean"):
        model = make("MMR", slices=slices, verify_energy=True)
        energies[slices] = model.energy(y, y, sigma=0.1)
        _, info = model(y, sigma=0.1, return_info=True)
        assert (info.energy.diff(dim=0) <= 1e-8 * info.energy[:-1]).all()
    mean = sum(energies[axis] for axis in AXES) / 3
    torch.testing.assert_close(energies["mean"], mean)


@pytest.mark.parametrize(
    "slices", [pytest.param("height", marks=pytest.mark.slow), "mean"]
)
@pytest.mark.parametrize("name", ["CPR", "PatchSynthesis"])
def test_dictionaries_solve_coupled_volumes(name, slices):
    A, sigma = blur(), 0.1
    y = A.A(volumes(shape=(5, 6, 7)))
    solver = "admm" if name == "CPR" else "auto"
    model = MODELS[name](rtol=1e-9, slices=slices, max_iter=10**5, solver=solver)
    x, info = model(y, A, sigma=sigma, return_info=True)
    assert info.converged.all() and x.shape == y.shape
    other = MODELS[name](rtol=1e-8, slices=slices, max_iter=10**5, solver="ipalm")
    assert relative_error(other(y, A, sigma=sigma), x) < 1e-4
    # The gradient of the prior, from sparse coding of every slice alone.
    force, error = torch.zeros_like(x), A.A_adjoint(y - A.A(x))
    for axis_name, axis in AXES.items():
        if slices in (axis_name, "mean"):
            each = [
                model.prior.grad(x.select(axis, i), sigma) for i in range(x.shape[axis])
            ]
            force += torch.stack(each, axis) / (3 if slices == "mean" else 1)
    assert relative_error(error, force) < 1e-3


def test_fixed_means_and_complex_volumes_of_dictionaries():
    y = volumes(channels=2, shape=(5, 6, 7))
    for name in ("two-step", "CPR"):
        model = MODELS[name](slices="mean", **({"rtol": 1e-8} if name == "CPR" else {}))
        x = model(y, sigma=0.1)
        for part in range(2):
            alone = model(y[:, part : part + 1], sigma=0.1)
            assert relative_error(x[:, part : part + 1], alone) < 1e-3


def test_the_mean_treats_all_axes_alike():
    # Filters and masks that do not know rows from columns.
    prior = random_prior(gain=1.0)
    with torch.no_grad():
        for p in prior.parameters():
            if p.ndim == 4:
                p.copy_((p + p.transpose(2, 3)) / 2)
    model = random_model(prior, lambda_reg=0.1, slices="mean")
    y = volumes()
    x = model(y, sigma=0.1)
    for axes in ((2, 3), (2, 4), (3, 4)):
        turned = model(y.transpose(*axes), sigma=0.1).transpose(*axes)
        assert relative_error(turned, x) < 1e-8
        assert relative_error(make("DEAL")(y, sigma=0.1), x) > 1e-4


# -- all else ------------------------------------------------------------------------


@pytest.mark.parametrize("slices", ["height", "mean"])
@pytest.mark.parametrize("name", ["DEAL", "SAFI", "CPR", "NCPR"])
def test_gradients_agree_with_differences(name, slices):
    # SAFI takes thousands of steps for a blur with random weights.
    A, x = None if name == "SAFI" else blur(), volumes(1, shape=(5, 6, 7))
    y = x if A is None else A.A(x)
    settings = {"adjoint": TIGHT, "slices": slices}
    settings |= {} if name == "DEAL" else {"rtol": 1e-7, "max_iter": 2000}
    dictionary = name in ("CPR", "NCPR")
    model = MODELS[name](**settings) if dictionary else make(name, **settings)
    direction = random(generator(5), *y.shape)
    weight = random(generator(6), *x.shape)

    def value(y):
        return (model(y, A) * weight).sum()

    leaf = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    h = 1e-4
    with torch.no_grad():
        difference = (value(y + h * direction) - value(y - h * direction)) / (2 * h)
    tolerance = {"DEAL": 1e-5, "SAFI": 2e-2}.get(name, 1e-3)
    assert float((gradient * direction).sum()) == pytest.approx(
        float(difference), rel=tolerance
    )


@pytest.mark.parametrize("physics", ["blur", "MRI"])
@pytest.mark.parametrize("slices", ["depth", "mean"])
def test_a_batch_of_volumes_equals_its_volumes(physics, slices):
    A, model = PHYSICS[physics](), make("DEAL", slices=slices)
    y = A.A(truth(physics))
    x, info = model(y, A, return_info=True)
    for i in range(2):
        alone, other = model(y[i : i + 1], A, return_info=True)
        torch.testing.assert_close(alone, x[i : i + 1], rtol=0, atol=1e-12)
        assert int(info.n_iter[i]) == int(other.n_iter)


def test_metrics_first_images_and_units_are_those_of_the_volume():
    A, x = blur(), volumes()
    y = A.A(x)
    model = make("DEAL", slices="width")
    x_hat, metrics = model(y, A, x_gt=x, compute_metrics=True, init="adjoint")
    expected = dinv.metric.PSNR()(x_hat, x).tolist()
    assert [v[-1] for v in metrics["psnr"]] == pytest.approx(expected, abs=1e-3)
    assert relative_error(model(y, A, init=x), x_hat) < 1e-7
    known = model.examine(y, A)
    torch.testing.assert_close(model(y, known), x_hat)
    scaled = make("DEAL", slices="width", scale=1000.0)(1000 * y, A)
    assert relative_error(scaled, 1000 * x_hat) < 1e-7
    automatic, info = model(1000 * y, A, return_info=True)
    assert (info.scale == 1000).all() and relative_error(automatic, scaled) < 0.01


def test_counts_of_a_volume_have_their_likelihood():
    A = dinv.physics.Blur(
        kernel(), padding="circular", noise_model=dinv.physics.PoissonNoise(0.02)
    )
    torch.manual_seed(0)
    y = A(volumes())
    model = make("DEAL", lambda_reg=None, slices="mean", rtol=1e-7)
    x, info = model(y, A, return_info=True)
    assert info.converged.all() and any("Poisson" in note for note in info.notes)
    equation = model.pose(y, A).equation
    assert (
        relative_error(
            equation.data.force(equation.data.unknown("x", x)),
            equation.force(
                equation.data.unknown("x", x),
                equation.regularizer.squared_mask(equation.data.unknown("x", x)),
            ),
        )
        < 1e-5
    )


def test_deepinvs_optimizer_takes_volumes():
    A, x = blur(), volumes()
    y = A.A(x)
    model = make("DEAL", slices="mean", bounds=None)
    optim = FixedPointOptim(
        model.prior, lambda_reg=0.1, sigma=15 / 255, rtol=1e-9, slices="mean"
    )
    found, metrics = optim(y, A, x_gt=x, compute_metrics=True)
    assert relative_error(found, model(y, A)) < 1e-6 and len(metrics["psnr"]) == 2
    iterator = optim.fixed_point.iterator
    params = {"lambda": 0.1, "g_param": 15 / 255}
    image = iterator(
        {"est": (found,)}, optim.data_fidelity[0], model.prior, params, y, A
    )
    assert relative_error(image["est"][0], found) < 1e-5


def test_what_cannot_be_done_is_said():
    y = volumes()
    with pytest.raises(ValueError, match="slices must be one of"):
        DEAL(pretrained=None, num_filters=2, slices="axial")
    with pytest.raises(ValueError, match="gray filters.*4 channels"):
        make("DEAL")(torch.cat([y, y, y, y], 1), sigma=0.1)
    with pytest.raises(ValueError, match=r"volumes of shape \(B, C, D, H, W\)"):
        make("DEAL")(y[None], sigma=0.1)
    with pytest.raises(ValueError, match="x_gt must be an image of shape"):
        make("DEAL")(y, sigma=0.1, x_gt=y[:, :, 0], compute_metrics=True)
