"""What a third look found: levels of stacks, units with derivatives, arguments."""

from __future__ import annotations

import warnings

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Denoising, GaussianNoise
from problems import DOUBLE, generator, images, random_l1_prior, random_prior
from skimage.data import camera

from deepinv_deal import DEAL, AdjointOptions, ConvergenceWarning, SAFIPrior
from deepinv_deal.optim import SmoothedL1, WeightedL2
from deepinv_deal.priors import PatchSynthesisPrior

PRECISE = {
    "rtol": 1e-12,
    "max_iter": 500,
    "adjoint": AdjointOptions(rtol=1e-10, max_iter=500),
}


def white(shape, seed=1):
    return torch.randn(shape, generator=generator(seed), dtype=DOUBLE)


def small_model(**settings):
    return DEAL(pretrained=None, prior=random_prior(), **settings)


# -- stacks ----------------------------------------------------------------------------


def stack(*levels):
    parts = [Denoising(GaussianNoise(level)) for level in levels]
    return dinv.physics.StackedLinearPhysics(parts)


def measured(physics, x):
    levels = [part.noise_model.sigma for part in physics.physics_list]
    noise = [level * white(x.shape, i).to(x) for i, level in enumerate(levels)]
    return dinv.utils.TensorList([x + n for n in noise])


def test_parts_of_a_stack_count_as_their_noise_levels_say():
    """They counted alike, and the noisy one spoiled the other, by 20 dB."""
    x = torch.from_numpy(camera()[80:112, 200:232] / 255).float()[None, None]
    physics = stack(0.02, 0.4)
    y = measured(physics, x)
    with torch.no_grad():
        x_hat, info = DEAL()(y, physics, return_info=True)
        alone = DEAL()(y[0], physics.physics_list[0])
    psnr = dinv.metric.PSNR()
    assert psnr(x_hat, x) > psnr(alone, x) - 0.5
    assert any("noise levels of GaussianNoise" in note for note in info.notes)


def test_a_stack_of_equal_levels_is_plain_least_squares():
    x = images(1, 1, 8, 8)
    for levels in ((0.1, 0.1), (0.1, 0.0)):
        physics = stack(*levels)
        problem = small_model().pose(measured(physics, x), physics)
        assert problem.data.quadratic and not problem.data.notes


def test_levels_of_samples_make_weights_too():
    x = images(2, 1, 8, 8)
    physics = stack(torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.3]))
    y = measured(stack(0.1, 0.2), x)
    x_hat = small_model(**PRECISE)(y, physics)
    for i in range(2):
        levels = [float(p.noise_model.sigma[i]) for p in physics.physics_list]
        single = dinv.utils.TensorList([part[i : i + 1] for part in y])
        # equal levels of a sample are weights here, as those of the others
        one = stack(torch.full((1,), levels[0]), torch.full((1, 1, 1, 2), levels[1]))
        one.physics_list[1].noise_model.sigma = torch.full((1, 1, 8, 8), levels[1])
        torch.testing.assert_close(
            x_hat[i : i + 1], small_model(**PRECISE)(single, one), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["stack", "map", "l1"])
def test_images_with_weights_may_stand_on_a_pedestal(kind):
    """Where a stack became one with weights, its pedestal was not recognised."""
    x = torch.from_numpy(camera()[80:104, 200:224] / 255).double()[None, None]
    settings = {}
    if kind == "stack":
        physics = stack(0.1, 0.2)
        y = measured(physics, x)
    else:
        y, physics = x + 0.1 * white(x.shape), None
        settings = {"sigma": 0.1, "lambda_reg": 1.0}
        if kind == "map":
            weights = 100 + 50 * white(x.shape, 2).tanh()
            settings["data_fidelity"] = WeightedL2(weights)
        else:
            settings["data_fidelity"] = SmoothedL1(0.1)

    def on(height):
        if kind == "stack":
            return dinv.utils.TensorList([part + height for part in y])
        return y + height

    model = DEAL(rtol=1e-8, **settings).double()
    x_hat, info = model(on(1000), physics, return_info=True)
    assert info.converged and any("pedestal" in note for note in info.notes)
    offset = float(model.pose(on(1000), physics).data.offset)
    assert abs(offset - 1000) < 1
    rest = DEAL(rtol=1e-8, scale=1.0, **settings).double()(on(1000 - offset), physics)
    torch.testing.assert_close(x_hat, rest + offset, rtol=0, atol=1e-6)


def test_levels_of_other_numbers_of_samples_are_named():
    x = images(3, 1, 8, 8)
    physics = stack(torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match=r"noise_model: .* numbers of samples, \[2, 3"):
        small_model()(measured(stack(0.1, 0.1), x), physics)


def test_one_level_is_no_map_whatever_its_shape():
    x = images(1, 1, 8, 8)
    mask = (white(x.shape, 3) > 0).double()
    results = []
    for level in (torch.tensor(0.05), torch.full((1, 1, 1, 1), 0.05)):
        physics = dinv.physics.Inpainting((1, 8, 8), mask=mask)
        physics.noise_model = GaussianNoise(0.05)
        physics.noise_model.sigma = level
        problem = small_model().pose(physics.A(x), physics)
        assert problem.data.quadratic
        results.append(problem.equation.lambda_reg)
    assert torch.equal(*results)


# -- derivatives of units and default weights ------------------------------------------


def slope_and_difference(function, t0, step):
    """Derivative of a function of one number, and what differences say."""
    t = torch.tensor(float(t0), dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(function(t), t)
    with torch.no_grad():
        ends = [function(t.detach() + sign * step) for sign in (1, -1)]
    return float(slope), float((ends[0] - ends[1]) / (2 * step))


def amplified(noise):
    def physics(c):
        return dinv.physics.LinearPhysics(
            A=lambda x: c * x, A_adjoint=lambda y: c * y, noise_model=noise
        )

    return physics


@pytest.mark.parametrize("kind", ["counts", "map", "transmission"])
@pytest.mark.parametrize("given", [{}, {"sigma": 0.1}, {"lambda_reg": 5.0}])
def test_default_weights_have_derivatives_in_the_physics(kind, given):
    x, v = 1 + 0.5 * white((1, 1, 8, 8)).tanh(), white((1, 1, 8, 8), 2)
    if kind == "counts":
        y = 0.01 * torch.poisson(100 * x, generator=generator(4))
        physics = amplified(dinv.physics.PoissonNoise(0.01))
    elif kind == "map":
        y = x + 0.1 * white(x.shape, 5)
        physics = amplified(GaussianNoise(0.1 + 0.05 * white(x.shape, 6).tanh()))
    else:
        y = x + 0.1 * white(x.shape, 5)
        physics = amplified(dinv.physics.LogPoissonNoise(N0=300.0, mu=1.0))
    model = small_model(**PRECISE, scale=None)

    def function(c):
        return (v * model(y, physics(c), **given)).sum()

    slope, difference = slope_and_difference(function, 1, 1e-7)
    assert slope == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("bounds", [None, (100.2, 100.8)])
def test_an_image_on_a_pedestal_has_the_derivative_of_one_without(bounds):
    """The pedestal moved with the data, and its derivative was missing."""
    x, v = 0.5 + 0.3 * white((1, 1, 12, 12)).tanh(), white((1, 1, 12, 12), 2)
    direction = white(x.shape, 3)
    model = small_model(**PRECISE, sigma=0.1, bounds=bounds)

    def function(t):
        return (v * model(100 + x + t * direction)).sum()

    problem = model.pose(100 + x)
    assert problem.data.offset is not None and bool((problem.data.offset != 0).all())
    slope, difference = slope_and_difference(function, 0, 1e-7)
    assert slope == pytest.approx(difference, rel=1e-4)


# -- arguments -------------------------------------------------------------------------


def test_hyperparameters_are_copies_of_the_callers_tensors():
    mine = {"sigma": torch.tensor([0.1, 0.2]), "lambda_reg": torch.tensor(0.5)}
    before = {name: value.clone() for name, value in mine.items()}
    model = small_model(**mine)
    other = {"sigma": torch.tensor([0.3, 0.3]), "lambda_reg": torch.tensor(3.0)}
    model.load_state_dict(small_model(**other).state_dict())
    assert all(torch.equal(mine[name], before[name]) for name in mine)
    mine["sigma"].fill_(1)
    assert torch.equal(model.sigma, other["sigma"])


def test_a_weight_in_training_may_step_below_zero_and_come_back():
    y = images(1, 1, 8, 8)
    model = small_model(lambda_reg=0.0, trainable_params=["lambda_reg"], sigma=0.1)
    (at_zero,) = torch.autograd.grad(model(y).square().sum(), model.lambda_reg)
    model.lambda_reg.data.fill_(-0.3)
    x_hat = model(y)
    torch.testing.assert_close(x_hat, y)
    (slope,) = torch.autograd.grad(x_hat.square().sum(), model.lambda_reg)
    assert slope == at_zero != 0
    frozen = torch.nn.Parameter(torch.tensor(-0.3), requires_grad=False)
    for negative in (-0.3, torch.tensor(-0.3), frozen):
        with pytest.raises(ValueError, match="lambda_reg must not be negative"):
            model(y, lambda_reg=negative)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": torch.tensor([1.0, 2.0])}, "scale must be one number, got"),
        ({"scale": [1.0, 2.0]}, "scale must be one number, got"),
        ({"max_iter": 2.5}, "max_iter must be a whole number"),
        ({"max_iter": -1}, "max_iter must be a whole number"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        small_model(**settings)


def test_no_precision_is_advised_that_is_refused():
    y = images(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"Convert it: y\.to\(torch\.float64\)\.$"):
        small_model()(y.half(), 0.1)
    with pytest.raises(ValueError, match=r"or model\.to\(torch\.float32\)"):
        small_model()(y.float(), 0.1)


def test_a_physics_that_changed_since_it_was_examined_is_suspected():
    x = images(1, 1, 8, 8)
    mask = (white(x.shape, 3) > 0).double()
    physics = dinv.physics.Inpainting((1, 8, 8), mask=mask)
    model, y = small_model(max_iter=1, rtol=1e-12), physics.A(x)
    with pytest.warns(ConvergenceWarning, match="examine it again"):
        model(y, model.examine(y, physics))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(y, physics)
    assert "examine" not in str(caught[-1].message)


@pytest.mark.parametrize("name", ["grad", "prox", "mask"])
def test_priors_check_their_arguments(name):
    prior, x = random_prior(), images(3, 1, 8, 8)
    function = getattr(prior, name)
    with pytest.raises(ValueError, match=r"sigma must hold one value, or one per"):
        function(x, sigma=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="sigma must not be negative"):
        function(x, sigma=-0.1)
    with pytest.raises(TypeError, match="x must be floating point"):
        function(x.to(torch.uint8), sigma=0.1)
    if name == "prox":
        with pytest.raises(ValueError, match="gamma must not be negative"):
            function(x, sigma=0.1, gamma=-1.0)


def test_other_priors_check_theirs_too():
    x = images(3, 1, 8, 8)
    attentive = random_l1_prior(SAFIPrior)
    patches = PatchSynthesisPrior(4, 3)
    for prior in (attentive, patches):
        with pytest.raises(ValueError, match="gamma must hold one value, or one per"):
            prior.prox(x.to(next(prior.parameters())), gamma=torch.ones(2))
        with pytest.raises(TypeError, match="x must be floating point"):
            prior.grad(x.to(torch.uint8))
    with pytest.raises(ValueError, match="sigma must hold one value, or one per"):
        patches.grad(x.float(), sigma=torch.ones(2))
