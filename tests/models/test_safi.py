"""SAFI and MMR as deepinv reconstructors and denoisers."""

from __future__ import annotations

import warnings

import deepinv as dinv
import pytest
import torch
from problems import DOUBLE, generator, images, random_l1_prior
from problems import random_l1_model as random_model

from deepinv_deal import MMR, SAFI, AdjointOptions, SolverOptions
from deepinv_deal.priors import MMRPrior, SAFIPrior
from deepinv_deal.weights import from_authors, load, to_authors

MODELS = [pytest.param(SAFI, id="safi"), pytest.param(MMR, id="mmr")]


def noisy(n=2, height=9, width=8, channels=1):
    g = generator(3)
    noise = torch.randn(n, channels, height, width, generator=g, dtype=DOUBLE)
    return images(n, channels, height, width, seed=3) + 0.1 * noise


def forcing(factor):
    return SolverOptions(forcing=factor, inner_max_iter=5000)


def inpainting():
    mask = (torch.rand(1, 9, 8, generator=generator(7)) > 0.3).double()
    return dinv.physics.Inpainting((1, 9, 8), mask=mask)


@pytest.mark.parametrize("kind", MODELS)
def test_the_result_solves_the_frozen_problem_at_itself(kind):
    model, y = random_model(kind), 2 * noisy() - 0.5  # the box matters
    x, info = model(y, return_info=True)
    assert info.converged.all() and x.shape == y.shape
    assert x.min() == 0 and x.max() == 1
    prior = model.prior
    # No better image of the frozen problem nearby: a convex function, checked along
    # random directions that stay in the box.
    weight = info.lambda_reg

    def value(u):
        data = 0.5 * (u - y).square().flatten(1).sum(1)
        return data + weight * prior.frozen_fn(u, x)

    g = generator(5)
    for _ in range(5):
        other = torch.rand(x.shape, generator=g, dtype=DOUBLE)
        for step in (1e-3, 1e-1):
            assert (value(x + step * (other - x)) >= value(x) - 1e-9).all()


@pytest.mark.parametrize("kind", MODELS)
def test_no_physics_and_the_denoising_physics_agree(kind):
    model, y = random_model(kind), noisy()
    expected = model(y)
    silent = dinv.physics.Denoising(dinv.physics.ZeroNoise())
    assert torch.equal(model(y, silent), expected)
    trained = float(model.prior.sigma)
    _, info = model(y, sigma=trained, return_info=True)
    assert torch.equal(model(y, trained), expected) and not info.notes


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("bounds", [None, "auto"])
def test_another_noise_level_rescales_the_weights(kind, bounds):
    y = noisy()
    model = random_model(kind, rtol=1e-6, bounds=bounds, scale=None)
    other = random_model(kind, rtol=1e-6, bounds=None, scale=None)
    results = [model(y, sigma) for sigma in (0.01, 0.1, 0.9)]
    assert all(
        (a - b).abs().max() > 1e-2
        for a, b in zip(results[:-1], results[1:], strict=True)
    )
    _, info = model(y, 0.9, return_info=True)
    assert "rescaled to sigma=0.9" in info.notes[0]
    a = 0.9 / float(model.prior.sigma)
    if bounds is None:
        torch.testing.assert_close(results[2], a * other(y / a), rtol=0, atol=1e-5)
    else:
        assert results[0].min() >= 0 and results[0].max() <= 1
    # The same weight means the same regularizer: the one of a call is divided, too, and
    # reported as it was given.
    _, info = model(y, 0.9, lambda_reg=0.3, return_info=True)
    assert info.lambda_reg.tolist() == pytest.approx([0.3] * 2)
    equation = model.equation(y, sigma=0.9, lambda_reg=0.3)
    assert equation.lambda_reg.tolist() == pytest.approx([0.3 / a] * 2)


@pytest.mark.parametrize(
    "kind", [MODELS[0], pytest.param(MMR, id="mmr", marks=pytest.mark.slow)]
)
def test_missing_pixels_are_filled_in(kind):
    rough = {"rtol": 1e-2, "solver": SolverOptions(inner_max_iter=5000)}
    model, physics = random_model(kind, **rough), inpainting()
    x = images(1, 1, 9, 8)
    y = physics.A(x)
    x_hat, info = model(y, physics, lambda_reg=1e-2, return_info=True)
    assert info.converged.all() and info.mask.shape == (1, 3, 9, 8)
    assert (x_hat - x).square().mean() < 0.3 * (y - x).square().mean()
    with pytest.raises(ValueError, match="lambda_reg is missing"):
        model(y, physics)


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_gives_what_its_samples_give_alone(kind):
    model, y = random_model(kind, rtol=1e-4), noisy(3)
    weights = torch.tensor([0.01, 0.03, 0.1], dtype=DOUBLE)
    together = model(y, lambda_reg=weights)
    for i in range(3):
        alone = model(y[i : i + 1], lambda_reg=weights[i])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-7)
    assert not torch.allclose(together[0], model(y[:1], lambda_reg=0.1)[0], atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"lambda_reg": 0.002},
        {"rtol": 1e-2},
        {"max_iter": 1, "warn": False},
        {
            "solver": SolverOptions(inner_max_iter=5, forcing=0.05),
            "max_iter": 2,
            "warn": False,
        },
        {"solver": "fista"},
        {"solver": SolverOptions(forcing=1e-4, inner_max_iter=5000)},
        {"bounds": None},
        {"bounds": (0.2, 0.7)},
        {"sigma": 0.2},
        {"init": "zero"},
        {"scale": 0.5},
    ],
    ids=str,
)
def test_every_setting_changes_the_result(settings):
    y, rough = noisy() - 0.4, {"rtol": 2e-4}
    changed = random_model(SAFI, **(rough | settings))(y)
    assert not torch.equal(changed, random_model(SAFI, **rough)(y))


def test_inner_solvers_and_starts_change_the_way_not_the_end():
    y = noisy()
    expected = random_model(SAFI)(y)
    for options in (
        SolverOptions("fista", 5000, 0.05),
        SolverOptions(forcing=0.3, inner_max_iter=5000),
    ):
        model = random_model(SAFI, solver=options)
        torch.testing.assert_close(model(y), expected, rtol=0, atol=1e-6)
    started = random_model(SAFI)(y, init=torch.full_like(y, 0.5))
    assert not torch.equal(started, expected)
    torch.testing.assert_close(started, expected, rtol=0, atol=1e-6)


def test_complex_modes():
    y = noisy(channels=2)
    both = random_model(SAFI)(y)
    # Real and imaginary part have no bounds unless these are given.
    alone = random_model(SAFI, bounds=None)(y[:, :1])
    torch.testing.assert_close(both[:, :1], alone, rtol=0, atol=1e-6)
    bounded = random_model(SAFI, bounds=(0, 1))(y)
    assert both.max() > 1 >= bounded.max()
    real = random_model(SAFI, complex_mode="real")(y)
    assert (real[:, 1] == 0).all() and not torch.equal(real, both)
    with pytest.raises(ValueError, match="complex_mode"):
        random_model(SAFI, complex_mode="phase")


def test_metrics_follow_the_image():
    model, y, x = random_model(MMR), noisy(), images(2, 1, 9, 8, seed=3)
    x_hat, metrics = model(y, x_gt=x, compute_metrics=True)
    psnr = dinv.metric.PSNR()(x_hat, x)
    assert abs(metrics["psnr"][0][-1] - float(psnr[0])) < 1e-3
    assert metrics["nonlinear_residual"][0][-1] < 1e-8


# -- the energy of MMR ---------------------------------------------------------


def test_the_energy_falls_and_is_recorded():
    y = noisy()
    model = random_model(MMR, verify_energy=True, rtol=1e-3, solver=forcing(1e-3))
    x, info = model(y, return_info=True)
    assert info.energy.shape == (int(info.n_iter.max()) + 1, 2)
    torch.testing.assert_close(info.energy[-1], model.energy(x, y))
    assert (info.energy[1:].diff(dim=0) <= 1e-6 * info.energy[0]).all()
    _, info = random_model(MMR, rtol=1e-2)(y, return_info=True)
    assert info.energy is None


@pytest.mark.parametrize("factor", [0.9, 1e-3])
def test_the_energy_rises_at_most_by_the_duality_gap(factor):
    y, settings = noisy(), {"verify_energy": True, "warn": False}
    model = random_model(MMR, rtol=1e-4, max_iter=3, solver=forcing(factor), **settings)
    info = model(y, return_info=True)[1]
    assert info.gap.shape == (len(info.energy) - 1, len(y)) and (info.gap >= 0).all()
    assert (info.energy.diff(dim=0) <= info.gap + 1e-12).all()
    # Rough solutions are told from accurate ones.
    largest = float((info.gap / info.energy[0]).max())
    assert (largest > 1e-3) if factor > 0.5 else (largest < 1e-4)


def test_there_is_no_gap_with_a_physics():
    y, settings = noisy(), {"verify_energy": True, "warn": False}
    physics = dinv.physics.Blur(torch.ones(1, 1, 3, 3, dtype=y.dtype) / 9)
    model = random_model(MMR, max_iter=1, solver=forcing(0.9), **settings)
    info = model(physics.A(y), physics, lambda_reg=0.02, return_info=True)[1]
    assert info.gap is None and len(info.energy) == 2


def test_an_image_without_energy_is_no_trouble():
    model = random_model(MMR, verify_energy=True)
    y = torch.zeros(2, 1, 9, 8, dtype=DOUBLE)
    _, info = model(y, return_info=True)
    assert info.converged.all() and (info.energy == 0).all()
    y[1] = noisy(1)
    assert model(y, return_info=True)[1].energy[-1, 1] > 0


def test_the_energy_holds_the_data_term_of_the_physics():
    model, physics, x = random_model(MMR), inpainting(), images(2, 1, 9, 8)
    x, y = x.clamp(0, 1), physics.A(noisy())
    data = 0.5 * (physics.A(x) - y).square().flatten(1).sum(1)
    expected = data + 0.02 * model.prior(x)
    torch.testing.assert_close(model.energy(x, y, physics, 0.02), expected)


def test_a_rising_energy_is_told():
    y = noisy()
    solution = random_model(MMR)(y)
    # One rough step from the solution with a cold dual goes up.
    rough = {"rtol": 1e-6, "max_iter": 1, "verify_energy": True}
    rough["solver"] = SolverOptions(inner_max_iter=1, forcing=0.05)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        random_model(MMR, **rough)(y, init=solution)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and "did not converge" in messages[0]
    assert "energy of sample" in messages[1]
    random_model(MMR, **rough, warn=False)(y, init=solution)


def test_the_energy_is_infinite_outside_the_box_and_scales():
    model, y = random_model(MMR), noisy()
    x = model(y)
    assert model.energy(x + 1, y).isinf().all()
    assert random_model(MMR, bounds=None).energy(x + 1, y).isfinite().all()
    scaled = random_model(MMR, scale=10.0)
    torch.testing.assert_close(scaled.energy(10 * x, 10 * y), model.energy(x, y))
    torch.testing.assert_close(scaled(10 * y), 10 * x, rtol=0, atol=1e-6)


# -- gradients and weights -----------------------------------------------------


def test_training_mode_gives_gradients_to_all_weights():
    model, y = random_model(SAFI, adjoint=AdjointOptions(rtol=1e-6)), noisy(1)
    (model(y) - images(1, 1, 9, 8)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    with torch.no_grad():
        assert not model(y).requires_grad


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_the_authors_are_converted(kind, tmp_path):
    prior, y = random_l1_prior(kind.prior_type), noisy().float()
    path = tmp_path / "weights.pth"
    theirs = to_authors(prior)
    assert theirs["lmbda"].shape == (1, 1)
    # Their files hold transposed copies too, which are ignored.
    content = {"state_dict": theirs | {"W1.W1T.weight": theirs["W1.W1.weight"]}}
    torch.save(content, path)
    model = kind(pretrained=path)
    assert float(model.prior.sigma) == pytest.approx(25 / 255)  # nobody said it
    own = load(path, kind.prior_type, sigma=0.02)
    assert float(own.sigma) == pytest.approx(0.02)
    torch.save({**content, "config": {"sigma": 15}}, path)
    own = load(path, kind.prior_type)
    assert float(own.sigma) == pytest.approx(15 / 255)
    for name, value in prior.float().state_dict().items():
        assert torch.equal(model.prior.state_dict()[name], value), name
    torch.testing.assert_close(model(y), kind(prior=prior.float())(y))


def test_foreign_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        SAFI(pretrained=tmp_path / "missing.pth")
    state = to_authors(random_l1_prior(MMRPrior))
    with pytest.raises(ValueError, match="SAFIPrior's authors.*lacks"):
        from_authors(state, SAFIPrior)
    path = tmp_path / "nan.pth"
    torch.save({**state, "cs": state["cs"] * torch.nan}, path)
    with pytest.raises(ValueError, match="NaN"):
        MMR(pretrained=path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        MMR(pretrained=path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"scale": -1.0}, "scale"),
        ({"solver": "newton"}, "solver='newton'"),
        ({"num_filters": 5}, "num_filters=5"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        random_model(SAFI, **settings)(noisy())
