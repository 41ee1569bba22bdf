"""What users of DEAL rely on."""

import copy
import inspect
import pickle
import warnings
from dataclasses import fields

import deepinv as dinv
import numpy as np
import pytest
import torch
from deepinv.physics.functional import gaussian_blur
from problems import (
    DOUBLE,
    generator,
    images,
    random_model,
    random_prior,
    relative_error,
)
from skimage.data import astronaut

from deepinv_deal import (
    DEAL,
    AdjointOptions,
    ConvergenceWarning,
    SolverOptions,
    interpret,
)
from deepinv_deal.models.base import ReconstructionModel
from deepinv_deal.models.deal import DEFAULT_SIGMA
from deepinv_deal.operators import MultiConvOperator
from deepinv_deal.optim import FixedPointOptim, FrozenIteration
from deepinv_deal.priors import AttentiveQuadratic, AttentiveQuadraticPrior, MMRPrior
from deepinv_deal.problems import Preconditioning
from deepinv_deal.solvers import fixed_point

SHAPE = (1, 9, 8)


def inpainting(**kwargs):
    # No pixel is quite lost, so the condition number is small and the tests are fast.
    mask = 0.4 + 0.6 * (torch.rand(SHAPE, generator=generator(5)) > 0.4).double()
    return dinv.physics.Inpainting(SHAPE, mask=mask, **kwargs)


def blur(**kwargs):
    kernel = torch.tensor([[1.0, 2, 1], [2, 9, 2], [1, 2, 3]], dtype=DOUBLE)[None, None]
    return dinv.physics.Blur(kernel / kernel.sum(), padding="circular", **kwargs)


def mri(channels_first_size=(8, 10), coils=None):
    mask = torch.ones(channels_first_size, dtype=DOUBLE)
    mask[:, ::3] = 0
    if coils is None:
        return dinv.physics.MRI(mask=mask, img_size=channels_first_size)
    maps = torch.randn(
        1, coils, *channels_first_size, generator=generator(3), dtype=torch.complex128
    )
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    return dinv.physics.MultiCoilMRI(
        mask=mask, coil_maps=maps, img_size=channels_first_size
    )


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def y():
    return images(2, *SHAPE)


# -- batches -------------------------------------------------------------------


@pytest.mark.parametrize(
    "physics",
    [
        pytest.param(None, id="denoising"),
        pytest.param(inpainting(), id="inpainting"),
        pytest.param(blur(), id="blur"),
    ],
)
@pytest.mark.parametrize("anderson", [0, 3])
def test_batch_equals_its_samples_one_by_one(physics, anderson):
    # Different images, intensities, noise levels, weights: different iteration counts.
    model = random_model(rtol=1e-6, solver=SolverOptions(anderson=anderson))
    x = images(3, *SHAPE)
    x[1] *= 1000
    sigma = torch.tensor([0.03, 100.0, 0.15], dtype=DOUBLE)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=DOUBLE)
    y = x if physics is None else physics(x)
    x_hat, info = model(y, physics, sigma=sigma, lambda_reg=weight, return_info=True)
    assert info.converged.all() and len(set(info.n_iter.tolist())) > 1
    for i in range(3):
        rows = slice(i, i + 1)
        single, alone = model(
            y[rows],
            physics,
            sigma=sigma[rows],
            lambda_reg=weight[rows],
            return_info=True,
        )
        assert relative_error(x_hat[rows], single) < 1e-10
        assert torch.equal(info.n_iter[rows], alone.n_iter)
        assert torch.equal(info.inner_iter[rows], alone.inner_iter)
        assert torch.equal(info.scale[rows], alone.scale)


# -- calls ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda m, y: m(y, sigma=0.1), id="keyword"),
        pytest.param(lambda m, y: m(y, 0.1), id="positional"),
        pytest.param(lambda m, y: m(y, None, 0.1), id="third"),
        pytest.param(lambda m, y: m(y, dinv.physics.Denoising(), 0.1), id="Denoising"),
        pytest.param(lambda m, y: m(y, torch.tensor(0.1, dtype=DOUBLE)), id="0-d"),
        pytest.param(lambda m, y: m(y, torch.tensor([0.1], dtype=DOUBLE)), id="1-d"),
        pytest.param(lambda m, y: m(y, torch.full((2,), 0.1, dtype=DOUBLE)), id="(B,)"),
        pytest.param(
            lambda m, y: m(y, sigma=torch.full((2, 1, 1, 1), 0.1, dtype=DOUBLE)),
            id="(B,1,1,1)",
        ),
        pytest.param(lambda m, y: m(y, [0.1, 0.1]), id="list"),
        pytest.param(lambda m, y: m(y, sigma=np.array([0.1, 0.1])), id="numpy"),
        pytest.param(lambda m, y: m(y, np.float64(0.1)), id="numpy scalar"),
        pytest.param(
            lambda m, y: m.prior.prox(
                y, 0.1, gamma=m.prior.default_lambda(0.1, y), rtol=1e-10
            ),
            id="prox",
        ),
    ],
)
def test_ways_to_denoise_agree(model, y, call):
    expected, info = model(y, sigma=0.1, return_info=True)
    assert info.sigma.tolist() == [0.1, 0.1]
    assert torch.allclose(call(model, y), expected, rtol=0, atol=1e-9)


def test_denoising_takes_the_noise_level_of_the_physics(model, y):
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    # The noise model keeps 0.1 in float32.
    level = physics.noise_model.sigma.double()
    assert torch.equal(model(y, physics), model(y, sigma=level))


def sigma_of(model, *args, **kwargs):
    return model(*args, **kwargs, return_info=True)[1].sigma.tolist()


def test_precedence_of_noise_levels(y):
    own = random_model(sigma=0.07)
    noisy = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.25))
    plain = dinv.physics.Denoising(dinv.physics.PoissonNoise(0.25))
    assert sigma_of(own, y, noisy, sigma=0.1) == [0.1, 0.1]
    assert sigma_of(own, y, noisy) == [0.25, 0.25]
    assert sigma_of(own, y, plain) == [0.07, 0.07]
    assert sigma_of(own, y) == [0.07, 0.07]


def test_inverse_problems_do_not_take_the_noise_level_of_the_physics(model, y):
    physics = inpainting(noise_model=dinv.physics.GaussianNoise(0.25))
    assert sigma_of(model, y, physics) == [DEFAULT_SIGMA] * 2
    assert sigma_of(random_model(sigma=0.07), y, physics) == [0.07, 0.07]
    assert sigma_of(model, y, physics, sigma=[0.1, 0.2]) == [0.1, 0.2]


def test_weight_of_inverse_problems_is_one_unless_given(model, y):
    physics = inpainting()
    info = model(y, physics, return_info=True)[1]
    assert info.lambda_reg.tolist() == [1, 1]
    info = random_model(lambda_reg=3.0)(y, physics, return_info=True)[1]
    assert info.lambda_reg.tolist() == [3, 3]
    info = model(y, physics, lambda_reg=[2.0, 4.0], return_info=True)[1]
    assert info.lambda_reg.tolist() == [2, 4]


def test_denoising_uses_the_learned_weight_unless_given(model, y):
    info = model(y, sigma=[0.05, 0.1], return_info=True)[1]
    kappa = model.prior.default_lambda(torch.tensor([0.05, 0.1], dtype=DOUBLE), y)
    torch.testing.assert_close(info.lambda_reg, kappa)
    info = model(y, sigma=0.1, lambda_reg=2.0, return_info=True)[1]
    assert info.lambda_reg.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("size", "low"), [(40, 0.6), (64, 0.85), (112, 0.9), (136, 0.9)]
)
def test_the_noise_level_of_colour_images_is_estimated_at_every_size(size, low):
    x = torch.from_numpy(astronaut()[:size, :size] / 255.0)
    x = x.permute(2, 0, 1)[None]
    noise = torch.randn(x.shape, generator=generator(0), dtype=DOUBLE)
    # The image does not matter, so it is made with few filters and in no time.
    hasty = {"max_iter": 0, "warn": False}
    model = random_model(random_prior(3, num_filters=1), **hasty)
    _, info = model(x + 0.1 * noise, sigma="estimate", return_info=True)
    assert low * 0.1 < float(info.sigma) < 1.1 * 0.1


def test_estimated_noise_level():
    y = 0.5 + 0.1 * torch.randn(2, 1, 40, 41, generator=generator(), dtype=DOUBLE)
    y[1] = 0.5 + 2 * (y[1] - 0.5)
    estimator = dinv.models.noise_level_estimation.PatchCovarianceNoiseEstimator()
    expected = estimator(y.float()).tolist()
    for model, kwargs in (
        (random_model(rtol=1e-3), {"sigma": "estimate"}),
        (random_model(rtol=1e-3, sigma="estimate"), {}),
    ):
        info = model(y, return_info=True, **kwargs)[1]
        assert info.sigma.tolist() == pytest.approx(expected)
        assert any("estimated" in note for note in info.notes)


def test_the_report_can_be_stored_with_its_mask(model, y):
    info = model(y, sigma=0.1, return_info=True)[1]
    other = pickle.loads(pickle.dumps(info))
    assert torch.equal(other.mask, info.mask) and other.compute_mask is None
    assert torch.equal(other.inner_iter, info.inner_iter) and other.notes == info.notes


def test_linear_map_without_a_physics_class(model, y):
    class Map:
        def __init__(self, physics):
            self.A, self.A_adjoint = physics.A, physics.A_adjoint

    expected = model(y, inpainting())
    assert relative_error(model(y, Map(inpainting())), expected) < 1e-8


# -- answers -------------------------------------------------------------------


def test_info_tells_how_it_went(model, y):
    x_hat, info = model(y, inpainting(), return_info=True)
    assert info.converged.all() and (info.status == 0).all()
    assert (info.residual <= 1e-10).all()
    assert info.history.shape == (info.n_iter.max() + 1, 2)
    assert torch.equal(info.history[0], torch.ones(2, dtype=DOUBLE))
    assert (info.inner_iter > 0).all()
    assert info.scale.tolist() == [1, 1] and info.notes == []
    expected = model.prior.mask(x_hat, DEFAULT_SIGMA)
    torch.testing.assert_close(info.mask, expected)
    assert info.mask.shape == (2, 4, 9, 8) and not info.mask.requires_grad


def test_the_report_says_in_words_how_it_went(model, y):
    _, info = model(y, inpainting(), return_info=True)
    lines = repr(info).splitlines()
    assert lines[0] == "ReconstructionInfo of 2 images"
    assert "  status: CONVERGED, CONVERGED" in lines
    assert f"  history: {len(info.history)} iterates" in lines
    assert "  n_iter: " + ", ".join(map(str, info.n_iter.tolist())) in lines
    _, many = model(y[:1].expand(9, -1, -1, -1), inpainting(), return_info=True)
    (status,) = (line for line in repr(many).splitlines() if "status" in line)
    assert status == "  status: " + "CONVERGED, " * 8 + "..."


def test_convergence_means_that_the_forces_balance(y):
    model = random_model(rtol=1e-3)
    x_hat, info = model(y, inpainting(), return_info=True)
    assert info.rtol == 1e-3 and (info.imbalance <= 1e-3).all()
    physics, prior = inpainting(), model.prior
    data = physics.A_adjoint(y - physics.A(x_hat))
    force = prior.grad(x_hat, DEFAULT_SIGMA)  # lambda is 1
    norm = torch.linalg.vector_norm
    for i in range(2):
        expected = norm(data[i] - force[i]) / norm(force[i])
        torch.testing.assert_close(info.imbalance[i], expected)
        expected = norm(data[i] - force[i]) / norm(physics.A_adjoint(y)[i])
        torch.testing.assert_close(info.residual[i], expected)


def test_an_image_that_only_fits_the_data_is_not_converged(y):
    # Almost no weight: the adjoint solves the equation up to 1e-4 of its norm, but the
    # pixels that were not measured are still zero.
    physics = dinv.physics.Inpainting(SHAPE, mask=(images(1, *SHAPE)[0] > 0.6).double())
    model = random_model(rtol=1e-2)
    start = physics.A_adjoint(physics(y))
    x_hat, info = model(
        physics(y), physics, lambda_reg=1e-4, init=start, return_info=True
    )
    assert info.history[0].max() < 1e-3 and info.converged.all()
    assert (info.n_iter > 0).all()
    assert relative_error(x_hat, start) > 0.1


def test_metrics_are_those_of_base_optim(y):
    seen = []

    def change(history, previous, current):
        seen.append([len(entries) for entries in history])
        assert previous.shape == current.shape == SHAPE
        return float((current - previous).abs().max())

    model = random_model(custom_metrics={"change": change})
    x = y + 0.01
    x_hat, metrics = model(y, inpainting(), x_gt=x, compute_metrics=True)
    n = len(metrics["residual"][0])
    for i in range(2):
        assert len(metrics["psnr"][i]) == n + 1 == len(metrics["nonlinear_residual"][i])
        assert len(metrics["change"][i]) == len(metrics["residual"][i]) == n
        psnr = dinv.metric.PSNR()(x_hat[i : i + 1], x[i : i + 1])
        assert metrics["psnr"][i][-1] == pytest.approx(float(psnr), abs=1e-4)
        assert metrics["nonlinear_residual"][i][-1] <= 1e-10
    assert seen[:3] == [[0, 0], [1, 0], [1, 1]]
    assert torch.equal(model(y, inpainting()), x_hat)
    answer = model(y, inpainting(), compute_metrics=True, return_info=True)
    assert len(answer) == 3 and answer[1]["psnr"] == [[], []]


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda x: x, id="tensor"),
        pytest.param(lambda x: lambda y, physics: x, id="callable"),
    ],
)
@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_init(model, form, factor):
    y = factor * images(2, *SHAPE)
    x_hat, cold = model(y, inpainting(), return_info=True)
    again, warm = model(y, inpainting(), init=form(x_hat), return_info=True)
    assert (cold.n_iter > 2).all() and (warm.n_iter <= 1).all()
    assert relative_error(again, x_hat) < 1e-8
    custom = random_model(init=lambda y, physics: x_hat)
    assert (custom(y, inpainting(), return_info=True)[1].n_iter <= 1).all()


@pytest.mark.parametrize("name", ["zero", "adjoint", "pseudo_inverse"])
def test_named_init(name):
    physics = inpainting()
    y = physics(images(2, *SHAPE))
    start = {
        "zero": torch.zeros_like(y),
        "adjoint": physics.A_adjoint(y),
        "pseudo_inverse": physics.A_dagger(y),
    }[name]
    expected = random_model(max_iter=0, warn=False)(y, physics, init=start)
    torch.testing.assert_close(expected, start)
    for call in ({"init": name}, {}):
        model = random_model(max_iter=0, warn=False, init=None if call else name)
        torch.testing.assert_close(model(y, physics, **call), start)


def test_init_is_not_modified(model, y):
    init = y.clone()
    model(y, inpainting(), init=init)
    assert torch.equal(init, y)


# -- units ---------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("physics", [None, inpainting(), blur()])
def test_equivariance_with_automatic_scale(model, y, physics, factor):
    sigma, y = 0.1 if physics is None else None, 0.6 * y
    expected = model(y, physics, sigma=sigma)
    scaled = sigma and factor * sigma
    x_hat, info = model(factor * y, physics, sigma=scaled, return_info=True)
    assert relative_error(x_hat, factor * expected) < 1e-8
    assert info.scale.tolist() == pytest.approx([factor, factor])
    assert "scale='auto'" in info.notes[0]


@pytest.mark.parametrize("factor", [1e-3, 7.3, 1e3])
def test_equivariance_with_given_scale(y, factor):
    expected = random_model(scale=1)(y, sigma=0.1)
    x_hat = random_model(scale=factor)(factor * y, sigma=factor * 0.1)
    assert relative_error(x_hat, factor * expected) < 1e-8
    expected = random_model(scale=None)(y, blur(), sigma=0.1)
    x_hat = random_model(scale=factor)(factor * y, blur(), sigma=factor * 0.1)
    assert relative_error(x_hat, factor * expected) < 1e-8


def test_each_sample_has_its_own_scale(model, y):
    y[1] *= 1000
    x_hat, info = model(y, sigma=[0.1, 100.0], return_info=True)
    assert info.scale.tolist() == pytest.approx([1, 1000])
    expected = torch.stack([model(y[i : i + 1], [0.1, 100.0][i])[0] for i in range(2)])
    torch.testing.assert_close(x_hat, expected, rtol=1e-9, atol=0)


def test_no_scale_means_other_masks(y):
    x_hat = random_model(scale=None)(1000 * y, sigma=100.0)
    assert relative_error(x_hat, 1000 * random_model()(y, sigma=0.1)) > 1e-3


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_scaled_operator_with_scaled_weight_gives_the_same_image(model, y, factor):
    def scaled(physics):
        return dinv.physics.LinearPhysics(
            A=lambda x: factor * physics.A(x),
            A_adjoint=lambda y: factor * physics.A_adjoint(y),
        )

    expected = model(y, blur(), lambda_reg=2.0)
    x_hat, info = model(
        factor * y, scaled(blur()), lambda_reg=factor**2 * 2.0, return_info=True
    )
    assert relative_error(x_hat, expected) < 1e-8
    assert info.scale.tolist() == pytest.approx([1, 1])


def test_zero_measurements_give_a_zero_image(model):
    for physics in (None, inpainting(), blur()):
        y = torch.zeros(2, *SHAPE, dtype=DOUBLE)
        x_hat, info = model(y, physics, sigma=0.1, return_info=True)
        assert torch.equal(x_hat, y)
        assert info.converged.all() and info.n_iter.tolist() == [0, 0]


@torch.enable_grad()
def test_zero_measurements_give_finite_gradients(model):
    y = torch.zeros(2, *SHAPE, dtype=DOUBLE, requires_grad=True)
    x_hat = model(y, sigma=0.1)
    parameters = [y, *model.prior.parameters()]
    gradients = torch.autograd.grad((x_hat - 1).square().sum(), parameters)
    assert all(g.isfinite().all() for g in gradients)


def test_zero_noise_level_is_finite(model, y):
    x_hat, info = model(y, sigma=0.0, return_info=True)
    assert x_hat.isfinite().all() and info.converged.all()


# -- constructor ---------------------------------------------------------------


def answer(y, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return random_model(**{"rtol": 1e-6, **kwargs})(
            y, dimmed_inpainting(), return_info=True
        )


def split(changes):
    """Settings of a model, those of its solver among them."""
    names = {option.name for option in fields(SolverOptions)}
    inner = {k: v for k, v in changes.items() if k in names}
    outer = {k: v for k, v in changes.items() if k not in names}
    return outer | {"solver": SolverOptions(**inner)}


def dimmed_inpainting():
    physics = inpainting()
    physics.mask = 0.7 * physics.mask
    return physics


CHANGES = {
    "sigma": 0.2,
    "lambda_reg": 3.0,
    "rtol": 1e-2,
    "max_iter": 2,
    "inner_max_iter": 1,
    "forcing": 0.01,
    "anderson": 4,
    "scale": 10.0,
    "preconditioner": "diagonal",
    "inner_dtype": torch.bfloat16,
    "lambda_mode": "relative",
    "init": lambda y, physics: y,
    "bounds": (0.3, 0.6),
    "data_fidelity": dinv.optim.L1(),
    "prior": random_prior(seed=5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_argument_changes_the_answer(y, name):
    # Inner solves so accurate that inner_max_iter has something to cut.
    base = {"forcing": 0.2} if name != "forcing" else {}
    x_hat, info = answer(y, **split({**base, name: CHANGES[name]}))
    expected, reference = answer(y, **split(base))
    assert not torch.equal(x_hat, expected)


IDENTITY = dinv.physics.LinearPhysics(A=lambda x: x, A_adjoint=lambda y: y)


@pytest.mark.parametrize("physics", [None, IDENTITY], ids=["denoising", "other"])
def test_iterations_are_accelerated_unless_told_otherwise(y, physics):
    def solve(**options):
        model = random_model(rtol=1e-6, solver=SolverOptions(**options))
        return model(y, physics, sigma=0.2, lambda_reg=1.0, return_info=True)

    (x_hat, own), (plain, slow) = solve(), solve(anderson=0)
    (told, _) = solve(anderson=5)
    assert torch.equal(x_hat, told) and not torch.equal(x_hat, plain)
    assert relative_error(x_hat, plain) < 1e-5
    assert own.converged.all() and slow.converged.all()


@pytest.mark.parametrize("physics", [None, IDENTITY], ids=["denoising", "other"])
def test_inverse_problems_are_accelerated_when_the_solution_is_near(y, physics):
    model = random_model(rtol=1e-2)
    with torch.no_grad():
        x = model(y, physics, sigma=0.2, lambda_reg=1.0)
        equation = model.pose(y, physics, 0.2, lambda_reg=1.0).equation
        frozen = [equation.freeze(x + t * (y - x)) for t in torch.linspace(0, 0.05, 9)]
    imbalance = torch.stack([f.residual / f.weight for f in frozen])
    assert (imbalance[0] < 0.02).all() and (imbalance[-1] > 0.02).all()
    expected = (imbalance < 0.02) | (physics is None)
    assert torch.equal(torch.stack([f.near for f in frozen]), expected)


class Overshooting(AttentiveQuadraticPrior):
    """Its weights grow with the differences, so plain iterations oscillate."""

    def __init__(self, power=1.0):
        super().__init__()
        self.power = power

    def regularizer(self, sigma):
        dx = torch.tensor([[0.0, 0, 0], [0, -1, 1], [0, 0, 0]])
        W = MultiConvOperator([torch.stack([dx, dx.T])[:, None]])
        return AttentiveQuadratic(W, lambda x: (W(x) / 0.1).abs() ** self.power + 1e-2)


def test_acceleration_is_given_up_where_inpainting_overshoots():
    """Also by samples that are near, no longer near, and near again."""
    x = images(2, 1, 12, 12, dtype=torch.float32)
    mask = (torch.rand(1, 12, 12, generator=generator(0)) < 0.6).float()
    physics = dinv.physics.Inpainting((1, 12, 12), mask=mask)
    y = physics.A(x) + 0.02 * torch.randn(x.shape, generator=generator(3))

    def solve(y, **options):
        model = DEAL(
            pretrained=None,
            prior=Overshooting(1.3),
            rtol=1e-3,
            scale=None,
            solver=SolverOptions(**options),
        )
        x_hat = model(y, physics, sigma=0.1, lambda_reg=0.1, return_info=True)
        assert x_hat[1].converged.all()
        return x_hat

    (together, info), (plain, slow) = solve(y), solve(y, anderson=0)
    assert relative_error(together, plain) < 1e-2
    assert (info.inner_iter < 3 * slow.inner_iter).all()
    for i in range(2):
        assert relative_error(together[i : i + 1], solve(y[i : i + 1])[0]) < 1e-3


@pytest.mark.parametrize("options", [{}, {"inner_dtype": torch.bfloat16}])
def test_acceleration_is_given_up_where_denoising_overshoots(options):
    x = images(3, 1, 6, 6, dtype=torch.float32).repeat_interleave(4, 2)
    y = x + 0.1 * torch.randn(x.shape, generator=generator(3))
    model = DEAL(
        pretrained=None,
        prior=Overshooting(),
        rtol=1e-3,
        solver=SolverOptions(**options),
    )
    together, info = model(y, sigma=0.1, lambda_reg=2.0, return_info=True)
    assert info.converged.all()
    for i in range(3):
        alone = model(y[i : i + 1], sigma=0.1, lambda_reg=2.0)
        assert relative_error(together[i : i + 1], alone) < 1e-3
    # The acceleration alone goes round in circles.
    stubborn = fixed_point(
        model.pose(y, None, 0.1, lambda_reg=2.0).equation.freeze,
        torch.zeros_like(y),
        rtol=1e-3,
        anderson=5,
        damped=False,
    )
    assert not stubborn.converged.all()


BLUR = dinv.physics.Blur(gaussian_blur(sigma=(1.6, 1.6)), padding="circular").double()


@pytest.mark.parametrize(
    ("physics", "level", "settings", "most"),
    [(None, 25, {"sigma": 25 / 255}, 0.8), (BLUR, 2.55, {"lambda_reg": 0.5}, 0.98)],
    ids=["denoising", "deblurring"],
)
def test_trained_weights_take_less_work_by_acceleration(physics, level, settings, most):
    """In double precision: in single, rounding can cost or save an iteration."""
    gray = torch.from_numpy(astronaut().mean(-1) / 255)
    corners = (60, 200), (0, 180)
    x = torch.stack([gray[i : i + 40, j : j + 40] for i, j in corners])[:, None]
    y = x if physics is None else physics.A(x)
    y = y + level / 255 * torch.randn(y.shape, generator=generator(1))

    @torch.no_grad()
    def work(**options):
        model = DEAL(rtol=2e-3, solver=SolverOptions(**options)).double()
        x_hat, info = model(y, physics, **settings, return_info=True)
        assert info.converged.all()
        return x_hat, float((2 * info.n_iter + info.inner_iter).sum())

    (x_hat, fast), (plain, slow) = work(), work(anderson=0)
    assert relative_error(x_hat, plain) < 1e-3
    assert fast < most * slow  # found: 0.63 and 0.88


def test_every_argument_is_tested():
    elsewhere = {
        "self",
        "settings",  # those of all models
        "solver",  # its options are among the changes
        "in_channels",  # test_shape_arguments
        "num_filters",
        "normalization",
        "complex_mode",  # test_mri_images
        "slices",  # tests/models/test_volumes.py
        "adjoint",  # test_backward_settings
        "trainable_params",  # test_trainable_parameters
        "custom_metrics",  # test_metrics_are_those_of_base_optim
        "warn",  # test_unconverged_sample
        "strict",  # tests/models/test_status.py
        "show_progress_bar",  # tests/models/test_capabilities.py
        "device",  # test_device
        "pretrained",  # tests/test_weights.py
    }
    arguments = {
        name
        for kind in (DEAL, ReconstructionModel)
        for name in inspect.signature(kind.__init__).parameters
    }
    options = {option.name for option in fields(SolverOptions)} - {"method"}
    assert arguments | options == elsewhere | set(CHANGES)


def test_shape_arguments():
    model = DEAL(3, 5, normalization="exact", pretrained=None)
    prior = model.prior
    assert (prior.in_channels, prior.num_filters) == (3, 5)
    assert prior.W.normalization == "exact"
    assert DEAL(pretrained=None).prior.num_filters == 128


@pytest.mark.parametrize(
    "kwargs", [{"in_channels": 3}, {"num_filters": 7}, {"normalization": "exact"}]
)
def test_shape_arguments_that_contradict_the_prior_raise(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        DEAL(prior=random_prior(), pretrained=None, **kwargs)


@torch.enable_grad()
def test_backward_settings(y):
    def gradient(config):
        model = random_model(adjoint=config, rtol=1e-11)
        loss = model(y, sigma=0.1).square().sum()
        return torch.autograd.grad(loss, model.prior.W.weight[0])[0]

    exact = gradient(AdjointOptions(rtol=1e-10, max_iter=300, anderson=0))
    accelerated = gradient(AdjointOptions(rtol=1e-10, anderson=3))
    loose = gradient(AdjointOptions(rtol=1e-2, max_iter=300, anderson=0))
    free = gradient(AdjointOptions(jacobian_free=True))
    assert relative_error(accelerated, exact) < 1e-8
    assert 1e-8 < relative_error(loose, exact) < 0.1
    assert relative_error(free, exact) > 1e-3


@torch.enable_grad()
def test_trainable_parameters(y):
    names = ["lambda_reg", "sigma"]
    model = random_model(sigma=0.1, lambda_reg=2.0, trainable_params=names)
    assert names == ["lambda_reg", "sigma"]
    parameters = {n: p for n, p in model.named_parameters() if n in names}
    assert len(parameters) == 2
    loss = model(y, inpainting()).square().sum()
    gradients = torch.autograd.grad(loss, tuple(parameters.values()))
    assert all(g.isfinite().all() and g.abs() > 0 for g in gradients)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(y, inpainting()).square().sum().backward()
    optimizer.step()
    info = model(y, inpainting(), return_info=True)[1]
    assert info.lambda_reg.tolist() != [2, 2]


def test_trainable_parameters_need_a_value():
    with pytest.raises(ValueError, match="lambda_reg"):
        DEAL(prior=random_prior(), pretrained=None, trainable_params=["lambda_reg"])
    with pytest.raises(ValueError, match="trainable_params.*'sigmma'"):
        DEAL(prior=random_prior(), pretrained=None, trainable_params=["sigmma"])


# -- physics -------------------------------------------------------------------


@pytest.mark.parametrize("coils", [None, 3])
def test_mri_images(coils):
    physics, x = mri(coils=coils), images(2, 2, 8, 10)
    y = physics(x)
    rough = random_model(complex_mode="real_imag", rtol=1e-4)
    both, info = rough(y, physics, return_info=True)
    assert both.shape == x.shape and info.converged.all()
    assert info.mask.shape == (2, 8, 8, 10)
    real, info = random_model(complex_mode="real")(
        y, physics, x_gt=x, init=x, return_info=True
    )
    assert real.shape == x.shape and info.converged.all()
    assert (real[:, 1] == 0).all() and (real[:, 0] != both[:, 0]).any()
    # The real model solves the problem restricted to real images.
    prior = random_prior()
    r = physics.A_adjoint(y - physics.A(real))[:, :1] - prior.grad(
        real[:, :1], DEFAULT_SIGMA
    )
    assert relative_error(r + real[:, :1], real[:, :1]) < 1e-8


def test_two_channels_denoise_one_by_one(model):
    y = images(2, 2, 9, 8)
    parts = [model(y[:, i : i + 1], sigma=0.1) for i in range(2)]
    assert relative_error(model(y, sigma=0.1), torch.cat(parts, 1)) < 1e-8
    real = random_model(complex_mode="real")(y, sigma=0.1)
    assert torch.equal(real[:, 1], torch.zeros_like(real[:, 1]))


def test_colour_images():
    x = images(2, 3, 9, 8)
    x_hat = random_model(random_prior(3))(x, sigma=0.1)
    assert x_hat.shape == x.shape


def test_stacked_physics(model, y):
    physics = dinv.physics.StackedLinearPhysics([inpainting(), blur()])
    x_hat, info = model(physics(y), physics, return_info=True)
    b = physics.A_adjoint(physics(y))
    r = b - physics.A_adjoint(physics.A(x_hat)) - model.prior.grad(x_hat, DEFAULT_SIGMA)
    assert info.converged.all()
    assert float(r.norm() / b.norm()) < 1e-9


@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 1, 1), (1, 2, 33)])
def test_odd_and_tiny_images(model, shape):
    assert model(images(1, *shape), sigma=0.1).shape == (1, *shape)


# -- a good citizen ------------------------------------------------------------


def test_train_and_eval_agree(model, y):
    expected = model.eval()(y, sigma=0.1)
    assert torch.equal(model.train()(y, sigma=0.1), expected)
    model.eval()


def used_model(y):
    model = random_model(sigma=0.1, lambda_reg=2.0, trainable_params=["lambda_reg"])
    with torch.enable_grad():
        model(y, sigma=0.1).sum().backward()
    return model


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_equal_and_independent(y, copier):
    model = used_model(y)
    expected = model(y)
    other = copier(model)
    assert torch.equal(other(y), expected)
    for p in other.parameters():
        p.mul_(1.1)
    assert not torch.equal(other(y), expected)
    assert torch.equal(model(y), expected)


def test_state_dict_round_trip(y):
    model = used_model(y)
    other = random_model(
        random_prior(seed=9), sigma=0.1, lambda_reg=1.0, trainable_params=["lambda_reg"]
    )
    assert not torch.equal(other(y), model(y))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(y), model(y))


def test_nothing_but_the_answer_changes(model, y):
    physics = blur(max_iter=77, tol=3e-3, solver="CG")
    y.requires_grad_(False)
    before, state = y.clone(), torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    model(y, physics, init=y, x_gt=y, compute_metrics=True, return_info=True)
    assert (physics.max_iter, physics.tol, physics.solver) == (77, 3e-3, "CG")
    assert torch.equal(y, before) and not y.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision


def test_calls_do_not_influence_each_other(model, y):
    expected = model(y, inpainting())
    model(images(1, 2, 5, 6), sigma=0.3, lambda_reg=7.0)
    assert torch.equal(model(y, inpainting()), expected)


def test_unconverged_sample_is_reported_once(y):
    model = random_model(max_iter=4, rtol=1e-8)
    easy = model(y[:1], sigma=1e-5)
    y = torch.cat([easy, y[1:]])
    with pytest.warns(ConvergenceWarning, match="imbalance") as caught:
        x_hat, info = model(
            y, sigma=[1e-5, 0.1], lambda_reg=[1e-12, 5.0], return_info=True
        )
    assert len(caught) == 1
    assert "1 of 2 samples (index 1)" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert info.converged.tolist() == [True, False]
    assert info.residual[1] > 1e-8 and x_hat.isfinite().all()
    quiet, info = random_model(max_iter=4, rtol=1e-8, warn=False)(
        y, sigma=[1e-5, 0.1], lambda_reg=[1e-12, 5.0], return_info=True
    )
    assert torch.equal(quiet, x_hat) and info.converged.tolist() == [True, False]


def test_device(model, y):
    expected = model(y, sigma=0.1)
    model.device = torch.device("cpu")  # deepinv_bench sets it
    assert torch.equal(model(y, sigma=0.1), expected)
    assert next(random_model(device="meta").parameters()).is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("physics", [None, inpainting, blur, mri])
def test_inner_solves_in_16_bits_find_the_same_image(monkeypatch, physics, dtype):
    precisions = []

    def conv2d(x, kernel, *args, **kwargs):
        precisions.append((x.dtype, kernel.dtype))
        return plain(x, kernel, *args, **kwargs)

    plain = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    physics = None if physics is None else physics()
    complex_image = isinstance(physics, dinv.physics.MRI)
    y = images(2, 2, 8, 10) if complex_image else images(2, *SHAPE)
    y = y if physics is None else physics.A(y)
    # Rounding has to be corrected many times on the way to this tolerance.
    settings = {"sigma": 0.1, "lambda_reg": 0.5, "return_info": True}
    x_hat, info = random_model(rtol=1e-9)(y, physics, **settings)
    assert set(precisions) == {(torch.float64,) * 2}
    precisions.clear()
    fast = random_model(rtol=1e-9, solver=SolverOptions(inner_dtype=dtype))
    x_fast, info_fast = fast(y, physics, **settings)
    assert info_fast.converged.all()
    assert set(precisions) == {(torch.float64,) * 2, (dtype,) * 2}
    assert relative_error(x_fast, x_hat) < 1e-7
    assert (info_fast.inner_iter <= 1.5 * info.inner_iter + 3).all()


def test_what_nobody_corrects_is_computed_in_full_precision(y):
    options = [SolverOptions(), SolverOptions(inner_dtype=torch.bfloat16)]
    plain, fast = (random_model(solver=solver) for solver in options)
    # One step of deepinv's own loop.
    start = {"est": (y, y), "cost": None}
    params = {"lambda": 1.0, "g_param": 0.1}
    physics = dinv.physics.Denoising()
    steps = [
        FrozenIteration(solver=solver)(
            start, dinv.optim.L2(), plain.prior, params, y, physics
        )
        for solver in options
    ]
    assert torch.equal(steps[0]["est"][0], steps[1]["est"][0])
    # The linearization, and the path of plain iterations.
    v = images(1, 1, *y.shape[2:])
    maps = [interpret.linearize(m, y[:1], sigma=0.1).normal(v) for m in (plain, fast)]
    assert relative_error(*maps) < 1e-6
    paths = [
        interpret.solution_path(m, y[:1], sigma=0.1, num_iter=2) for m in (plain, fast)
    ]
    assert torch.equal(paths[0].x, paths[1].x)


@torch.enable_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_preconditioner_is_made_once_for_both_passes(monkeypatch, y, dtype):
    made = []
    make = Preconditioning.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(Preconditioning, "__init__", counted)
    options = SolverOptions(inner_dtype=dtype, preconditioner="circulant")
    model = random_model(solver=options)
    model(blur().A(y), blur(), lambda_reg=0.5).square().sum().backward()
    assert len(made) == 1


def test_a_prior_may_pose_its_own_equation(y):
    class Own(Overshooting):
        def equation(self, data, *, lambda_reg=None, **settings):
            return super().equation(data, lambda_reg=0.5 * lambda_reg, **settings)

    y, settings = y.float(), {"sigma": 0.1}
    x_hat = DEAL(pretrained=None, prior=Own())(y, lambda_reg=2.0, **settings)
    expected = DEAL(pretrained=None, prior=Overshooting())
    assert torch.equal(x_hat, expected(y, lambda_reg=1.0, **settings))
    proximal = Own().prox(y, 0.1, gamma=2.0)
    assert torch.equal(proximal, Overshooting().prox(y, 0.1, gamma=1.0))


def test_inner_precision_is_for_quadratic_priors(y):
    options = SolverOptions(inner_dtype=torch.bfloat16)
    optim = FixedPointOptim(MMRPrior(num_filters=2), solver=options)
    message = "inner_dtype=torch.bfloat16 is no setting of MMR"
    with pytest.raises(ValueError, match=message):
        optim(y.float(), dinv.physics.Denoising())


@torch.enable_grad()
def test_gradients_do_not_depend_on_the_precision_of_inner_solves(y):
    def gradient(**options):
        model = random_model(rtol=1e-11, solver=SolverOptions(**options))
        loss = model(y, sigma=0.1).square().sum()
        return torch.autograd.grad(loss, model.prior.W.weight[0])[0]

    exact, fast = gradient(), gradient(inner_dtype=torch.bfloat16)
    assert relative_error(fast, exact) < 1e-6


def test_float32_agrees_with_float64(y):
    expected = random_model()(y, inpainting())
    model = random_model(random_prior(dtype=torch.float32), rtol=1e-5)
    physics = inpainting().to(torch.float32)
    assert relative_error(model(y.float(), physics).double(), expected) < 1e-4


def test_moved_model_moves_all(y):
    model = random_model(random_prior(dtype=torch.float32), rtol=1e-5)
    expected = model(y.float(), sigma=0.1)
    assert model.double()(y, sigma=0.1).dtype == DOUBLE
    torch.testing.assert_close(model.float()(y.float(), sigma=0.1), expected)


# -- as a part of deepinv ------------------------------------------------------


def test_denoiser_in_plug_and_play_and_red(model, y):
    physics = blur()
    # Few iterations: random weights do not make a contraction.
    for prior in (dinv.optim.PnP(model), dinv.optim.RED(model)):
        optimizer = (
            dinv.optim.PGD if isinstance(prior, dinv.optim.PnP) else dinv.optim.GD
        )
        solver = optimizer(
            prior=prior,
            data_fidelity=dinv.optim.L2(),
            stepsize=0.5,
            g_param=0.05,
            max_iter=3,
        )
        assert solver(physics(y), physics).shape == y.shape


def test_denoiser_in_artifact_removal(model, y):
    physics = inpainting(noise_model=dinv.physics.GaussianNoise(0.1))
    reconstructor = dinv.models.ArtifactRemoval(model)
    x_hat = reconstructor(y, physics)
    level = physics.noise_model.sigma.double()
    assert torch.equal(x_hat, model(physics.A_adjoint(y), sigma=level))


def test_model_is_reconstructor_and_denoiser(model):
    assert isinstance(model, dinv.models.Reconstructor)
    assert isinstance(model, dinv.models.Denoiser)
