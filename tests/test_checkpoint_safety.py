"""Weights that come from others: nothing is executed, nothing half loaded."""

from __future__ import annotations

import os
import pickle
import socket
from io import BytesIO

import pytest
import torch
from problems import images, random_model, random_prior
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepinv_deal import DEAL, MMR, SAFI, PatchSynthesis, SmoothPlusSparse
from deepinv_deal.priors import DEALPrior
from deepinv_deal.weights import load, save

#: How each model takes weights of a file.
LOADERS = [
    pytest.param(lambda path, kind=kind: kind(pretrained=path), id=kind.__name__)
    for kind in (DEAL, SAFI, MMR, PatchSynthesis, SmoothPlusSparse)
]


class Malicious:
    """Would make a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save(random_prior(dtype=torch.float32), path)
    return path


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("write", ["pickle", "torch", "legacy"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_model_executes_what_a_file_holds(load, write, suffix, tmp_path):
    trace, path = tmp_path / "was_here", tmp_path / f"evil{suffix}"
    content = {"state_dict": {"atoms": Malicious(trace)}, "config": {}}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(ValueError, match="evil"):
        load(path)
    assert not trace.exists()
    # The file is as dangerous as it looks.
    if write == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(BytesIO(path.read_bytes()), weights_only=False)
    assert trace.exists()


def change(file, key, value):
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file(load_file(file) | {key: value}, file, header)


KAPPA = "kappa.coefficients"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda f: f.write_bytes(f.read_bytes()[:500]), "readable", id="truncated"
        ),
        pytest.param(
            lambda f: change(f, KAPPA, torch.ones(1, 52)),
            r"kappa.coefficients must have shape \(1, 53\), got \(1, 52\)",
            id="shape",
        ),
        pytest.param(
            lambda f: change(f, "extra", torch.ones(2)),
            "unknown.*extra",
            id="key",
        ),
        pytest.param(
            lambda f: change(f, KAPPA, torch.full((1, 53), -torch.inf)),
            "kappa.coefficients holds NaN or infinity",
            id="infinity",
        ),
        pytest.param(lambda f: f.unlink(), "does not exist", id="missing"),
    ],
)
def test_a_model_in_use_survives_a_file_that_is_refused(damage, message, file):
    model, y = random_model(rtol=1e-3), images(1, 1, 6, 7)
    with torch.no_grad():
        expected = model(y, sigma=0.1)
        damage(file)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            model.prior = load(file, DEALPrior)
        assert torch.equal(model(y, sigma=0.1), expected)


def test_constructors_and_calls_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("A connection was opened.")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    y = torch.rand(1, 1, 8, 9, generator=torch.Generator().manual_seed(0))
    models = (
        DEAL(),
        SAFI(num_filters=4),
        MMR(num_filters=4),
        PatchSynthesis(8, 4),
        SmoothPlusSparse("group", 8, 4, 2),
    )
    with torch.no_grad():
        for model in models:
            assert model(y, sigma=0.1).isfinite().all()


def test_a_failed_write_leaves_the_old_file(file, monkeypatch, tmp_path):
    old = file.read_bytes()

    def fill_the_disk(path, data):
        with open(path, "wb") as opened:
            opened.write(data[: len(data) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save(random_prior(seed=1, dtype=torch.float32), file)
    assert file.read_bytes() == old
    load(file, DEALPrior)
