"""Training of SAFI and MMR: every setting, the gradient, bad input."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from skimage.data import astronaut
from trainers import KINDS, SOLVE, slopes_of_the_loss, stopping_at, weights_after

from deepinv_deal.problems import operator_term
from deepinv_deal.training import mask_drift


def start(folder, out, **changes):
    settings = {"steps": 100, "lr": 0.02, "adjoint_rtol": 1e-4, **changes}
    return KINDS["safi"].start(folder, out, **settings)


def rough(training):
    """Enough weight for coefficients of these hard images to be zero."""
    training.prior.lambda_reg.data.fill_(0.3 / float(training.prior.bind().nu))
    return training


#: Steps large enough for the masks to move away from 1/2, where they all start.
ACCURATE = {"rtol": 1e-3, "depth": 20, "warm_depth": 3}


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The weights after some steps with these settings."""
    training = start(folder, tmp_path_factory.mktemp("out"), **ACCURATE)
    return weights_after(rough(training), 3)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "mmr"},
        {"sigma": 0.2},
        {"depth": 1},
        {"warm_depth": 1},
        {"inner_max_iter": 5},
        {"jacobian_free": False},
        {"adjoint_rtol": 0.9},
        {"adjoint_smoothing": 0.3},
        {"rtol": 0.5},
        {"drift": 1.0},
    ],
    ids=str,
)
def test_each_setting_changes_the_training(folder, tmp_path, plain, change):
    training = rough(start(folder, tmp_path, **(ACCURATE | change)))
    changed = weights_after(training, 3)
    assert plain.shape != changed.shape or not torch.equal(plain, changed)


@pytest.mark.parametrize("model", ["safi", "mmr"])
def test_the_first_weights_denoise(folder, tmp_path, model):
    """At both noise levels, the filters being an orthonormal transform."""
    x = torch.from_numpy(astronaut()[:128:2, 128:256:2, 1] / 255.0).float()[None, None]
    for sigma in (0.03, 0.1):
        prior = start(folder, tmp_path, model=model, num_filters=50, sigma=sigma).prior
        first, second = prior.W._zero_mean_kernels()
        waves = first[:48].flatten(1)
        torch.testing.assert_close(waves @ waves.T, torch.eye(48))
        own = second.diagonal().permute(2, 0, 1)  # each channel sees only itself
        torch.testing.assert_close(own.square().sum(), second.square().sum())
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        y = x + sigma * noise
        with torch.no_grad():
            x_hat = KINDS[model].model(prior=prior)(y)
        gain = 10 * torch.log10((y - x).square().mean() / (x_hat - x).square().mean())
        assert gain > (1.0 if sigma < 0.05 else 3.0)


@pytest.mark.parametrize("model", ["safi", "mmr"])
def test_the_gradient_is_that_of_the_loss(folder, tmp_path, model):
    accurate = {
        "rtol": 1e-9,
        "depth": 200,
        "inner_max_iter": 5000,
        "adjoint_rtol": 1e-8,
        "adjoint_smoothing": 1e-6,
        "jacobian_free": False,
        "batch_size": 1,
        "model": model,
    }
    training = start(folder, tmp_path, **accurate)
    with torch.no_grad():
        training.prior.lambda_reg.fill_(0.02)
    weight = training.prior.W.weight[0]
    slope, difference = slopes_of_the_loss(training, weight, step=1e-6)
    assert slope == pytest.approx(difference, rel=1e-3)


def test_drift_counts_the_change_of_the_mask(folder, tmp_path):
    """Its gradient, beside that of the error, is that of the change by the formula."""
    settings = {"depth": 1, "rtol": 1e-6, "inner_max_iter": 20}

    def loss(drift):
        training = start(folder, tmp_path, drift=drift, **settings)
        problems = training.sampler.batch(0, 2)
        value, p = training.loss(problems, None)
        training.prior.zero_grad()
        value.backward()
        return training, problems, p, value.detach()

    training, problems, p, value = loss(0.0)
    other, _, _, with_drift = loss(2.0)
    equation = training.prior.equation(operator_term(problems.y))
    with torch.no_grad():
        first = equation.start(None)
    change = mask_drift(equation.mask(p), equation.mask(first))
    assert change.mean() > 0
    torch.testing.assert_close(with_drift - value, 2 * change.detach().mean())
    (2 * change.mean()).backward()  # added to the gradient of the error
    for mine, theirs in zip(
        training.prior.parameters(), other.prior.parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("model", ["safi", "mmr"])
def test_drift_is_that_of_the_last_step_even_if_it_was_none_to_keep(
    folder, tmp_path, monkeypatch, model
):
    """The solver returns its best iterate, which may be the one before."""

    losses = []
    for drift in (0.0, 2.0):
        training = start(folder, tmp_path, drift=drift, model=model)
        problems = training.sampler.batch(0, 2)
        equation = training.prior.equation(operator_term(problems.y))
        with torch.no_grad():
            p = equation.start(None)
        with monkeypatch.context() as patch:
            patch.setattr(SOLVE, stopping_at(1, 0.5, kept=1))
            losses.append(training.loss(problems, p)[0].detach())
    change = mask_drift(equation.mask(0.5 * p), equation.mask(p)).detach()
    assert change.mean() > 0
    torch.testing.assert_close(losses[1] - losses[0], 2 * change.mean())


@pytest.mark.parametrize("times", [1, 2])
def test_a_pair_that_is_not_finite_does_not_spoil_the_loss(
    folder, tmp_path, monkeypatch, times
):
    """The solver returns the pair before it."""
    training = start(folder, tmp_path, drift=2.0)
    problems = training.sampler.batch(0, 2)
    with torch.no_grad():
        p = training.prior.equation(operator_term(problems.y)).start(None)
    stub = stopping_at(1, *times * [torch.nan], kept=1)
    monkeypatch.setattr(SOLVE, stub)
    loss, _ = training.loss(problems, p)
    loss.backward()
    assert loss.isfinite()
    assert all(w.grad.isfinite().all() for w in training.prior.W.parameters())


@pytest.mark.parametrize("model", ["safi", "mmr"])
def test_every_weight_has_one_learning_rate(folder, tmp_path, model):
    training = start(folder, tmp_path, model=model)
    factors = {
        id(p): factor for factor, group in training.parameter_groups() for p in group
    }
    prior = training.prior
    expected = {
        "lambda_reg": 0.01,
        "W.weight.0": 1.0,
        "W.weight.1": 0.1,
        "potential.scale": 5.0,
        "potential.spline.coefficients": 5.0,
        "potential.G.0": 1.0,
        "mask_network.V.0": 1.0,
        "mask_network.V.2": 0.1,
        "mask_network.splines.1.coefficients": 5.0,
    }
    found = {name: factors.pop(id(p)) for name, p in prior.named_parameters()}
    assert not factors  # nothing else is trained
    for name, factor in found.items():
        assert factor == expected.get(name, factor)
    assert len(expected.keys() & found.keys()) == 6


def test_the_weight_stays_positive(folder, tmp_path):
    training = start(folder, tmp_path)
    with torch.no_grad():
        training.prior.lambda_reg.fill_(-1.0)
    training.after_step()
    assert training.prior.lambda_reg > 0


def test_bad_settings_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="model must be 'safi' or 'mmr', got 'deal'"):
        start(folder, tmp_path, model="deal")
    with pytest.raises(ValueError, match="depth must be positive, got 0"):
        start(folder, tmp_path, depth=0)
    with pytest.raises(ValueError, match="drift must not be negative, got -1"):
        start(folder, tmp_path, drift=-1)


@pytest.mark.parametrize("model", ["safi", "mmr"])
def test_weights_of_another_noise_level_are_rescaled(folder, tmp_path, model):
    first = start(folder, tmp_path / "a", model=model)
    first.save_prior(tmp_path / "a.safetensors", {})
    settings = {"init": str(tmp_path / "a.safetensors"), "sigma": 0.05, "model": model}
    second = start(folder, tmp_path / "b", init_sigma=0.1, **settings)
    third = start(folder, tmp_path / "c", **settings)
    same = start(folder, tmp_path / "e", **settings | {"sigma": first.recipe.sigma})
    weight = first.prior.lambda_reg.item()
    assert second.prior.lambda_reg.item() == pytest.approx(weight / 2)
    known = 0.05 / first.recipe.sigma  # the file says what it was trained for
    assert third.prior.lambda_reg.item() == pytest.approx(weight * known)
    assert same.prior.lambda_reg.item() == weight
    assert float(second.prior.sigma) == float(third.prior.sigma) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="init_sigma=0.1 .* init is not given"):
        start(folder, tmp_path / "d", init_sigma=0.1)
    with pytest.raises(ValueError, match="init_sigma must be below 1.* got 15"):
        start(folder, tmp_path / "d", init_sigma=15, **settings)
    with pytest.raises(ValueError, match="factor must be positive, got 0"):
        first.prior.rescale(0)


def test_a_weight_is_chosen_once_whenever_the_training_was_killed(
    folder, tmp_path, monkeypatch
):
    """Killed before it was chosen, a training never chose it, and said nothing."""
    kind, out = KINDS["safi"], tmp_path / "out"

    def killed(_self, _path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(kind.trainer, "_choose_lambda", killed)
        with pytest.raises(KeyboardInterrupt):
            kind.start(folder, out).train()
    assert (out / "last.safetensors").exists()
    calls = []
    choose = kind.trainer._choose_lambda

    def counted(self, path):
        calls.append(path)
        choose(self, path)

    monkeypatch.setattr(kind.trainer, "_choose_lambda", counted)
    resumed = [kind.start(folder, out, resume=True).train() for _ in range(2)]
    whole = kind.start(folder, tmp_path / "whole").train()
    assert len(calls) == 2 and resumed == [whole, whole]
    folders = out, tmp_path / "whole"
    found = [load_file(folder / "best.safetensors") for folder in folders]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_better_weights_get_a_weight_of_their_own(folder, tmp_path, monkeypatch):
    """Also where a training that was complete is given more time."""
    kind, calls = KINDS["safi"], []

    def choose(self, _path):
        calls.append(self.step)

    monkeypatch.setattr(kind.trainer, "_choose_lambda", choose)
    settings = {"steps": None, "time_budget": 0.5}
    kind.start(folder, tmp_path, **settings).train()
    longer = kind.start(folder, tmp_path, resume=True, **settings | {"time_budget": 3})
    longer.best = -1.0  # so that the next validation is better
    longer.train()
    assert len(calls) == 2 and calls[0] < calls[1]
