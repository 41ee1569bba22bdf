"""What a newcomer does: an attentive l1 prior in one file, trained and evaluated."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gradients_equal_finite_differences
from PIL import Image
from problems import noisy_images
from trainers import SMALL, options, take, weights_after

from deepinv_deal import SAFI, SolverOptions
from deepinv_deal.cli import main
from deepinv_deal.cli._options import load_class
from deepinv_deal.priors import AttentiveL1Prior
from deepinv_deal.solvers import AdjointOptions
from deepinv_deal.training import AttentiveL1Recipe
from deepinv_deal.weights import load, save

FILE = Path(__file__).resolve().parents[1] / "examples" / "own_attentive_l1.py"
OWN = ["--prior", f"{FILE}:EdgeStoppingL1"]

pytestmark = pytest.mark.skipif(
    not FILE.exists(), reason="the examples are not part of this distribution"
)


@pytest.fixture(scope="module")
def form():
    return load_class(OWN[1])


@pytest.fixture
def prior(form):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = form(3).double()
    with torch.no_grad():
        prior.lambda_reg.fill_(0.1 / float(prior.bind().nu))
    return prior


@pytest.fixture
def folder(tmp_path):
    path, rng = tmp_path / "images", np.random.default_rng(0)
    path.mkdir()
    for i in range(2):
        image = np.kron(rng.integers(0, 255, (4, 5)), np.ones((5, 5))).astype(np.uint8)
        Image.fromarray(image).save(path / f"{i}.png")
    return path


def settings(folder, out):
    small = SMALL | {"num_filters": 3, "steps": 2, "val_every": 2}
    return small | {"data": str(folder), "out": str(out)}


def test_the_prior_is_one_short_file():
    assert len(FILE.read_text().splitlines()) < 150


def test_its_gradients_are_exact(prior, rng):
    y = noisy_images(1)
    model = SAFI(
        prior=prior,
        rtol=1e-11,
        solver=SolverOptions(forcing=0.05, inner_max_iter=5000),
        adjoint=AdjointOptions(smoothing=1e-6, rtol=1e-10, max_iter=300),
    )

    def run(contrast):
        return torch.func.functional_call(model, {"prior.contrast": contrast}, y).sum()

    gradients_equal_finite_differences(run, [prior.contrast], rng, rtol=1e-4, h=1e-6)


def test_it_serves_other_noise_levels(prior):
    y = noisy_images(1)
    model = SAFI(prior=prior, rtol=1e-8, bounds=None, scale=None)
    sigma = float(prior.sigma)
    with torch.no_grad():
        expected, mask = model(y), prior.mask(y)
        assert (expected - y).abs().max() > 1e-3 and mask.std() > 0.02
        found = model(0.4 * y, sigma=0.4 * sigma)
        torch.testing.assert_close(found, 0.4 * expected, rtol=0, atol=1e-6)
        prior.rescale(0.4)
        torch.testing.assert_close(prior.mask(0.4 * y), mask)
        torch.testing.assert_close(model(0.4 * y), found, rtol=0, atol=1e-6)


def test_its_weights_are_saved_loaded_and_trained(form, folder, tmp_path):
    path = tmp_path / "own.safetensors"
    first = form(3, sigma=0.05)
    with torch.no_grad():
        first.contrast.mul_(1.5)
    save(first, path)
    again = load(path, form)
    assert again.config() == first.config()
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    kind = load_class(f"{FILE}:EdgeStoppingL1Trainer")
    recipe = settings(folder, tmp_path / "run") | {"init": str(path), "sigma": 0.1}
    trainer = kind(AttentiveL1Recipe(**recipe))
    started = trainer.prior.contrast.detach().clone()
    torch.testing.assert_close(started, 2 * first.contrast)  # for twice the noise
    before = weights_after(trainer, 0)
    assert np.isfinite(take(trainer, 2)).all()
    assert not torch.equal(weights_after(trainer, 0), before)
    assert not torch.equal(trainer.prior.contrast, started)


def test_the_commands_train_and_evaluate_it(form, folder, tmp_path, capsys):
    run, table = tmp_path / "run", tmp_path / "scores.csv"
    train = options(settings(folder, run))
    assert main(["train", "safi", *train, *OWN]) == 0
    weights = run / "best.safetensors"
    trained = load(weights, form)
    assert trained.num_filters == 3
    capsys.readouterr()
    command = ["evaluate", "--data", str(folder), "--sigma", "25", "--csv", str(table)]
    command += ["--pretrained", str(weights)]

    def psnr():
        assert main([*command, *OWN]) == 0
        with table.open() as file:
            return [float(row["psnr"]) for row in csv.DictReader(file)]

    first = psnr()
    with torch.no_grad():
        trained.contrast.mul_(10)  # masks near one: it smooths more
    save(trained, weights)
    assert min(first) > 15 and psnr() != first
    assert main(command) == 2
    assert "--prior FILE.py:EdgeStoppingL1" in capsys.readouterr().err
    assert main(["train", "safi", *train, "--prior", "pathlib:Path"]) == 2
    assert "must be an AttentiveL1Prior" in capsys.readouterr().err


def test_what_a_prior_lacks_is_named():
    class Half(AttentiveL1Prior):
        pass

    with pytest.raises(NotImplementedError, match=r"Half must define bind_mask\(nu\)"):
        Half(2).mask(torch.rand(1, 1, 8, 8))
    with pytest.raises(NotImplementedError, match="Half must define stretch_mask"):
        Half(2).rescale(2.0)
    with pytest.raises(NotImplementedError, match="Half has no energy"):
        Half(2)(torch.rand(1, 1, 8, 8))
