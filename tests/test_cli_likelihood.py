"""The option --likelihood: units, files, reports, bad input."""

import warnings

import deepinv as dinv
import numpy as np
import pytest
import tifffile
import torch
from deepinv.optim import LogPoissonLikelihood, PoissonLikelihood
from problems import random_prior
from test_cli import FAST, SIZE, load, photograph, save

from deepinv_deal import DEAL
from deepinv_deal import weights as weights_of
from deepinv_deal.cli import main
from deepinv_deal.evaluation import make_kernel
from deepinv_deal.optim import SmoothedL1, WeightedL2
from deepinv_deal.weights import load as load_prior


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a small DEAL that smooths."""
    path = tmp_path_factory.mktemp("weights") / "deal.safetensors"
    weights_of.save(random_prior(gain=2.0, dtype=torch.float32), path)
    return path


@pytest.fixture(scope="module")
def model(weights):
    from deepinv_deal.priors import DEALPrior

    prior = load_prior(weights, DEALPrior)

    def make(fidelity, **settings):
        return DEAL(prior=prior, data_fidelity=fidelity, rtol=1e-2, **settings)

    return make


def counts(peak=60.0, seed=0):
    return np.random.default_rng(seed).poisson(peak * photograph())


def run(model, y, *args, **kwargs):
    with torch.no_grad():
        return model(torch.from_numpy(y).float()[None, None], *args, **kwargs)[0, 0]


def denoise(source, target, weights, *options):
    command = ["denoise", str(source), str(target), "--pretrained", str(weights)]
    return main([*command, *FAST, *options])


# -- units -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("y.tif", np.uint16),
        ("y.tif", np.uint8),
        ("y.tif", np.float32),
        ("y.npy", np.uint16),
        ("y.npy", np.float64),
        ("y.npy", np.int32),
        ("y.png", np.uint16),
    ],
)
def test_counts_in_a_file_are_counts(tmp_path, weights, model, name, dtype, capsys):
    """Neither the depth of the file nor the division by its white changes the gain."""
    k = counts().astype(dtype)
    source, target = tmp_path / name, tmp_path / f"out_{name}"
    if name.endswith("tif"):
        tifffile.imwrite(source, k)
    elif name.endswith("npy"):
        np.save(source, k)
    else:
        from PIL import Image

        Image.fromarray(k).save(source)
    assert denoise(source, target, weights, "--likelihood", "poisson:1") == 0
    expected = run(model(PoissonLikelihood(1.0)), k.astype(np.float32)).numpy()
    found = tifffile.imread(target) if name.endswith("tif") else load(target)
    assert found.shape == k.shape
    kept = dtype if not name.endswith("npy") else np.result_type(dtype, np.float32)
    whole = np.issubdtype(dtype, np.integer) and not name.endswith("npy")
    if not name.endswith("npy"):
        assert found.dtype == kept
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0.51 if whole else 0)
    said = capsys.readouterr()
    assert "Poisson likelihood with gain 1 and background 0, lambda" in said.out
    assert ("holds whole numbers up to" in said.err) == whole


def test_counts_are_denoised(tmp_path):
    k, x = counts(), 60 * photograph()
    np.save(tmp_path / "y.npy", k.astype(np.uint16))
    command = (tmp_path / "y.npy", tmp_path / "x.npy", "bundled")
    assert denoise(*command, "--likelihood", "poisson:1") == 0
    error = np.square(load(tmp_path / "x.npy") - x).mean()
    assert error < 0.5 * np.square(k - x).mean()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_gain_is_what_one_count_adds_in_the_file(tmp_path, weights, model, dtype):
    """A camera multiplies by the gain, and may round."""
    gain, background = 2.2, 3.0
    y = gain * np.random.default_rng(0).poisson(100 * photograph() + background)
    y = y.round().astype(dtype) if dtype == np.uint16 else y.astype(dtype)
    source, target = tmp_path / "y.npy", tmp_path / "x.npy"
    np.save(source, y)
    option = ["--likelihood", f"poisson:{gain}:{background}"]
    assert denoise(source, target, weights, *option) == 0
    fidelity = PoissonLikelihood(1.0, background)
    expected = gain * run(model(fidelity), y / np.float32(gain))
    np.testing.assert_allclose(load(target), expected, rtol=1e-5)
    # As the likelihood of what is in the file, whose scaling law this is.
    fidelity = PoissonLikelihood(gain, background, denormalize=True)
    y = torch.from_numpy(y.astype(np.float32))
    if dtype == np.float32:
        again = run(model(fidelity, scale=220.0), y.numpy())
        assert denoise(source, target, weights, *option, "--white", "220") == 0
        np.testing.assert_allclose(load(target), again, rtol=1e-3)


def test_white_is_a_scale_and_leaves_the_gain_alone(tmp_path, weights, model):
    k = counts().astype(np.uint16)
    source, target = tmp_path / "y.npy", tmp_path / "x.npy"
    np.save(source, k)
    option = ["--likelihood", "poisson:1", "--white", "40"]
    fidelity = PoissonLikelihood(1.0)
    for sigma, more in ((None, []), (40 * 51 / 255, ["--sigma", "51"])):
        assert denoise(source, target, weights, *option, *more) == 0
        expected = run(model(fidelity, scale=40.0), k, sigma=sigma)
        np.testing.assert_allclose(load(target), expected, rtol=1e-5)


def test_denoising_by_transmission(tmp_path, weights, model, capsys):
    rng, N0, mu = np.random.default_rng(0), 200.0, 0.5
    n = rng.poisson(N0 * np.exp(-mu * 3 * photograph())).clip(0)
    n[2, 3] = 0
    with np.errstate(divide="ignore"):
        y = (-np.log(n / N0) / mu).astype(np.float32)
    source, target = tmp_path / "y.npy", tmp_path / "x.npy"
    np.save(source, y)
    option = ["--likelihood", f"transmission:{N0}:{mu}"]
    assert denoise(source, target, weights, *option) == 0
    expected = run(model(LogPoissonLikelihood(N0, mu)), y)
    np.testing.assert_allclose(load(target), expected, rtol=1e-5)
    assert "transmission likelihood with N0 200 and mu 0.5" in capsys.readouterr().out
    tifffile.imwrite(tmp_path / "raw.tif", (40 * n + 100).astype(np.uint16))
    assert denoise(tmp_path / "raw.tif", target, weights, *option) == 2
    assert "is for -log(counts / N0) / MU" in capsys.readouterr().err


def test_outliers_and_weights_are_relative_to_white(tmp_path, weights, model, capsys):
    y = photograph().astype(np.float32)
    y[::4, ::3] = 1
    w = np.ones(SIZE)
    w[::4, ::3] = 0.1
    file = save(tmp_path / "w.npy", w)
    np.save(tmp_path / "y.npy", y * 2)
    command = [tmp_path / "y.npy", tmp_path / "x.npy", weights, "--white", "2"]
    for option, fidelity in (
        ("l1", SmoothedL1()),
        ("l1:25.5", SmoothedL1(0.1)),
        (f"weights:{file}", WeightedL2(torch.from_numpy(w))),
    ):
        assert denoise(*command, "--sigma", "20", "--likelihood", option) == 0
        expected = 2 * run(model(fidelity), y, sigma=20 / 255)
        np.testing.assert_allclose(load(tmp_path / "x.npy"), expected, rtol=1e-4)
    assert f"weighted by {file}" in capsys.readouterr().out
    # The default weight is relative: a factor of all weights changes nothing.
    before = load(tmp_path / "x.npy")
    np.save(file, 100 * w)
    assert denoise(*command, "--sigma", "20", "--likelihood", option) == 0
    np.testing.assert_allclose(load(tmp_path / "x.npy"), before, atol=2e-2)


# -- reconstruct -----------------------------------------------------------------


def test_counts_are_deblurred(tmp_path, weights, model, capsys):
    kernel = make_kernel("gaussian:0.6")[1]
    physics = dinv.physics.Blur(kernel, padding="circular")
    x = 80 * torch.from_numpy(photograph()).float()[None, None]
    k = np.random.default_rng(0).poisson(physics.A(x)[0, 0].numpy()).astype(np.uint16)
    tifffile.imwrite(tmp_path / "y.tif", k)
    truth = save(tmp_path / "truth.npy", x[0, 0].numpy())
    target, figure = tmp_path / "x.npy", tmp_path / "figure.png"
    command = ["reconstruct", "blur", str(tmp_path / "y.tif"), str(target), *FAST]
    command += ["--kernel", "gaussian:0.6", "--likelihood", "poisson:1"]
    command += ["--pretrained", str(weights), "--truth", truth]
    assert main([*command, "--figure", str(figure)]) == 0
    expected = run(model(PoissonLikelihood(1.0)), k, physics)
    np.testing.assert_allclose(load(target), expected, rtol=1e-4)
    psnr = float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0])
    top = float(x.max())  # which is white
    error = (expected.clamp(0, top) - x[0, 0]).square().mean() / top**2
    assert psnr == pytest.approx(-10 * np.log10(float(error)), abs=0.1)
    assert figure.stat().st_size > 1000
    # The level of the model is in its own unit.
    assert main([*command, "--sigma-model", "51", "--lambda-reg", "30"]) == 0
    expected = run(
        model(PoissonLikelihood(1.0), sigma=0.2), k, physics, lambda_reg=30.0
    )
    np.testing.assert_allclose(load(target), expected, rtol=1e-4)
    assert "lambda 30" in capsys.readouterr().out


def test_what_was_not_measured_may_be_anything(tmp_path, weights):
    mask = np.random.default_rng(1).random(SIZE) > 0.3
    results = []
    for missing in (-1.0, np.nan):
        y = np.where(mask, counts(), missing)
        source, target = save(tmp_path / "y.npy", y), tmp_path / "x.npy"
        command = ["reconstruct", "inpainting", source, str(target), *FAST, "--mask"]
        command += [save(tmp_path / "m.npy", mask), "--pretrained", str(weights)]
        assert main([*command, "--likelihood", "poisson:1:0.5"]) == 0
        results.append(load(target))
    np.testing.assert_array_equal(*results)


# -- bad input -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("laplace", "give gaussian, poisson:GAIN"),
        ("poisson", "GAIN is missing"),
        ("poisson:much", "GAIN is no number"),
        ("poisson:-1", "GAIN must be finite and positive"),
        ("poisson:1:-1", "BACKGROUND must be finite and not negative"),
        ("poisson:1:2:3", "is no likelihood"),
        ("poisson:nan", "GAIN must be finite"),
        ("transmission:0", "N0 must be"),
        ("l1:0", "DELTA must be"),
        ("gaussian:3", "is no likelihood"),
        ("weights", "is no likelihood"),
        ("weights:", "is no likelihood"),
    ],
)
def test_bad_specifications_are_named(spec, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["denoise", "a.png", "b.png", "--likelihood", spec])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "argument --likelihood" in said and words in said


def test_bad_measurements_and_combinations_are_named(tmp_path, weights, capsys):
    y = save(tmp_path / "y.npy", counts().astype(float))
    negative = save(tmp_path / "negative.npy", counts() - 20.0)
    empty = save(tmp_path / "empty.npy", np.full(SIZE, np.nan))
    small = save(tmp_path / "small.npy", np.ones((3, 3)))
    plane = save(tmp_path / "plane.npy", np.ones(SIZE, complex))
    out, poisson = str(tmp_path / "x.npy"), ["--likelihood", "poisson:1"]
    gray = ["--white", "60", "--sigma", "20", "--likelihood"]
    for command, words in [
        (["denoise", y], "--sigma is missing"),
        (["denoise", y, "--likelihood", "l1"], "--sigma is missing"),
        (["denoise", negative, *poisson], "negative values"),
        (["denoise", empty, *poisson], "NaN"),
        (["denoise", y, *poisson, "--sigma", "20"], "give --white"),
        (["denoise", y, *poisson, "--white", "-1"], "--white must be positive"),
        (["denoise", y, *gray, "weights:none.npy"], "no file"),
        (["denoise", y, *gray, f"weights:{small}"], "weights must expand"),
        (["denoise", y, *gray, f"weights:{plane}"], "no real numbers"),
        (["denoise", y, *gray, f"weights:{negative}"], "not negative"),
        (["reconstruct", "mri", plane, *poisson], "k-space holds none"),
    ]:
        source = 1 if command[0] == "denoise" else 2
        command.insert(source + 1, out)
        assert main([*command, "--pretrained", str(weights)]) == 2, command
        assert words in capsys.readouterr().err


def test_a_folder_of_counts_goes_on_after_a_bad_file(tmp_path, weights, capsys):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.npy", counts().astype(float))
    save(tmp_path / "in" / "b.npy", counts() - 20.0)
    command = (tmp_path / "in", tmp_path / "out", weights)
    assert denoise(*command, "--likelihood", "poisson:1") == 1
    said = capsys.readouterr()
    assert "1 of 2 files" in said.err and "negative values" in said.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.npy"]


def test_notes_of_the_model_are_printed(tmp_path, weights, capsys):
    k = counts(3.0).astype(np.uint16)
    np.save(tmp_path / "y.npy", k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        command = (tmp_path / "y.npy", tmp_path / "x.npy", weights)
        assert denoise(*command, "--likelihood", "poisson:1") == 0
    assert f"{(k == 0).sum()} of {k.size} counts are zero" in capsys.readouterr().err
