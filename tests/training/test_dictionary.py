"""Training of dictionaries: constraints, gradients, every setting, the files."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from trainers import KINDS, slopes_of_the_loss, weights_after

from deepinv_deal import ConvergenceWarning
from deepinv_deal.priors import PatchSynthesisPrior, SmoothPlusSparsePrior
from deepinv_deal.weights import load, save

MODELS = ("cpr", "ncpr", "patch")


def start(folder, out, model="cpr", **changes):
    return KINDS["cpr"].start(folder, out, model=model, **changes)


@pytest.mark.parametrize("model", MODELS)
def test_the_constraints_hold_after_every_step(folder, tmp_path, model):
    training = start(folder, tmp_path, model, lr=0.05)
    for _ in range(5):
        before = weights_after(training, 0)
        assert not torch.equal(weights_after(training, 1), before)
        dictionary = training.prior.dictionary
        # The parameters themselves, not only what frame() makes of them.
        atoms, Q = dictionary.atoms.flatten(1), dictionary.free_atoms.flatten(1)
        exact = {"rtol": 0, "atol": 1e-6}
        torch.testing.assert_close(Q @ Q.T, torch.eye(len(Q)), **exact)
        torch.testing.assert_close(
            Q @ atoms.T, torch.zeros(len(Q), len(atoms)), **exact
        )
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(len(atoms)), **exact)
        for rows in (atoms, Q):
            assert rows.mean(1).abs().amax() < 1e-6 if len(rows) else True
        assert torch.linalg.matrix_norm(dictionary.frame().C, 2).item() == (
            pytest.approx(1, abs=1e-6)
        )


@pytest.mark.parametrize("model", ["cpr", "patch"])
def test_the_gradient_is_that_of_the_loss(folder, tmp_path, model):
    accurate = {"rtol": 1e-12, "max_iter": 20000, "adjoint_rtol": 1e-10}
    training = start(folder, tmp_path, model, batch_size=1, **accurate)
    atoms = training.prior.dictionary.atoms
    slope, difference = slopes_of_the_loss(training, atoms, step=1e-5)
    assert slope == pytest.approx(difference, rel=1e-2)


ACCURATE = {"adjoint_rtol": 1e-4, "steps": 100}


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """A function that gives the weights of a model after some steps."""

    @cache
    def weights(model):
        out = tmp_path_factory.mktemp(model)
        return weights_after(start(folder, out, model, **ACCURATE), 3)

    return weights


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("cpr", {"sigma": 0.2}),
        ("cpr", {"beta": 1.0}),
        ("cpr", {"lambda_reg": 0.01}),
        ("cpr", {"max_iter": 2}),
        ("cpr", {"warm_max_iter": 1}),
        ("cpr", {"adjoint_rtol": 0.9}),
        ("cpr", {"rtol": 0.3}),
        ("ncpr", {"order": 1.5}),
        ("patch", {"lambda_reg": 0.02}),
        ("patch", {"rtol": 0.3}),
        ("patch", {"mean": "free"}),
    ],
)
def test_each_setting_changes_the_training(folder, tmp_path, plain, model, change):
    changed = weights_after(start(folder, tmp_path, model, **(ACCURATE | change)), 3)
    assert not torch.equal(plain(model), changed)


def test_sizes_are_those_of_the_recipe_and_published_ones_by_default(folder, tmp_path):
    prior = start(folder, tmp_path).prior
    assert (len(prior.dictionary.atoms), prior.dictionary.patch_size) == (6, 4)
    default = dict.fromkeys(("num_atoms", "atom_size", "num_free_atoms"))
    default["num_free_atoms"] = 120
    sizes = {**default, "patch_size": 20}
    for model, expected in (("ncpr", (200, 13, 120)), ("patch", (128, 10, 0))):
        dictionary = start(folder, tmp_path, model, **sizes).prior.dictionary
        assert expected == (
            len(dictionary.atoms),
            dictionary.patch_size,
            len(dictionary.free_atoms),
        )
    low = start(folder, tmp_path, "ncpr", sigma=5 / 255).prior
    assert low.order == 2.0
    assert low.lambda_reg.item() == pytest.approx(0.003)
    assert low.beta.item() == pytest.approx(1.0)


def test_weights_files_of_another_model_or_damaged_ones_are_refused(folder, tmp_path):
    path = tmp_path / "weights.safetensors"
    save(start(folder, tmp_path).prior, path)
    with pytest.raises(ValueError, match="not a weights file of PatchSynthesisPrior"):
        load(path, PatchSynthesisPrior)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(path, SmoothPlusSparsePrior)
    with pytest.raises(ValueError, match="pretrained='cpr' is unknown"):
        load("cpr", SmoothPlusSparsePrior)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "none.safetensors", SmoothPlusSparsePrior)


def test_initial_weights_of_another_model_are_named(folder, tmp_path):
    path = tmp_path / "weights.safetensors"
    save(start(folder, tmp_path).prior, path)
    assert start(folder, tmp_path, init=str(path)).step == 0
    with pytest.raises(ValueError, match="not a weights file of PatchSynthesisPrior"):
        start(folder, tmp_path, "patch", init=str(path))
    with pytest.raises(ValueError, match="has num_atoms=6, the recipe says 7"):
        start(folder, tmp_path, num_atoms=7, init=str(path))


@pytest.mark.parametrize("change", [{"model": "ncpr"}, {"sigma": 5 / 255}])
def test_other_penalties_and_noise_levels_start_from_the_atoms_only(
    folder, tmp_path, change
):
    path = tmp_path / "weights.safetensors"
    first = start(folder, tmp_path / "first")
    weights_after(first, 2)
    save(first.prior, path)
    same = start(folder, tmp_path / "same", init=str(path)).prior
    assert torch.equal(same.log_scale, first.prior.log_scale)
    fresh = start(folder, tmp_path / "fresh", **change).prior
    other = start(folder, tmp_path / "other", init=str(path), **change).prior
    assert torch.equal(other.dictionary.atoms, first.prior.dictionary.atoms)
    for name in ("sigma", "lambda_reg", "log_beta", "log_scale"):
        assert torch.equal(getattr(other, name), getattr(fresh, name)), name
    assert other.penalty_name == fresh.penalty_name


def test_a_level_in_decimals_is_the_level_of_the_weights(folder, tmp_path):
    path = tmp_path / "weights.safetensors"
    first = start(folder, tmp_path / "first")  # 25 gray levels
    weights_after(first, 2)
    save(first.prior, path)
    again = start(folder, tmp_path / "again", init=str(path), sigma=0.098).prior
    assert torch.equal(again.log_scale, first.prior.log_scale)


def test_weakly_convex_models_are_trained_with_accurate_solutions(folder, tmp_path):
    recipe = start(folder, tmp_path, "ncpr").recipe
    assert recipe.accuracy(new=True) == (2e-4, 150)
    assert recipe.accuracy(new=False) == (2e-4, 40)
    assert start(folder, tmp_path).recipe.accuracy(new=False) == (3e-3, 10)
    given = {"rtol": 0.1, "max_iter": 7, "warm_max_iter": 5}
    recipe = start(folder, tmp_path, "ncpr", **given).recipe
    assert recipe.accuracy(new=True) == (0.1, 7)
    assert recipe.accuracy(new=False) == (0.1, 5)


def test_gradients_of_the_weakly_convex_model_exist_in_training(folder, tmp_path):
    training = start(folder, tmp_path, "ncpr", adjoint_rtol=1e-6, max_iter=5)
    problems = training.sampler.batch(0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        loss, _ = training.loss(problems, None)
        loss.backward()
    assert training.prior.dictionary.atoms.grad.norm() > 0


def test_bad_settings_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="model must be 'cpr', 'ncpr' or 'patch'"):
        start(folder, tmp_path, "deal")
    with pytest.raises(ValueError, match="sigma must be positive, got -1"):
        start(folder, tmp_path, sigma=-1)
    with pytest.raises(ValueError, match="sigma must be below 1.*got 25.*0.098"):
        start(folder, tmp_path, sigma=25)
