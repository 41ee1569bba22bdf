"""DEAL with likelihoods other than least squares."""

import re

import deepinv as dinv
import pytest
import torch
from deepinv.optim import L2, LogPoissonLikelihood, PoissonLikelihood
from helpers import gradients_equal_finite_differences
from likelihoods import CASES, SHAPE, blur, poisson, transmission, truth, weights
from problems import (
    DOUBLE,
    MODELS,
    TIGHT,
    generator,
    random_model,
    random_prior,
    relative_error,
)

from deepinv_deal import interpret
from deepinv_deal.optim import CorrelatedL2, SmoothedL1, WeightedL2

EXACT = {"rtol": 1e-9, "max_iter": 400, "adjoint": TIGHT}


def model_for(fidelity, **settings):
    prior = random_prior(gain=2.0)
    return random_model(prior, data_fidelity=fidelity, **(EXACT | settings))


@pytest.mark.parametrize("denoising", [False, True], ids=["blur", "denoising"])
@pytest.mark.parametrize("name", CASES)
def test_solution_solves_the_equation_of_deepinvs_data_fidelity(name, denoising):
    make, measure, weight = CASES[name]
    physics = dinv.physics.Denoising() if denoising else blur()
    y, fidelity = measure(physics.A(truth())), make(1)
    model = model_for(fidelity)
    x, info = model(y, physics, sigma=0.1, lambda_reg=weight, return_info=True)
    assert info.converged.all()
    z = x.detach().requires_grad_()
    if name == "L1":  # smoothed
        fidelity = SmoothedL1()
    force = torch.autograd.grad(fidelity(z, y, physics).sum(), z)[0]
    regularizer = weight * model.prior.grad(z, 0.1)
    assert relative_error(-force, regularizer.detach()) < 1e-6
    assert info.lambda_reg.tolist() == [weight]


@pytest.mark.parametrize("bounds", [(0.3, 0.6), (0.0, float("inf"))])
@pytest.mark.parametrize("name", ["Poisson", "LogPoisson", "L1"])
def test_bounds(name, bounds):
    make, measure, weight = CASES[name]
    physics = blur()
    y = measure(physics.A(truth()))
    model = model_for(make(1), bounds=bounds, rtol=1e-7)
    x, info = model(y, physics, sigma=0.1, lambda_reg=weight, return_info=True)
    assert info.converged.all()
    assert (x >= bounds[0]).all() and (x <= bounds[1]).all()
    free = model_for(make(1))(y, physics, sigma=0.1, lambda_reg=weight)
    assert ((free < bounds[0]) | (free > bounds[1])).any()
    # Forces push against active bounds, and balance elsewhere.
    equation = model.equation(y, physics, sigma=0.1, lambda_reg=weight)
    descent = equation.data.force(x) - equation.force(x, equation.mask(x).square())
    low, high = x <= bounds[0], x >= bounds[1]
    size = equation.data.b_norm.max()
    assert (descent[~low & ~high].abs() < 1e-5 * size).all()
    assert (descent[low] <= 1e-5 * size).all() and (descent[high] >= -1e-5 * size).all()


@pytest.mark.parametrize("name", CASES)
def test_batch_equals_singles(name):
    make, measure, weight = CASES[name]
    physics = blur()
    y = measure(physics.A(truth(3)))
    model = model_for(make(3), rtol=1e-8)
    together = model(y, physics, sigma=0.1, lambda_reg=weight)
    for i in range(3):
        part, fidelity = slice(i, i + 1), make(3)
        if name == "WeightedL2":
            fidelity = WeightedL2(weights(3)[part])
        alone = model_for(fidelity, rtol=1e-8)(
            y[part], physics, sigma=0.1, lambda_reg=weight
        )
        assert relative_error(together[part], alone) < 1e-6


@pytest.mark.parametrize("denoising", [False, True], ids=["blur", "denoising"])
@pytest.mark.parametrize(
    ("kind", "parameter"),
    [("Poisson", 0.05), ("LogPoisson", 0.8), ("SmoothedL1", None), ("WeightedL2", 1.0)],
)
def test_gradients(kind, parameter, denoising, rng):
    _, measure, weight = CASES[kind]
    physics = dinv.physics.Denoising() if denoising else blur()
    y = measure(physics.A(truth()))
    model = model_for("auto", rtol=1e-12)
    makers = {
        "Poisson": lambda p: PoissonLikelihood(p, 1.0),
        "LogPoisson": lambda p: LogPoissonLikelihood(300.0, p),
        "SmoothedL1": lambda _: SmoothedL1(0.15),
        "WeightedL2": lambda p: WeightedL2(p * weights()),
    }
    name, kernel = list(model.prior.mask_network.named_parameters())[0]
    tensors = [y, torch.tensor([weight]).double(), torch.tensor([0.1]).double()]
    tensors += [kernel.detach().clone()]
    if parameter is not None:
        tensors += [torch.tensor([parameter], dtype=DOUBLE)]
    target = truth()

    def run(y, weight, sigma, kernel, *parameter):
        model.data_fidelity = makers[kind](*parameter or [None])
        x = torch.func.functional_call(
            model,
            {f"prior.mask_network.{name}": kernel},
            (y, physics),
            {"sigma": sigma, "lambda_reg": weight},
        )
        return (x - target).square().sum()

    gradients_equal_finite_differences(run, tensors, rng, rtol=1e-6, h=1e-5)


def test_default_weight_and_level_are_relative_to_the_noise():
    """For constant counts, Poisson denoising is least squares with its variance."""
    y = torch.full((1, *SHAPE), 0.5, dtype=DOUBLE)
    physics = dinv.physics.Denoising(poisson(0.05))
    model = random_model(random_prior())
    _, info = model(y, physics, return_info=True)
    variance = 0.05 * 0.5
    assert float(info.sigma) == pytest.approx(variance**0.5, rel=1e-6)
    plain = random_model(random_prior(), data_fidelity=L2())
    _, expected = plain(y, sigma=info.sigma, return_info=True)
    assert float(info.lambda_reg) == pytest.approx(
        float(expected.lambda_reg) / variance, rel=1e-6
    )
    assert any("Poisson likelihood" in note for note in info.notes)


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (poisson(), "Poisson likelihood"),
        (dinv.physics.PoissonGaussianNoise(0.05, 0.02), "shifted Poisson"),
        (transmission(), "transmission"),
    ],
    ids=["Poisson", "PoissonGaussian", "LogPoisson"],
)
def test_auto_takes_the_likelihood_of_the_physics(noise, words):
    physics = blur(noise)
    y = physics(truth())
    model = random_model(random_prior(gain=2.0), rtol=1e-7, max_iter=300)
    x, info = model(y, physics, sigma=0.1, lambda_reg=2.0, return_info=True)
    assert any(words in note for note in info.notes)
    assert info.converged.all()
    # The weight means what it means for least squares, up to the typical variance.
    data = model.pose(y, physics, sigma=0.1).data
    assert torch.allclose(info.lambda_reg, 2.0 * data.typical)
    likelihood = {
        "Poisson": lambda: PoissonLikelihood(0.05),
        "LogPoisson": lambda: LogPoissonLikelihood(300.0, 0.8),
    }.get(type(noise).__name__.removesuffix("Noise"))
    if likelihood is not None:
        given = random_model(model.prior, rtol=1e-7, data_fidelity=likelihood())
        settings = {"sigma": 0.1, "lambda_reg": info.lambda_reg}
        assert relative_error(given(y, physics, **settings), x) < 1e-5
    known = model.examine(y, physics)
    again = model(y, known, sigma=0.1, lambda_reg=2.0)
    assert torch.equal(again, x)


def test_auto_is_least_squares_for_gaussian_noise():
    y = truth()
    physics = blur(dinv.physics.GaussianNoise(0.1))
    auto, plain = random_model(), random_model(data_fidelity=L2())
    assert torch.equal(auto(y, physics), plain(y, physics))
    assert torch.equal(auto(y, sigma=0.1), plain(y, sigma=0.1))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("name", CASES)
def test_scaling_law(name, factor):
    """
    Multiplying image, gain and scale by a factor multiplies the result: the weight
    stays. Terms without unit are those of images divided by the scale.
    """
    make, measure, weight = CASES[name]
    physics = blur()
    y = measure(physics.A(truth()))
    scaled = {
        "Poisson": lambda: PoissonLikelihood(0.05 * factor),
        "background": lambda: PoissonLikelihood(0.05 * factor, 2.0),
        "raw counts": lambda: PoissonLikelihood(0.05 * factor, denormalize=False),
        "LogPoisson": lambda: LogPoissonLikelihood(300.0, 0.8 / factor),
    }.get(name, lambda: make(1))()
    y_scaled = y if name == "raw counts" else factor * y
    x = model_for(make(1), scale=1.0)(y, physics, sigma=0.1, lambda_reg=weight)
    model = model_for(scaled, scale=factor)
    other = model(y_scaled, physics, sigma=0.1 * factor, lambda_reg=weight)
    assert relative_error(other / factor, x) < 1e-6


def test_counts_are_scaled_automatically():
    physics = blur(dinv.physics.PoissonNoise(1.0, rng=generator(3)))
    y = physics(1000 * truth())
    x, info = random_model()(y, physics, sigma=50, lambda_reg=0.3, return_info=True)
    assert info.scale.tolist() == [1000.0]
    assert info.converged.all() and relative_error(x, 1000 * truth()) < 0.2


def test_dark_images_have_a_solution():
    """Zero counts without background, also everywhere."""
    physics = blur(poisson(1.0))
    dark = torch.zeros(2, *SHAPE, dtype=DOUBLE)
    dark[1, :, 3, 3] = 40
    y = physics(dark)
    x, info = model_for("auto", scale=None, rtol=1e-6)(
        y, physics, sigma=0.1, lambda_reg=0.1, return_info=True
    )
    assert info.converged.all()
    assert x[0].abs().max() < 1e-6 and physics.A(x).min() > -0.1
    assert any("counts are zero" in note for note in info.notes)


def test_no_transmitted_counts_have_a_solution():
    physics = blur(transmission())
    y = physics(truth())
    y[..., 2, 2] = torch.inf
    x, info = model_for("auto")(y, physics, sigma=0.1, lambda_reg=1.0, return_info=True)
    assert info.converged.all() and x.isfinite().all()
    y[..., 2, 2] = -torch.inf
    with pytest.raises(ValueError, match="infinity"):
        model_for("auto")(y, physics, sigma=0.1, lambda_reg=1.0)


def test_linearization_and_posterior():
    model = random_model(data_fidelity=PoissonLikelihood(0.05))
    y = poisson()(truth())
    at = interpret.linearize(model, y, sigma=0.1, lambda_reg=20.0, rtol=1e-9)
    n = truth().numel()
    v = torch.eye(n, dtype=DOUBLE).view(n, *SHAPE)
    B, J, F = (
        product(v).flatten(1).T for product in (at.normal, at.jacobian, at.sensitivity)
    )
    equation, x = at.problem.equation, at.x
    Fx = torch.autograd.functional.jacobian(equation, x).reshape(n, n)
    torch.testing.assert_close(F, torch.linalg.inv(-Fx), rtol=1e-6, atol=1e-7)
    eye = torch.eye(n, dtype=DOUBLE)
    torch.testing.assert_close(J, eye + torch.linalg.solve(B, Fx), rtol=1e-6, atol=1e-7)
    variance = interpret.posterior_variance(at, spacing=8)
    exact = torch.linalg.inv(B).diagonal().view_as(variance)
    torch.testing.assert_close(variance, exact, rtol=1e-5, atol=0)
    samples = interpret.posterior_samples(at, num_samples=800, batch_size=800)
    spread = (samples - x).square().mean(0, keepdim=True)
    assert (spread / exact).mean().item() == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="noise=0.1.*knows its noise"):
        interpret.posterior_variance(at, 0.1)
    with pytest.raises(ValueError, match="data_fidelity is not least squares"):
        interpret.divergence(at)


def test_solution_path():
    model = random_model(data_fidelity=PoissonLikelihood(0.05))
    y = poisson()(truth())
    path = interpret.solution_path(model, y, sigma=0.1, lambda_reg=20.0, num_iter=60)
    solution = model_for(model.data_fidelity)(y, sigma=0.1, lambda_reg=20.0)
    assert relative_error(path.x[-1], solution) < 1e-3


def test_typical_variance_is_that_of_what_was_measured():
    """Pixels that inpainting leaves out hold no counts, and say nothing."""
    mask = torch.ones(1, *SHAPE, dtype=DOUBLE)
    mask[..., ::2] = 0
    counts = poisson()(torch.full((1, *SHAPE), 0.6, dtype=DOUBLE))
    model = random_model(data_fidelity=PoissonLikelihood(0.05))
    physics = dinv.physics.Inpainting(SHAPE, mask=mask)
    masked = model.pose(mask * counts, physics, lambda_reg=1.0).data.typical
    seen = counts[..., 1::2]
    assert float(masked) == pytest.approx(1 / (0.05 * float(seen.mean())), rel=1e-6)


def test_data_fidelity_is_checked_at_once():
    with pytest.raises(TypeError, match="data_fidelity.*AmplitudeLoss"):
        random_model(data_fidelity=dinv.optim.AmplitudeLoss())
    model = random_model(data_fidelity=PoissonLikelihood(0.1))
    with pytest.raises(ValueError, match="negative"):
        model(-truth(), sigma=0.1)


NOISE = dinv.physics.noise
#: Noise of deepinv: whether denoising knows its level, and a word of the note.
NOISES = {
    "zero": (NOISE.ZeroNoise(), None, None),
    "Gaussian": (NOISE.GaussianNoise(0.1), 0.1, None),
    "Gaussian map": (NOISE.GaussianNoise(torch.full((1, 1, 8, 7), 0.1)), 0.1, "levels"),
    "uniform Gaussian": (NOISE.UniformGaussianNoise(0.1, 0.2), None, None),
    "Poisson": (NOISE.PoissonNoise(0.05), 0.16, "Poisson likelihood"),
    "Poisson of no counts": (NOISE.PoissonNoise(0.03), None, "no counts|not hold"),
    "Poisson-Gaussian": (NOISE.PoissonGaussianNoise(0.05, 0.1), 0.19, "shifted"),
    "LogPoisson": (NOISE.LogPoissonNoise(300.0, 0.8), 0.09, "transmission"),
    "gamma": (NOISE.GammaNoise(3.0), None, "logarithm"),
    "uniform": (NOISE.UniformNoise(0.1), None, "level that is given"),
    "salt and pepper": (NOISE.SaltPepperNoise(), None, "L1"),
    "Fisher-Tippett": (NOISE.FisherTippettNoise(3.0), None, "noise level"),
    "Rician": (NOISE.RicianNoise(0.1), None, "nearly Gaussian"),
    "Laplace": (NOISE.LaplaceNoise(0.1), None, "L1"),
}


@pytest.mark.parametrize("kind", ["DEAL", "SAFI", "CPR", "two-step"])
@pytest.mark.parametrize("name", NOISES)
def test_every_noise_model_is_used_or_refused(name, kind):
    noise, level, words = NOISES[name]
    physics = dinv.physics.Denoising(noise)
    y = 0.05 * (truth() / 0.05).round()
    model = MODELS[kind](bounds=None, warn=False)
    if level is not None:
        _, info = model(y, physics, return_info=True)
        found = info.sigma
        if kind == "SAFI":  # rescales itself
            found = re.search(r"rescaled to sigma=(\d\.\d+)", " ".join(info.notes))[1]
        assert float(found) == pytest.approx(level, rel=0.2)
    elif name != "zero" or kind == "DEAL":
        with pytest.raises(ValueError, match="sigma is missing"):
            model(y, physics)
    _, info = model(y, physics, sigma=0.1, return_info=True)
    if words is not None:
        assert re.search(words, " ".join(info.notes))


@pytest.mark.parametrize("kind", ["DEAL", "SAFI", "CPR"])
@pytest.mark.parametrize("noise", [poisson(), transmission()], ids=["counts", "rays"])
def test_counts_tell_the_defaults_also_with_a_physics(noise, kind):
    """A physics that only makes everything darker is denoising of stronger noise."""
    kernel = torch.zeros(1, 1, 3, 3, dtype=DOUBLE)
    kernel[..., 1, 1] = 0.9
    dark = dinv.physics.Blur(kernel, padding="circular", noise_model=noise)
    y = dark(truth())
    model = MODELS[kind](rtol=1e-2, bounds=None, scale=None)
    x, info = model(y, dark, return_info=True)
    level = model.pose(y, dark).data.typical.rsqrt() / 0.9
    known = model.pose(y, dark).data.noise_level
    if kind == "SAFI":  # in the unit to which it has rescaled itself
        level, known = level / model.prior.sigma, known / model.prior.sigma
    if kind != "CPR":  # whose data term is divided by the curvature
        torch.testing.assert_close(known, level)
    assert relative_error(x, truth()) < 0.5
    model.sigma = None
    blurred = blur(noise)
    _, info = model(blurred(truth()), blurred, return_info=True)
    assert info.succeeded.all()


def equation_error(model, fidelity, y, physics, weight, sigma=0.1):
    """Imbalance of the forces of deepinv's data fidelity and of the regularizer."""
    x, info = model(y, physics, sigma=sigma, lambda_reg=weight, return_info=True)
    assert info.converged.all()
    z = x.detach().requires_grad_()
    force = torch.autograd.grad(fidelity(z, y, physics).sum(), z)[0]
    return relative_error(-force, weight * model.prior.grad(z, sigma))


@pytest.mark.parametrize(
    "parts",
    [(L2(0.3), PoissonLikelihood(0.05)), (L2(0.3), L2(2.0)), (SmoothedL1(), L2())],
    ids=["counts", "levels", "outliers"],
)
def test_stacked_measurements(parts):
    physics = dinv.physics.StackedLinearPhysics([dinv.physics.Denoising(), blur()])
    y = physics.A(truth())
    y[0], y[1] = y[0] + 0.02, poisson()(y[1])
    fidelity = dinv.optim.StackedPhysicsDataFidelity(list(parts))
    assert equation_error(model_for(fidelity), fidelity, y, physics, 10.0) < 1e-6
    # The weights of L2 are those of images in [0, 1].
    model = model_for(fidelity, scale=1.0)
    x = model(y, physics, sigma=0.1, lambda_reg=10.0)
    if not isinstance(parts[1], PoissonLikelihood):
        y = dinv.utils.TensorList([100 * y[0], 100 * y[1]])
        scaled = model_for(fidelity, scale=100.0)
        again = scaled(y, physics, sigma=10.0, lambda_reg=10.0)
        assert relative_error(again, 100 * x) < 1e-6
    alone = dinv.optim.StackedPhysicsDataFidelity([L2(0.3)])
    with pytest.raises(ValueError, match="1 parts, the measurements 2"):
        random_model(data_fidelity=alone)(y, physics)


def covariance(n, complex_valued):
    v = torch.randn(n, n, generator=generator(8), dtype=DOUBLE)
    if complex_valued:
        v = v + 1j * torch.randn(n, n, generator=generator(9), dtype=DOUBLE)
    return v @ v.mH + torch.eye(n)


@pytest.mark.parametrize("complex_valued", [False, True])
def test_noise_that_is_correlated_between_coils(complex_valued):
    """The coils may as well be mixed until their noise is white."""
    maps = torch.randn(1, 3, 8, 7, generator=generator(2), dtype=torch.complex128)
    mask = (torch.rand(8, 7, generator=generator(3)) < 0.6).double()
    physics = dinv.physics.MultiCoilMRI(mask=mask, coil_maps=maps, img_size=(8, 7))
    x = torch.cat([truth(), 0.3 * truth().flip(-1)], 1)
    y = physics.A(x) + 0.05
    cov = covariance(3, complex_valued)
    fidelity = CorrelatedL2(cov, dim=2)
    model = model_for(fidelity, rtol=1e-8)
    assert equation_error(model, fidelity, y, physics, 0.3) < 1e-6
    root = torch.linalg.inv(torch.linalg.cholesky(cov)).to(maps)
    whitened = dinv.physics.MultiCoilMRI(
        mask=mask,
        coil_maps=torch.einsum("nm,bmhw->bnhw", root, maps),
        img_size=(8, 7),
    )
    v = torch.view_as_complex(y.movedim(1, -1).contiguous())
    v = torch.view_as_real(torch.einsum("nm,bmhw->bnhw", root, v)).movedim(-1, 1)
    settings = {"sigma": 0.1, "lambda_reg": 0.3}
    expected = model_for("auto", rtol=1e-8)(v, whitened, **settings)
    found = model(y, physics, **settings)
    assert relative_error(found, expected) < 1e-6
    # Random forces have the covariance of the curvature, and its norm is bounded.
    data = model_for(fidelity).pose(y, physics, **settings).data
    rng = generator(11)

    def white(like):
        return torch.randn(like.shape, generator=rng, dtype=DOUBLE)

    forces = torch.cat([data.score(found, white) for _ in range(300)])
    n = x.numel()
    curvature = data.frozen(found)
    H = torch.cat(
        [curvature(e.view_as(x)).flatten()[None] for e in torch.eye(n).double()]
    )
    ratio = forces.square().mean(0).flatten() / H.diagonal()
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
    assert torch.linalg.eigvalsh(H)[-1] <= data.at(found).norm_bound


@pytest.mark.parametrize(
    "bad", [torch.ones(2, 3), -torch.eye(2), torch.tensor([[1.0, 2], [0, 1]]), 1.0]
)
def test_bad_covariances(bad):
    with pytest.raises(ValueError, match="covariance of CorrelatedL2 must be"):
        CorrelatedL2(bad)
    model = random_model(data_fidelity=CorrelatedL2(torch.eye(3).double()))
    with pytest.raises(ValueError, match="for 3 channels in dimension 1"):
        model(truth(), sigma=0.1)
