"""PatchSynthesis and SmoothPlusSparse as users call them."""

from __future__ import annotations

import copy
import pickle

import deepinv as dinv
import pytest
import torch
from deepinv.physics import GaussianNoise
from helpers import random
from problems import images, small_model

from deepinv_deal import (
    ConvergenceWarning,
    PatchSynthesis,
    PatchSynthesisPrior,
    SmoothPlusSparse,
    SmoothPlusSparsePrior,
    SolverOptions,
)
from deepinv_deal.solvers import Status
from deepinv_deal.weights import from_authors, load, save, to_authors

DOUBLE = torch.float64
FORMS = [
    pytest.param(SmoothPlusSparse, {"penalty": "group"}, id="cpr"),
    pytest.param(SmoothPlusSparse, {"penalty": "weakly_convex"}, id="ncpr"),
    pytest.param(PatchSynthesis, {"mean": "free"}, id="synthesis++"),
    pytest.param(PatchSynthesis, {"mean": "fixed"}, id="synthesis"),
]


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_denoises_in_every_way_denoisers_are_called(form, options, rng):
    model = small_model(form, rng, options, rtol=1e-3)
    y = images(2, 1, 7, 8)
    with torch.no_grad():
        x, info = model(y, sigma=25 / 255, return_info=True)
        torch.testing.assert_close(model(y), x)  # the level of the training
        torch.testing.assert_close(model(y, 25 / 255), x)
        physics = dinv.physics.Denoising(GaussianNoise(25 / 255))
        torch.testing.assert_close(model(y, physics), x)
        other = model(y, 0.2)
    status = Status.FINISHED if info.solver == "two-step" else Status.CONVERGED
    assert x.shape == y.shape and (info.status == status).all()
    assert (other - x).abs().max() > 1e-4
    assert info.sigma.tolist() == pytest.approx([25 / 255] * 2)
    assert info.lambda_reg.tolist() == pytest.approx([0.02] * 2)
    assert info.beta.tolist() == pytest.approx([2.0] * 2)
    assert info.coefficients.shape[1] == 8 and info.objective.shape == (2,)


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_parameters_change_the_result_and_may_differ_by_sample(form, options, rng):
    model = small_model(form, rng, options, rtol=1e-3)
    y = images(2, 1, 7, 8)
    with torch.no_grad():
        x = model(y)
        for name, values in (("beta", [0.5, 3.0]), ("lambda_reg", [0.01, 0.1])):
            batch = model(y, **{name: torch.tensor(values, dtype=DOUBLE)})
            assert ((batch - x).abs().amax((1, 2, 3)) > 1e-5).all()
            for i in range(2):
                single = model(y[i : i + 1], **{name: values[i]})
                torch.testing.assert_close(single[0], batch[i], rtol=0, atol=1e-10)


def test_the_noise_level_scales_the_thresholds(rng):
    model = small_model(SmoothPlusSparse, rng, {"penalty": "group"}, rtol=1e-8)
    y = images(1, 1, 6, 8)
    with torch.no_grad():
        x = model(y)
        scaled = model(3 * y, 3 * 25 / 255)
        _, info = model(y, 0.05, return_info=True)
    torch.testing.assert_close(scaled, 3 * x, rtol=0, atol=1e-5)
    assert float(info.lambda_reg) == pytest.approx(0.02 * 0.05 * 255 / 25)


FILTER = torch.tensor([[[[1.0, 2, 1], [2, 5, 2], [1, 2, 0]]]], dtype=DOUBLE) / 16
PHYSICS = [
    pytest.param(
        lambda: dinv.physics.Inpainting((1, 8, 8), mask=0.6),
        id="inpainting",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        lambda: dinv.physics.Blur(FILTER, padding="circular"), id="circular-blur"
    ),
    pytest.param(
        lambda: dinv.physics.Blur(FILTER, padding="valid"),
        id="valid-blur",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("make", PHYSICS)
def test_solvers_agree_for_any_physics(make, rng):
    torch.manual_seed(0)
    physics = make().to(DOUBLE)
    model = small_model(SmoothPlusSparse, rng, {"penalty": "group"}, beta=0.5)
    y = physics(images(2, 1, 8, 8))
    values = {}
    for solver in ("ipalm", "fista", "admm"):
        model.rtol, model.solver = 1e-5, SolverOptions(solver)
        with torch.no_grad():
            _, info = model(y, physics, return_info=True)
        assert info.converged.all() and info.solver == solver
        assert not info.notes
        values[solver] = info.objective
    torch.testing.assert_close(values["fista"], values["ipalm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(values["admm"], values["ipalm"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["real", "real_imag"])
def test_fourier_sampling_is_recognised_as_circular(mode, rng):
    mask = (torch.rand(1, 2, 8, 8, generator=rng, dtype=DOUBLE) > 0.5).to(DOUBLE)
    mask[:, 1] = mask[:, 0]
    mask[..., 3:5, 3:5] = 1
    physics = dinv.physics.MRI(mask=mask, img_size=(2, 8, 8)).to(DOUBLE)
    model = small_model(
        SmoothPlusSparse, rng, {"penalty": "group"}, beta=0.3, complex_mode=mode
    )
    y = physics.A(images(1, 2, 8, 8))
    model.rtol = 1e-6
    with torch.no_grad():
        x, info = model(y, physics, return_info=True)
        assert info.solver == "admm" and not info.notes
        model.solver = SolverOptions("ipalm")
        _, reference = model(y, physics, return_info=True)
    torch.testing.assert_close(info.objective, reference.objective, rtol=1e-6, atol=0)
    assert x.shape == (1, 2, 8, 8)
    assert x[:, 1].any() == (mode == "real_imag")


def test_bounds_hold(rng):
    for solver in ("auto", "ipalm"):
        model = small_model(
            SmoothPlusSparse,
            rng,
            {"penalty": "group"},
            bounds=(0.3, 0.6),
            solver=solver,
        )
        with torch.no_grad():
            x = model(images(1, 1, 6, 6))
        assert x.min() >= 0.3 and x.max() <= 0.6


def test_gradients_reach_the_weights_and_the_data(rng):
    for form, options in [p.values for p in FORMS]:
        model = small_model(form, rng, options)
        y = images(1, 1, 6, 6).requires_grad_()
        model(y).square().sum().backward()
        assert y.grad.abs().max() > 0
        assert model.prior.dictionary.atoms.grad.abs().max() > 0


def test_a_model_that_does_not_converge_says_so(rng):
    model = small_model(SmoothPlusSparse, rng, {"penalty": "group"}, max_iter=2)
    with torch.no_grad(), pytest.warns(ConvergenceWarning, match="SmoothPlusSparse"):
        model(images(1, 1, 6, 6))


def test_prior_runs_in_deepinvs_own_algorithms(rng):
    prior = small_model(SmoothPlusSparse, rng, {"penalty": "group"}).prior
    y = images(1, 1, 6, 6)
    x = random(rng, 1, 1, 6, 6)
    direction = random(rng, 1, 1, 6, 6)
    slope = (prior.grad(x) * direction).sum()
    h = 1e-4
    with torch.no_grad():
        rise = prior.fn(x + h * direction) - prior.fn(x - h * direction)
    torch.testing.assert_close(slope, rise[0] / (2 * h), rtol=1e-3, atol=1e-6)
    physics = dinv.physics.Denoising()
    algorithm = dinv.optim.PGD(
        data_fidelity=dinv.optim.L2(),
        prior=prior,
        stepsize=1.0,
        lambda_reg=1.0,
        max_iter=2,
    )
    with torch.no_grad():
        expected = prior.prox(y)
        torch.testing.assert_close(algorithm(y, physics), expected, rtol=0, atol=1e-4)


def test_models_can_be_pickled_and_copied(rng):
    model = small_model(PatchSynthesis, rng, {"mean": "free"})
    y = images(1, 1, 6, 6)
    with torch.no_grad():
        expected = model(y)
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            torch.testing.assert_close(other(y), expected)


# -- checkpoints of the authors ----------------------------------------------------


def authors_checkpoint(kind):
    generator = torch.Generator().manual_seed(1)
    atoms = torch.randn(6, 1, 4, 4, generator=generator)
    if kind == "dictionary":
        prox = {"prox_type": "l1norm", "threshold": 0.0075}
        state = {"atoms": atoms}
    else:
        weak = kind == "ncpr"
        prox = {
            "prox_type": "l0norm" if weak else "l1norm",
            "groupsize": 1 if weak else 2,
            "lambda_init": 0.01,
            "order": 1.8,
        }
        state = {
            "atoms": atoms,
            "free_atoms": torch.randn(3, 1, 4, 4, generator=generator),
            "beta": torch.tensor(1.5),
            "prox.scaling_lmbda": torch.linspace(-1, 1, 6).view(1, 6, 1, 1),
        }
    config = {"sigma": 25, "prox_params": prox, "dict_params": {"beta": 2.0}}
    return {"state_dict": state, "config": config}


@pytest.mark.parametrize("kind", ["cpr", "ncpr"])
def test_checkpoints_of_smooth_plus_sparse_are_converted(kind, tmp_path):
    checkpoint = authors_checkpoint(kind)
    torch.save(checkpoint, tmp_path / "weights.pth")
    model = SmoothPlusSparse(pretrained=tmp_path / "weights.pth")
    prior = model.prior
    assert prior.penalty_name == {"cpr": "group", "ncpr": "weakly_convex"}[kind]
    assert prior.beta.item() == pytest.approx(1.5)
    assert float(prior.sigma) == pytest.approx(25 / 255)
    for name, value in to_authors(prior).items():
        torch.testing.assert_close(value, checkpoint["state_dict"][name])
    sign = -1 if kind == "cpr" else 1
    with torch.no_grad():
        threshold = prior.penalty(torch.ones(1), torch.tensor([0.01]), 1).threshold
    expected = 0.01 * (sign * torch.linspace(-1, 1, 6)).exp()
    torch.testing.assert_close(threshold.flatten(), expected)
    torch.testing.assert_close(
        prior.dictionary.free_atoms, checkpoint["state_dict"]["free_atoms"][:, 0]
    )


def test_dictionaries_of_the_authors_are_converted():
    checkpoint = authors_checkpoint("dictionary")
    prior = from_authors(checkpoint, PatchSynthesisPrior)
    assert prior.mean == "fixed"
    assert float(prior.lambda_reg) == pytest.approx(0.0075)
    assert prior.beta.item() == pytest.approx(2.0)
    torch.testing.assert_close(
        prior.dictionary.atoms, checkpoint["state_dict"]["atoms"][:, 0]
    )
    assert float(prior.sigma) == pytest.approx(25 / 255)
    atoms = checkpoint["state_dict"]["atoms"]
    assert torch.equal(to_authors(prior)["atoms"], atoms)
    # Trainings with free means ("++") leave a matrix in the file.
    checkpoint["state_dict"]["A"] = torch.eye(3)
    other = from_authors(checkpoint, PatchSynthesisPrior, sigma=0.1)
    assert other.mean == "free" and float(other.sigma) == pytest.approx(0.1)


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        PatchSynthesis(pretrained=tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "text.pth", PatchSynthesisPrior)
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"lacks atoms\. It holds weights"):
        load(tmp_path / "other.pth", PatchSynthesisPrior)
    with pytest.raises(ValueError, match="SmoothPlusSparsePrior's authors: it lacks"):
        from_authors(authors_checkpoint("dictionary"), SmoothPlusSparsePrior)
    with pytest.raises(ValueError, match="authors: it also holds beta, free"):
        from_authors(authors_checkpoint("cpr"), PatchSynthesisPrior)
    damaged = authors_checkpoint("cpr")
    damaged["state_dict"]["atoms"][0] = torch.nan
    with pytest.raises(ValueError, match="atoms holds NaN"):
        from_authors(damaged, SmoothPlusSparsePrior)
    flat = authors_checkpoint("dictionary")
    flat["state_dict"]["atoms"] = flat["state_dict"]["atoms"].flatten(1)
    with pytest.raises(ValueError, match="must have shape"):
        from_authors(flat, PatchSynthesisPrior)
    for change in ({"config": {}}, {"config": {"prox_params": {}, "dict_params": 1}}):
        with pytest.raises(ValueError, match=r"does not fit.*'config' has no dict_p"):
            from_authors(authors_checkpoint("dictionary") | change, PatchSynthesisPrior)
    odd = authors_checkpoint("cpr")
    odd["config"]["prox_params"]["prox_type"] = "learn"
    with pytest.raises(ValueError, match="prox_type must be one of.*got 'learn'"):
        from_authors(odd, SmoothPlusSparsePrior)


# -- bad input ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "newton"}, "solver='newton' is no method of"),
        ({"bounds": (1, 0)}, "smallest < largest"),
        ({"bounds": (0, 1), "solver": "fista"}, "Use 'admm' or 'ipalm'"),
        ({"rtol": -1.0}, "rtol must not be negative"),
        ({"complex_mode": "abs"}, "complex_mode must be"),
        ({"penalty": "l0"}, "penalty must be one of"),
        ({"order": 3.0}, r"order must lie in \(1, 2\]"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small = {"num_atoms": 4, "patch_size": 3, "num_free_atoms": 2}
        SmoothPlusSparse(**{**small, **arguments})(images(1, 1, 6, 6).float())


def test_bad_settings_of_patch_synthesis_are_refused():
    with pytest.raises(ValueError, match="mean must be"):
        PatchSynthesis(4, 3, mean="none")
    with pytest.raises(ValueError, match="needs patches inside"):
        PatchSynthesis(4, 3, "circular", mean="fixed")
    with pytest.raises(ValueError, match="beta must be positive"):
        PatchSynthesisPrior(4, 3, beta=0.0)
    with pytest.raises(ValueError, match="needs patches inside"):
        PatchSynthesisPrior(4, 3, boundary="circular", mean="fixed")


def test_denoising_handles_means_as_the_training_did_and_other_problems_free_them(
    tmp_path,
):
    prior = PatchSynthesisPrior(6, 3, mean="fixed").double()
    save(prior, tmp_path / "p.safetensors")
    own = PatchSynthesis(pretrained=tmp_path / "p.safetensors").double()
    assert own.prior.mean == "fixed"
    free, fixed = (PatchSynthesis(prior=prior, mean=m) for m in ("free", "fixed"))
    y, physics = images(1, 1, 8, 9), dinv.physics.Inpainting((1, 8, 9), mask=0.8)
    with torch.no_grad():
        assert torch.equal(own(y), fixed(y)) and not torch.equal(own(y), free(y))
        y = physics(y)
        assert torch.equal(own(y, physics), free(y, physics))
        assert not torch.equal(own(y, physics), fixed(y, physics))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, y: m(y[..., :2]), ValueError, "as large as a patch, 3 x 3"),
        (lambda m, y: m(y, beta=0.0), ValueError, "beta must be positive"),
        (lambda m, y: m(y, lambda_reg=-1.0), ValueError, "lambda_reg must not be neg"),
        (lambda m, y: m(y, sigma=0.0), ValueError, "sigma must be positive"),
        (lambda m, y: m(y, gamma=1.0), TypeError, "Unknown arguments: gamma"),
        (lambda m, y: m(y, solver="ipalm"), TypeError, "Unknown arguments: solver"),
        (lambda m, y: m(y * torch.nan), ValueError, "NaN or infinity"),
        (lambda m, y: m(y, init=y[..., 1:]), ValueError, "init must be an image"),
        (lambda m, y: m(y.repeat(1, 3, 1, 1)), ValueError, "3 channels"),
        (lambda m, y: m(y[0]), ValueError, "Add the batch dimension"),
    ],
)
def test_bad_calls_are_refused(call, error, message, rng):
    model = small_model(SmoothPlusSparse, rng, {"penalty": "group"})
    with pytest.raises(error, match=message):
        call(model, images(1, 1, 6, 6))
