"""Tuning where the noise is not Gaussian of one level."""

import deepinv as dinv
import pytest
import torch
from deepinv.loss.metric import PSNR
from deepinv.optim import L1, LogPoissonLikelihood, PoissonLikelihood
from deepinv.physics import (
    Blur,
    Denoising,
    LaplaceNoise,
    LogPoissonNoise,
    PoissonGaussianNoise,
    PoissonNoise,
    UniformGaussianNoise,
)
from problems import DOUBLE, generator, images, random_model
from test_tuning import photograph

from deepinv_deal import DEAL, tune
from deepinv_deal.tuning.scores import SureScorer
from deepinv_deal.tuning.validate import Problem

SHAPE = (1, 9, 8)

# A budget that ends the search early is the test's own choice.
pytestmark = pytest.mark.filterwarnings("ignore:Tuning stopped at max_trials")


def kernel(width=0.7):
    return dinv.physics.functional.gaussian_blur((5, 5), (width, width))


def blur(noise, width=0.7):
    return Blur(kernel(width), padding="circular", noise_model=noise)


def poisson(gain=0.05, **settings):
    return PoissonNoise(gain, rng=generator(0), **settings)


# -- the estimate ----------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("operator", [True, False], ids=["blur", "denoising"])
@pytest.mark.parametrize(
    ("noise", "fidelity"),
    [
        (poisson(0.3), "auto"),
        (poisson(0.01), "auto"),
        (poisson(0.3, normalize=False), "auto"),
        (PoissonGaussianNoise(0.1, 0.2, rng=generator(0)), "auto"),
        (poisson(0.3), PoissonLikelihood(0.3, 2.0, denormalize=True)),
        (poisson(0.3, normalize=False), PoissonLikelihood(0.3, 2.0, denormalize=False)),
    ],
    ids=["few", "many", "raw", "with Gaussian", "background", "raw, background"],
)
def test_the_risk_of_counts_is_the_error(noise, fidelity, operator, batch):
    """For a smoother of the data, against the error that only the truth tells."""
    size = (batch, 1, 120, 110)
    x = 0.5 + 0.4 * torch.sin(torch.arange(110) / 5.0).expand(size)
    x = x * torch.tensor([1.0, 0.7])[:batch, None, None, None]
    physics = blur(noise) if operator else Denoising(noise)
    background = 0.6 if fidelity != "auto" else 0.0  # 2 counts
    noise.rng.manual_seed(0)
    y = noise(physics.A(x) + background)
    if fidelity != "auto":  # the noise is told by the model alone
        physics.set_noise_model(dinv.physics.ZeroNoise())

    class Smoother(torch.nn.Module):
        data_fidelity = fidelity

    smoothing = blur(None, 1.0)
    unit = 1.0 if getattr(noise, "normalize", True) else float(noise.gain)

    def again(y, _physics):
        return 0.8 * smoothing.A(y * unit - background)

    x_hat, problem = again(y, physics), Problem(None, y, physics)
    scorer = SureScorer(0, Smoother())
    scorer.check([problem])
    found = scorer(problem, x_hat, again)
    true = (physics.A(x_hat) - physics.A(x)).square().flatten(1).mean(1)
    # As many deviations as there are pixels, each about the variance of the noise.
    gain = float(noise.gain)
    variance = gain * 0.5 + gain * background + 0.04 * hasattr(noise, "sigma")
    deviation = variance * (2 / (120 * 110)) ** 0.5
    torch.testing.assert_close(found, true, atol=4 * deviation, rtol=0)


# -- tuning ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "given"),
    [
        pytest.param(True, False, id="blur-auto", marks=pytest.mark.slow),
        pytest.param(True, True, id="blur-given", marks=pytest.mark.slow),
        pytest.param(False, True, id="denoising-given"),
    ],
)
def test_counts_are_tuned_with_and_without_ground_truth(operator, given):
    x, gain = photograph(16), 1 / 20
    physics = blur(poisson(gain)) if operator else Denoising(poisson(gain))
    y = physics(x)
    fidelity = PoissonLikelihood(gain, denormalize=True) if given else "auto"
    model = DEAL(pretrained="deal_gray_64", data_fidelity=fidelity, warn=False)
    options = {"batch_candidates": True, "precision": 1.5, "max_trials": 7}
    result = tune(model, physics, [(x, y)], **options)
    # Not far from where it starts, whatever the unit of the weight.
    assert abs(torch.tensor(result.lambda_reg / result.trials[0].lambda_reg).log()) < 4
    grid = result.lambda_reg * torch.logspace(-1, 1, 7)
    with torch.no_grad():
        x_hat = model(y.repeat(7, 1, 1, 1), physics, lambda_reg=grid)
        scores = PSNR()(x_hat, x.expand_as(x_hat))
    assert result.best.score > float(scores.max()) - 0.05
    assert min(scores[0], scores[-1]) < scores.max() - 0.3  # there is a choice
    without = tune(model, physics, [{"y": y}], metric="sure", **options)
    with torch.no_grad():
        psnr = float(PSNR()(model(y, physics, **without.settings), x))
    assert psnr > result.best.score - 0.3


@pytest.mark.parametrize(
    ("noise", "fidelity"),
    [
        (poisson(), "auto"),
        (poisson(), PoissonLikelihood(0.05, denormalize=True)),
        (PoissonGaussianNoise(0.05, 0.05, rng=generator(0)), "auto"),
        (LogPoissonNoise(300.0, 0.8, rng=generator(0)), "auto"),
        (LogPoissonNoise(300.0, 0.8, rng=generator(0)), LogPoissonLikelihood(300, 0.8)),
        (None, L1()),
    ],
)
@pytest.mark.parametrize("denoising", [True, False])
def test_the_search_starts_at_the_weight_of_the_model(noise, fidelity, denoising):
    x = images(1, *SHAPE)
    physics = Denoising() if denoising else blur(None).to(DOUBLE)
    physics.set_noise_model(noise or dinv.physics.ZeroNoise())
    model = random_model(rtol=1e-2, data_fidelity=fidelity)
    y, sigma = physics(x), 0.1 if noise is None else None
    own, start = (
        model.pose(y, physics, sigma=sigma, lambda_reg=weight).equation.lambda_reg
        for weight in (
            None,
            tune(
                model, physics, [(x, y)], max_trials=1, sigma=sigma, progress=False
            ).lambda_reg,
        )
    )
    torch.testing.assert_close(own, start, rtol=1e-5, atol=0)


def test_the_level_of_counts_is_searched_in_their_unit():
    """Multiplying images and gain by a factor multiplies sigma, and nothing else."""
    x, found = images(1, *SHAPE), []
    for factor in (1.0, 1000.0):
        noise = poisson(0.05 * factor)
        model = random_model(rtol=1e-2, scale=factor)
        physics = Denoising(noise)
        result = tune(
            model, physics, [factor * x], tune_sigma=True, max_trials=9, progress=False
        )
        found.append([(t.lambda_reg, t.sigma / factor) for t in result.trials])
    assert len(found[0]) == 9
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-4, atol=0)


# -- never a wrong number --------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "fidelity", "words"),
    [
        (LogPoissonNoise(300.0, 0.8), "auto", "not LogPoissonNoise.*ground truth"),
        (LaplaceNoise(0.1), "auto", "not LaplaceNoise.*ground truth"),
        (UniformGaussianNoise(), L1(), "not UniformGaussianNoise"),
        (None, "auto", "level of the Gaussian noise, or the gain"),
        (None, L1(), "level of the Gaussian noise, or the gain"),
        (poisson(0.3), "auto", "y does not hold counts of the physics' PoissonNoise"),
    ],
)
def test_noise_without_an_estimate_is_named(noise, fidelity, words):
    y = images(1, *SHAPE)
    physics = Denoising()
    physics.set_noise_model(noise or dinv.physics.ZeroNoise())
    model = random_model(data_fidelity=fidelity)
    with pytest.raises(ValueError, match=words):
        tune(model, physics, [{"y": y}], metric="sure", sigma=0.1)


def test_an_intensity_that_the_probe_changes_is_an_error():
    """Otherwise the derivative would be that of the guess."""
    physics = Denoising(poisson(0.3))
    y = torch.full((1, *SHAPE), 43 * 0.3, dtype=DOUBLE)  # 10, but 44 * 0.3 is for 25
    model = random_model(rtol=1e-2)
    with pytest.raises(ValueError, match="intensity .* Give the model scale="):
        tune(model, physics, [{"y": y}], metric="sure", max_trials=1)
    model = random_model(rtol=1e-2, scale=10.0)
    tune(model, physics, [{"y": y}], metric="sure", max_trials=1)
