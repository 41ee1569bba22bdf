"""Weights files: round trips, conversion, and every way they can be wrong."""

from __future__ import annotations

import pickle
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

import deepinv as dinv
import pytest
import torch
from problems import OwnPrior, random_prior
from safetensors.torch import load_file, save_file

from deepinv_deal import DEAL, MMR, SAFI, PatchSynthesis, SmoothPlusSparse, priors
from deepinv_deal.operators import PatchDictionary
from deepinv_deal.priors import (
    AttentiveQuadraticPrior,
    DEALPrior,
    MMRPrior,
    PatchPrior,
    PatchSynthesisPrior,
    SAFIPrior,
    SmoothPlusSparsePrior,
)
from deepinv_deal.weights import (
    BUNDLED,
    OFFICIAL,
    files,
    from_authors,
    load,
    names,
    owner,
    registry,
    save,
    to_authors,
)


@pytest.fixture(scope="module")
def prior():
    return random_prior(1, 5, dtype=torch.float32, normalization="exact")


@pytest.fixture(scope="module")
def published():
    return random_prior(1, 5, dtype=torch.float32)


@pytest.fixture
def file(prior, tmp_path):
    path = tmp_path / "weights.safetensors"
    save(prior, path, {"note": "for a test"})
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
    loaded = load(file, DEALPrior)
    assert_same_weights(loaded, prior)
    assert loaded.W.normalization == "exact"
    assert loaded.num_filters == 5


FORMS = {
    f"{form.__name__}Prior": form
    for form in (DEAL, SmoothPlusSparse, PatchSynthesis, MMR, SAFI)
}


@pytest.mark.parametrize("entry", BUNDLED, ids=lambda entry: entry.name)
def test_bundled_weights_load_and_denoise_without_network(entry):
    name, form = entry.name, FORMS[entry.prior]
    model = form(pretrained=name)
    if form in (MMR, SAFI):
        assert float(model.prior.sigma) == pytest.approx(entry.level / 255)
    card = (Path(files.__file__).parent / f"{name}.md").read_text()
    for part in ("hardware", "## Results", "## Limits", "## Licence"):
        assert part in card
    with pytest.raises(ValueError, match=f"pretrained='x' is unknown.*'{name}'"):
        form(pretrained="x")
    with pytest.raises(ValueError, match=f"'{name}' holds weights of a"):
        (DEAL if form is PatchSynthesis else PatchSynthesis)(pretrained=name)
    x = torch.full((1, entry.in_channels, 40, 40), 0.5)
    x[..., 20:] = 0.8
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    # Photographs have more texture than noise of 5 gray levels, and weights keep it.
    level = entry.level or 25
    left = 0.2 if level == 5 else 0.1
    sigma = level / 255
    y = x + sigma * noise
    with torch.no_grad():
        x_hat = model(y, sigma=sigma)
    assert (x_hat - x).square().mean() < left * (y - x).square().mean()


@pytest.mark.parametrize("color", [False, True], ids=["gray", "color"])
def test_the_state_dict_of_deepinv_is_converted(color):
    theirs = dinv.models.DEAL(pretrained=None, color=color)
    prior = from_authors(theirs.state_dict(), DEALPrior)
    assert prior.in_channels == (3 if color else 1)
    assert prior.num_filters == 128
    assert prior.W.normalization == "published"
    torch.testing.assert_close(
        prior.mask_network.V[1].data, theirs.model.M3.weight.data, rtol=0, atol=0
    )


def test_a_pth_file_in_the_authors_layout_is_read(published, tmp_path):
    path = tmp_path / "deal.pth"
    state = to_authors(published) | {"spline1.D2_filter": torch.ones(1, 1, 3)}
    torch.save({"state_dict": state}, path)
    loaded = load(path, DEALPrior)
    assert_same_weights(loaded, published)
    assert loaded.W.normalization == "published"


class Malicious:
    """Would run code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_pickle_is_refused_and_does_not_run(published, tmp_path):
    trace, path = tmp_path / "was_here", tmp_path / "evil.pth"
    with open(path, "wb") as file:
        pickle.dump({"state_dict": Malicious(trace)}, file)
    with pytest.raises(ValueError, match="cannot be read"):
        load(path, DEALPrior)
    torch.save({"state_dict": to_authors(published), "x": Malicious(trace)}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load(path, DEALPrior)
    assert not trace.exists()


def test_a_truncated_file_is_refused(file, published, tmp_path):
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(file, DEALPrior)
    path = tmp_path / "deal.pth"
    torch.save({"state_dict": to_authors(published)}, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="cannot be read"):
        load(path, DEALPrior)


def rewrite(file, change):
    header, state = files.read_header(file), load_file(file)
    change(state)
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
        pytest.param(lambda s: s.clear(), "missing entries", id="empty"),
    ],
)
def test_damaged_weights_are_refused_by_name(file, change, message):
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        load(file, DEALPrior)


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a weights file of this package"):
        load(path, DEALPrior)
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"fc.weight": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"lacks .*It holds fc\.weight"):
        load(path, DEALPrior)


def test_unknown_names_and_missing_files_are_named():
    with pytest.raises(
        ValueError, match="pretrained='deal_grey' is unknown.*deal_gray"
    ):
        DEAL(pretrained="deal_grey")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        DEAL(pretrained="nowhere.safetensors")


@pytest.mark.parametrize(("in_channels", "name"), [(1, "gray"), (3, "color")])
def test_the_bundled_weights_fit_the_channels(in_channels, name):
    assert_same_weights(DEAL(in_channels).prior, load(f"deal_{name}", DEALPrior))


@pytest.mark.parametrize("pretrained", ["bundled", "download"])
def test_there_are_no_weights_for_two_channels(pretrained):
    with pytest.raises(ValueError, match="in_channels must be 1 or 3 .*got 2"):
        DEAL(2, pretrained=pretrained)


def test_weights_that_do_not_fit_what_was_asked_for_are_refused(file):
    with pytest.raises(ValueError, match="num_filters=128 was asked for"):
        DEAL(num_filters=128, pretrained=file)


def test_loading_leaves_the_global_random_state_alone(file):
    state = torch.get_rng_state()
    load(file, DEALPrior)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_noise_in_a_file_raises_nothing_but_value_errors(published, tmp_path, suffix):
    path = tmp_path / f"noise{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": to_authors(published)}, path)
    else:
        save(published, path)
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
            # Numbers may change unnoticed: a weights file has no hash.
            load(path, DEALPrior)
        except ValueError:
            pass


def test_states_that_hold_no_tensors_are_refused(published, tmp_path):
    path = tmp_path / "odd.pth"
    for state in (dict.fromkeys(to_authors(published), "text"), [torch.ones(1)], {}):
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"odd\.pth"):
            load(path, DEALPrior)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param("{}", "must have shape", id="none"),
        pytest.param('{"normalization": "x"}', "normalization", id="norm rule"),
        pytest.param('{"size": 3}', "'size'", id="unknown"),
        pytest.param("[1]", "was not built", id="list"),
        pytest.param("{", "was not built", id="damaged"),
    ],
)
def test_headers_with_other_settings_are_refused(prior, tmp_path, config, message):
    path = tmp_path / "weights.safetensors"
    header = {"format": files.FORMAT, "prior": "DEALPrior", "config": config}
    save_file(dict(prior.state_dict()), path, header)
    with pytest.raises(ValueError, match=rf"weights\.safetensors.*{message}"):
        load(path, DEALPrior)


# -- downloads ---------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder in place of the authors' repositories, and counts requests."""
    root, requests = tmp_path / "served", []
    root.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=root)

        def log_request(self, code="-", size="-"):
            requests.append(int(code))

        def log_error(self, *_):
            """Prints nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        Thread(target=httpd.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setattr(registry, "BASE_URL", base)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        yield root, requests
        httpd.shutdown()


def authors_file(prior):
    """What the authors would have saved, in a checkpoint with their settings."""
    config = {"sigma": 25, "prox_params": {}, "dict_params": {}}
    if isinstance(prior, PatchSynthesisPrior):
        config["prox_params"] = {"threshold": float(prior.lambda_reg)}
        config["dict_params"] = {"beta": prior.beta.item()}
    if isinstance(prior, SmoothPlusSparsePrior):
        kind = {"group": "l1norm", "weakly_convex": "l0norm"}[prior.penalty_name]
        config["prox_params"] = {"prox_type": kind, "groupsize": 2, "order": 1.8}
        config["prox_params"] |= {"lambda_init": float(prior.lambda_reg)}
    state = to_authors(prior)
    if getattr(prior, "mean", None) == "free":
        state["A"] = torch.eye(4)
    content = BytesIO()
    torch.save({"state_dict": state, "config": config}, content)
    return content.getvalue()


SMALL = {
    "DEALPrior": lambda e: random_prior(e.in_channels, 4, dtype=torch.float32),
    "SAFIPrior": lambda e: SAFIPrior(3, e.level / 255),
    "MMRPrior": lambda e: MMRPrior(3, e.level / 255),
    "SmoothPlusSparsePrior": lambda e: SmoothPlusSparsePrior(
        "weakly_convex" if "ncpr" in e.name else "group", 6, 4, 3, beta=0.7
    ),
    "PatchSynthesisPrior": lambda e: PatchSynthesisPrior(
        6, 4, mean="free" if "++" in e.name else "fixed"
    ),
}


@pytest.mark.parametrize(
    "entry", OFFICIAL, ids=lambda e: f"{e.prior}-{e.name}-{e.in_channels}"
)
def test_files_of_the_authors_are_fetched_once_and_checked(entry, server, monkeypatch):
    root, requests = server
    prior = SMALL[entry.prior](entry)
    content = authors_file(prior)
    source = root / entry.repository / entry.commit / entry.path
    source.parent.mkdir(parents=True)
    source.write_bytes(content)
    kind = getattr(priors, entry.prior)
    options = {"in_channels": entry.in_channels}
    with pytest.raises(ValueError, match="is not the official one"):
        load(entry.name, kind, **options)
    assert not list(Path(torch.hub.get_dir()).rglob("*.*"))
    known = replace(entry, blob=registry.blob_id(content))
    entries = tuple(known if e is entry else e for e in OFFICIAL)
    monkeypatch.setattr(registry, "OFFICIAL", entries)
    requests.clear()
    for _ in range(2):
        loaded = load(entry.name, kind, **options)
    assert requests == [200]
    state = dict(prior.state_dict())
    if entry.level is not None:
        state["sigma"] = torch.tensor(entry.level / 255)
    torch.testing.assert_close(dict(loaded.state_dict()), state)
    if entry.level is not None:
        prior.sigma.fill_(entry.level / 255)
    assert loaded.config() == pytest.approx(prior.config())
    # A file that was damaged on the disk is fetched again, one placed by hand is not.
    known.cached.write_bytes(b"damaged")
    load(entry.name, kind, **options)
    assert requests == [200, 200]
    source.unlink()
    load(entry.name, kind, **options)
    known.cached.unlink()
    with pytest.raises(OSError, match=f"{entry.commit}.*404.*place it at .*hub.*pth"):
        load(entry.name, kind, **options)
    known.cached.write_bytes(content)
    assert type(load(entry.name, kind, **options)) is kind


def test_without_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    message = r"127\.0\.0\.1:9/mehrsapo/DEAL/4eec.*deal_color\.pth.*'deal_gray'"
    with pytest.raises(OSError, match=message):
        DEAL(in_channels=3, pretrained="download")


def test_every_name_stands_for_one_file_of_a_model():
    keys = [(e.prior, e.name, e.in_channels) for e in (*BUNDLED, *OFFICIAL)]
    assert len(set(keys)) == len(keys) == 15 + 16
    assert len({e.blob for e in OFFICIAL}) == len({e.url for e in OFFICIAL}) == 16
    for entry in OFFICIAL:
        assert len(entry.blob) == len(entry.commit) == 40
        level = "deal" if entry.level is None else f"sigma{entry.level}"
        assert level in entry.path.replace("sigma_", "sigma")
    assert "download_25++" in names("PatchSynthesisPrior")
    assert names("SmoothPlusSparsePrior")[4:] == [
        f"download_{kind}_{level}" for kind in ("cpr", "ncpr") for level in (5, 25)
    ]


def test_names_tell_the_class_where_it_is_one():
    assert owner("bundled") == owner("download") == "DEALPrior"
    assert owner("download_ncpr_5") == "SmoothPlusSparsePrior"
    with pytest.raises(ValueError, match="a name for MMRPrior, PatchS.*, SAFIPrior"):
        owner("download_25")
    with pytest.raises(ValueError, match="holds weights of a SAFIPrior or MMRPrior"):
        load("download_15", DEALPrior)


def test_the_blob_id_is_that_of_git():
    # `printf 'hello\n' | git hash-object --stdin`
    assert registry.blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


# -- priors that a user writes -----------------------------------------------------


class WithSettings(AttentiveQuadraticPrior):
    def __init__(self, size, names=("a", "b"), gain=2.0):
        super().__init__()
        self.size, self.names = size, list(names)
        self.register_buffer("gain", torch.tensor(gain))
        self.filters = torch.nn.Parameter(torch.ones(size))


class WithSecret(WithSettings):
    def __init__(self, size, secret):
        super().__init__(size)


class WithRest(WithSettings):
    def __init__(self, **rest):
        super().__init__(**rest)


class OwnSAFI(SAFIPrior):
    def __init__(self, num_filters, depth):
        super().__init__(num_filters)
        self.depth = depth


class OwnDictionary(PatchPrior):
    def __init__(self, num_atoms, patch_size, beta):
        super().__init__(PatchDictionary(num_atoms, patch_size), beta, 0.01, 0.1, 1.0)


@pytest.mark.parametrize(
    ("prior", "config"),
    [
        pytest.param(OwnPrior(), {}, id="no settings"),
        pytest.param(
            WithSettings(3, gain=0.5),
            {"size": 3, "names": ["a", "b"], "gain": 0.5},
            id="settings",
        ),
        pytest.param(OwnSAFI(3, 2), {"num_filters": 3, "depth": 2}, id="l1"),
        pytest.param(
            OwnDictionary(5, 4, 1.0),
            {"num_atoms": 5, "patch_size": 4, "beta": 1.0},
            id="dictionary",
        ),
    ],
)
def test_priors_of_ones_own_are_saved_and_loaded(prior, config, tmp_path):
    path = tmp_path / "own.safetensors"
    assert prior.config() == config
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.01)
    save(prior, path)
    loaded = load(path, type(prior))
    assert_same_weights(loaded, prior)
    assert loaded.config() == prior.config()
    with pytest.raises(
        ValueError, match=f"it holds weights of a {type(prior).__name__}"
    ):
        load(path, DEALPrior)
    with pytest.raises(ValueError, match="holds weights of a DEALPrior, not of a "):
        load("deal_gray", type(prior))
    with pytest.raises(ValueError, match="no layout of authors for"):
        to_authors(prior)


@pytest.mark.parametrize(
    "prior", [WithSecret(2, 1), WithRest(size=2)], ids=["argument", "keywords"]
)
def test_arguments_that_nobody_knows_are_named(prior, tmp_path):
    path = tmp_path / "own.safetensors"
    with pytest.raises(TypeError, match=r"(secret|rest).*or override With.*config\(\)"):
        save(prior, path)
    assert not path.exists()


def test_other_misuse_is_named(prior, file):
    with pytest.raises(ValueError, match=r"'own\.pth' must end in \.safetensors"):
        save(prior, "own.pth")
    with pytest.raises(ValueError, match="sigma=0.1 is for .pth files"):
        load(file, DEALPrior, sigma=0.1)
    with pytest.raises(ValueError, match="norm rule 'published' only"):
        to_authors(prior)
    with pytest.raises(ValueError, match="sigma must be positive"):
        MMRPrior(3, sigma=0.0)
