"""DEALPrior against the reference implementation in deepinv, and as a deepinv prior."""

import deepinv as dinv
import pytest
import torch
from deepinv.models.deal import LinearSpline as ReferenceSpline
from problems import (
    DOUBLE,
    generator,
    images,
    random_model,
    random_prior,
    relative_error,
)

from deepinv_deal import DEAL, DEALPrior
from deepinv_deal.weights.layouts import LAYOUTS

SIGMA = 0.1


def reference_model(color: bool):
    """deepinv's DEAL with random weights and masks that fill (0.01, 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = dinv.models.DEAL(pretrained=None, color=color).model.double().eval()
    g = generator(4)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g, dtype=DOUBLE)
            p.add_(0.05 * p.abs().mean() * noise)
        model.spline_scaling.coefficients.add_(2.0)
        # In float64 the reference rounds 2.9 / 0.1 down to 28, and continues the last
        # but one piece of spline3 beyond its knots, not the last. With the tail of the
        # Gaussian both give less than 0.01, where the mask is clipped.
        tail = model.spline3.coefficients[0, 25:]
        tail.copy_(torch.exp(-(torch.linspace(2.5, 3, len(tail), dtype=DOUBLE) ** 2)))
    # The reference keeps the knots as integers and divides them in float32, also after
    # .double(): its distance of the knots is 0.1 + 1.5e-9. The comparison to 1e-10
    # needs the same knots, so the buffers are set to what their formulas give in
    # float64.
    for m in model.modules():
        if isinstance(m, ReferenceSpline):
            m.x_min, m.x_max = m.x_min.double(), m.x_max.double()
            m.step_size = (m.x_max - m.x_min) / (m.num_knots - 1)
    with torch.no_grad():
        model.W1.spectral_norm()
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["gray", "colour"])
def pair(request):
    reference = reference_model(request.param)
    prior = DEALPrior(3 if request.param else 1, 128).double()
    theirs = reference.state_dict()  # in float64, which from_authors would round
    state = {ours: theirs[e.name] for ours, e in LAYOUTS[DEALPrior].items()}
    prior.load_state_dict(state)
    return reference, prior


@torch.no_grad()
def test_filters_equal_the_reference(pair):
    reference, prior = pair
    x = images(2, prior.in_channels, 9, 8)
    z = torch.randn(2, 128, 9, 8, generator=generator(), dtype=DOUBLE)
    assert relative_error(prior.W(x), reference.W1(x)) < 1e-10
    assert relative_error(prior.W.adjoint(z), reference.W1.transpose(z)) < 1e-10


@torch.no_grad()
def test_spectral_norm_equals_the_reference(pair):
    reference, prior = pair
    assert relative_error(prior.W.sqnorm(), reference.W1.L) < 1e-10


@torch.no_grad()
def test_masks_and_weights_equal_the_reference(pair):
    reference, prior = pair
    x = images(2, prior.in_channels, 9, 8)
    sigma = torch.tensor([0.03, 0.12], dtype=DOUBLE)
    reference.cal_scaling(255 * sigma.view(2, 1, 1, 1))
    reference.cal_lambda(255 * sigma.view(2, 1, 1, 1))
    expected = reference.cal_mask(x)
    assert expected.min() < 0.2 and expected.max() > 0.8
    assert relative_error(prior.mask(x, sigma), expected) < 1e-10
    assert (
        relative_error(prior.default_lambda(sigma, x), reference.lmbda.view(2)) < 1e-10
    )


def residual_by_reference(reference, x, b, physics, sigma, lambda_reg):
    """||b - A(x) x|| / ||b|| per sample, by the functions of the reference."""
    n = len(x)
    reference.cal_scaling(sigma.view(n, 1, 1, 1) * 255)
    reference.cal_mask(x)
    reference.lmbda = lambda_reg.view(n, 1, 1, 1)
    left = reference.BtB(x, physics.A, physics.A_adjoint, list(range(n)))
    r = b - left * (1 + reference.lmbda)
    return r.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "problem",
    ["denoising", "inpainting", pytest.param("blur", marks=pytest.mark.slow)],
)
def test_fixed_point_solves_the_equation_of_the_reference(pair, problem):
    reference, prior = pair
    x = images(2, prior.in_channels, 9, 8)
    sigma = torch.tensor([0.05, 0.1], dtype=DOUBLE)
    physics = {
        "denoising": lambda: dinv.physics.Denoising(),
        "inpainting": lambda: dinv.physics.Inpainting(
            x.shape[1:], mask=(images(1, 1, 9, 8, seed=5)[0] > 0.5).double()
        ),
        "blur": lambda: dinv.physics.Blur(
            torch.ones(1, 1, 3, 3, dtype=DOUBLE) / 9, padding="circular"
        ),
    }[problem]()
    y = physics.A(x)
    model = DEAL(pretrained=None, prior=prior, rtol=1e-9, max_iter=500)
    x_hat, info = model(y, physics, sigma=sigma, return_info=True)
    expected = residual_by_reference(
        reference, x_hat, physics.A_adjoint(y), physics, sigma, info.lambda_reg
    )
    assert info.converged.all()
    assert (expected <= 1e-8).all()
    torch.testing.assert_close(info.residual, expected, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_grad_is_the_gradient_of_the_frozen_function(channels):
    prior = random_prior(3 if channels == 3 else 1)
    x = images(2, channels, 9, 8).requires_grad_()
    (expected,) = torch.autograd.grad(prior.frozen_fn(x, x.detach(), SIGMA).sum(), x)
    with torch.no_grad():
        assert relative_error(prior.grad(x, SIGMA), expected) < 1e-12


def test_frozen_function_is_half_a_squared_norm():
    prior = random_prior()
    x, z = images(2, 1, 9, 8), images(2, 1, 9, 8, seed=1)
    sigma = torch.tensor([0.05, 0.1], dtype=DOUBLE)
    expected = 0.5 * (prior.mask(z, sigma) * prior.W(x)).square().sum((1, 2, 3))
    torch.testing.assert_close(prior.frozen_fn(x, z, sigma), expected)


def test_two_channels_are_regularized_one_by_one():
    prior = random_prior()
    x = images(2, 2, 9, 8)
    sigma = torch.tensor([0.05, 0.1], dtype=DOUBLE)
    parts = [prior.grad(x[:, i : i + 1], sigma) for i in range(2)]
    torch.testing.assert_close(prior.grad(x, sigma), torch.cat(parts, 1))


@torch.no_grad()
def test_prox_solves_its_equation():
    prior = random_prior()
    x = images(2, 1, 9, 8)
    sigma = torch.tensor([0.05, 0.1], dtype=DOUBLE)
    gamma = torch.tensor([0.5, 3.0], dtype=DOUBLE)
    z = prior.prox(x, sigma, gamma=gamma, rtol=1e-10)
    residual = z + gamma.view(2, 1, 1, 1) * prior.grad(z, sigma) - x
    assert (residual.flatten(1).norm(dim=1) <= 1e-9 * x.flatten(1).norm(dim=1)).all()


def test_prox_is_denoising_by_the_model():
    prior = random_prior()
    x = images(2, 1, 9, 8)
    with torch.no_grad():
        z = prior.prox(x, SIGMA, gamma=2.0, rtol=1e-11)
        expected = random_model(prior, rtol=1e-11)(x, sigma=SIGMA, lambda_reg=2.0)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)


def test_prox_that_does_not_converge_warns():
    from deepinv_deal import ConvergenceWarning

    with pytest.warns(ConvergenceWarning, match="DEALPrior.prox"):
        random_prior().prox(images(1, 1, 9, 8), SIGMA, rtol=1e-10, max_iter=1)


def test_prior_has_no_energy():
    prior = random_prior()
    assert not prior.explicit_prior
    for function in (prior, prior.fn):
        with pytest.raises(NotImplementedError, match="no energy.*frozen_fn"):
            function(images(1, 1, 9, 8), SIGMA)


def test_prior_leaves_its_input_alone():
    # deepinv's Potential.grad switches on requires_grad in place.
    prior, x = random_prior(), images(1, 1, 9, 8)
    before = x.clone()
    prior.grad(x, SIGMA), prior.prox(x, SIGMA), prior.mask(x, SIGMA)
    assert not x.requires_grad and torch.equal(x, before)


def test_masks_and_forces_are_the_same_with_and_without_gradients():
    prior = random_prior(num_filters=5)
    x = torch.rand(2, 1, 9, 11, generator=generator(), dtype=DOUBLE)
    mask, force = prior.mask(x, 0.1), prior.grad(x, 0.1)
    before = x.clone()
    with torch.no_grad():  # features are overwritten
        torch.testing.assert_close(prior.mask(x, 0.1), mask, rtol=0, atol=1e-14)
        bound = prior.bind(0.1, x)
        squared = mask.square()
        torch.testing.assert_close(bound.normal(x, squared), force, rtol=0, atol=1e-13)
    assert torch.equal(x, before) and torch.equal(squared, mask.square())


def test_default_lambda_is_never_negative():
    prior = random_prior()
    with torch.no_grad():
        prior.kappa.coefficients.fill_(-1)
    assert (prior.default_lambda(SIGMA, images(2, 1, 9, 8)) == 0).all()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param("GD", {"stepsize": 0.4}, id="GD"),
        pytest.param("PGD", {"stepsize": 0.7}, id="PGD"),
    ],
)
def test_deepinv_optimizers_reach_the_same_fixed_point(method, settings):
    prior = random_prior()
    physics = dinv.physics.Denoising()
    y = images(2, 1, 9, 8)
    optimizer = getattr(dinv.optim, method)(
        prior=prior,
        data_fidelity=dinv.optim.L2(),
        lambda_reg=2.0,
        g_param=SIGMA,
        max_iter=300,
        thres_conv=1e-8,
        early_stop=True,
        **settings,
    )
    if method == "PGD":  # its prox is asked for by default with rtol 1e-4
        prior.prox = lambda *args, gamma, **kw: type(prior).prox(
            prior, *args, gamma=gamma, rtol=1e-10
        )
    x = optimizer(y, physics)
    assert optimizer.has_converged
    expected = random_model(random_prior())(y, sigma=SIGMA, lambda_reg=2.0)
    assert relative_error(x, expected) < 1e-6


def test_masks_are_finite_at_noise_levels_far_beyond_the_training():
    prior = random_prior(dtype=torch.float32)
    # A slope of zero times an infinite response would be NaN.
    prior.mask_network.phi3.coefficients.data.fill_(0.7)
    mask = prior.mask(images(1, 1, 12, 12, dtype=torch.float32), 20.0)
    torch.testing.assert_close(mask, torch.full_like(mask, 0.7))
