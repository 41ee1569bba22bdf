"""Weights files: round trips, conversion, and every way they can be wrong."""

from __future__ import annotations

import pickle
from pathlib import Path

import deepinv as dinv
import pytest
import torch
from problems import random_prior
from safetensors.torch import load_file, save_file

from deepinv_deal import DEAL, MMR, SAFI, PatchSynthesis, SmoothPlusSparse
from deepinv_deal.weights import (
    BUNDLED,
    convert_state_dict,
    deal,
    files,
    load_prior,
    save_prior,
)

#: What the header of our own files says.
FORMAT = "deepinv_deal.DEALPrior/1"


@pytest.fixture(scope="module")
def prior():
    return random_prior(1, 5, dtype=torch.float32, normalization="exact")


@pytest.fixture
def file(prior, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_prior(prior, path, {"note": "for a test"})
    return path


def assert_same_weights(a, b):
    torch.testing.assert_close(
        dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0
    )


def test_files_are_as_readable_as_others(file):
    other = file.with_name("other")
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


def test_a_saved_prior_is_loaded_with_its_norm_rule(prior, file):
    loaded = load_prior(file)
    assert_same_weights(loaded, prior)
    assert loaded.W.normalization == "exact"
    assert loaded.num_filters == 5


FORMS = {
    f"{form.__name__}Prior": form
    for form in (DEAL, SmoothPlusSparse, PatchSynthesis, MMR, SAFI)
}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_weights_load_and_denoise_without_network(name):
    form = FORMS[BUNDLED[name]]
    model = form(pretrained=name)
    card = (Path(files.__file__).parent / f"{name}.md").read_text()
    for part in ("hardware", "## Results", "## Limits", "## Licence"):
        assert part in card
    with pytest.raises(ValueError, match=f"pretrained='x' is unknown.*'{name}'"):
        form(pretrained="x")
    with pytest.raises(ValueError, match=f"'{name}' holds weights of a"):
        (DEAL if form is PatchSynthesis else PatchSynthesis)(pretrained=name)
    channels = 3 if name == "deal_color" else 1
    x = torch.full((1, channels, 40, 40), 0.5)
    x[..., 20:] = 0.8
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    # Photographs have more texture than noise of 5 gray levels, and weights keep it.
    ending = name.rsplit("_", 1)[1]
    level = int(ending) if ending in ("5", "15") else 25
    left = 0.2 if level == 5 else 0.1
    sigma = level / 255
    y = x + sigma * noise
    with torch.no_grad():
        x_hat = model(y, sigma=sigma)
    assert (x_hat - x).square().mean() < left * (y - x).square().mean()


@pytest.mark.parametrize("color", [False, True], ids=["gray", "color"])
def test_the_state_dict_of_deepinv_is_converted(color):
    theirs = dinv.models.DEAL(pretrained=None, color=color)
    prior = deal.prior_from_state_dict(convert_state_dict(theirs.state_dict()))
    assert prior.in_channels == (3 if color else 1)
    assert prior.num_filters == 128
    assert prior.W.normalization == "published"
    torch.testing.assert_close(
        prior.mask_network.V[1].data, theirs.model.M3.weight.data, rtol=0, atol=0
    )


def authors_state(prior):
    ours = prior.state_dict()
    return {theirs: ours[key].clone() for key, theirs in deal._AUTHORS_KEYS.items()}


def test_a_pth_file_in_the_authors_layout_is_read(prior, tmp_path):
    path = tmp_path / "deal.pth"
    state = authors_state(prior) | {"spline1.D2_filter": torch.ones(1, 1, 3)}
    torch.save({"state_dict": state}, path)
    loaded = load_prior(path)
    assert_same_weights(loaded, prior)
    assert loaded.W.normalization == "published"


class Malicious:
    """Would run code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_pickle_is_refused_and_does_not_run(prior, tmp_path):
    trace, path = tmp_path / "was_here", tmp_path / "evil.pth"
    with open(path, "wb") as file:
        pickle.dump({"state_dict": Malicious(trace)}, file)
    with pytest.raises(ValueError, match="cannot be read"):
        load_prior(path)
    torch.save({"state_dict": authors_state(prior), "x": Malicious(trace)}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_prior(path)
    assert not trace.exists()


def test_a_truncated_file_is_refused(file, prior, tmp_path):
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_prior(file)
    path = tmp_path / "deal.pth"
    torch.save({"state_dict": authors_state(prior)}, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="cannot be read"):
        load_prior(path)


def rewrite(file, change):
    state = load_file(file)
    change(state)
    header = {"format": FORMAT, "normalization": "exact"}
    save_file(state, file, header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda s: s.pop("kappa.coefficients"),
            "missing entries.*kappa",
            id="missing",
        ),
        pytest.param(
            lambda s: s.update(extra=torch.ones(1)), "unknown.*extra", id="unknown"
        ),
        pytest.param(
            lambda s: s.update({"mask_network.V.0": torch.ones(5, 4, 3, 3)}),
            r"mask_network.V.0 must have shape \(5, 5, 3, 3\), got \(5, 4, 3, 3\)",
            id="shape",
        ),
        pytest.param(
            lambda s: s["W.weight.1"].view(-1)[7:8].fill_(float("nan")),
            "W.weight.1 holds NaN",
            id="nan",
        ),
        pytest.param(lambda s: s.clear(), "does not hold weights", id="empty"),
    ],
)
def test_damaged_weights_are_refused_by_name(file, change, message):
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        load_prior(file)


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a weights file of DEALPrior"):
        load_prior(path)
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"fc.weight": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"lacks .*It holds fc\.weight"):
        load_prior(path)


def test_unknown_names_and_missing_files_are_named():
    with pytest.raises(
        ValueError, match="pretrained='deal_grey' is unknown.*deal_gray"
    ):
        DEAL(pretrained="deal_grey")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        DEAL(pretrained="nowhere.safetensors")


@pytest.mark.parametrize(("in_channels", "name"), [(1, "gray"), (3, "color")])
def test_the_bundled_weights_fit_the_channels(in_channels, name):
    assert_same_weights(DEAL(in_channels).prior[0], load_prior(f"deal_{name}"))


@pytest.mark.parametrize("pretrained", ["bundled", "download"])
def test_there_are_no_weights_for_two_channels(pretrained):
    with pytest.raises(ValueError, match="in_channels must be 1 or 3 .*got 2"):
        DEAL(2, pretrained=pretrained)


def test_weights_that_do_not_fit_what_was_asked_for_are_refused(file):
    with pytest.raises(ValueError, match="num_filters=128 was asked for"):
        DEAL(num_filters=128, pretrained=file)


@pytest.fixture
def served(prior, tmp_path, monkeypatch):
    """Serves a file instead of the network; returns its content."""
    source = tmp_path / "served.pth"
    torch.save({"state_dict": authors_state(prior)}, source)
    content = source.read_bytes()
    fetched = []

    def fetch(url, destination, progress):
        assert deal._COMMIT in url
        fetched.append(destination)
        with open(destination, "wb") as file:
            file.write(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return content, fetched


def test_a_download_with_other_content_is_refused_and_not_kept(served, tmp_path):
    with pytest.raises(ValueError, match="not the official one"):
        load_prior("download")
    assert not list((tmp_path / "hub").rglob("*.pth"))


def test_a_download_is_checked_kept_and_not_repeated(served, prior, monkeypatch):
    content, fetched = served
    blobs = {"deal_gray": deal._git_blob_id(content)}
    monkeypatch.setattr(deal, "_OFFICIAL_BLOBS", blobs)
    for _ in range(2):
        assert_same_weights(load_prior("download"), prior)
    assert len(fetched) == 1


def test_the_blob_id_is_that_of_git():
    # `printf 'hello\n' | git hash-object --stdin`
    assert deal._git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_failing_downloads_name_the_address_and_the_way_out(monkeypatch, tmp_path):
    def fetch(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=r"raw\.githubusercontent\.com.*'deal_gray'"):
        load_prior("download")


def test_loading_leaves_the_global_random_state_alone(file):
    state = torch.get_rng_state()
    load_prior(file)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_noise_in_a_file_raises_nothing_but_value_errors(prior, tmp_path, suffix):
    path = tmp_path / f"noise{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": authors_state(prior)}, path)
    else:
        save_prior(prior, path)
    content = path.read_bytes()
    g = torch.Generator().manual_seed(0)
    for k in range(40):
        damaged = bytearray(content)
        start = int(torch.randint(len(content) - 64, (), generator=g))
        start = start if k % 2 else start % 1000  # the header is the fragile part
        noise = torch.randint(256, (64,), generator=g)
        damaged[start : start + 64] = bytes(noise.tolist())
        path.write_bytes(damaged)
        try:
            load_prior(path)  # numbers may change unnoticed: a weights file has no hash
        except ValueError:
            pass


def test_states_that_hold_no_tensors_are_refused(tmp_path):
    path = tmp_path / "odd.pth"
    for state in (
        {"W.weight.0": 1, "W.weight.2": 2},
        dict.fromkeys(deal._AUTHORS_KEYS.values(), "text"),
        [torch.ones(1)],
        {},
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"odd\.pth|layout"):
            load_prior(path)


def test_a_header_without_norm_rule_is_refused(prior, tmp_path):
    path = tmp_path / "weights.safetensors"
    for header in (
        {"format": FORMAT},
        {"format": FORMAT, "normalization": "x"},
    ):
        save_file(dict(prior.state_dict()), path, header)
        with pytest.raises(ValueError, match="normalization"):
            load_prior(path)
