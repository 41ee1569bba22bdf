"""The commands, end to end on tiny files."""

import csv
import runpy
import sys
from pathlib import Path

import deepinv as dinv
import numpy as np
import pytest
import torch
from PIL import Image
from problems import generator, random_prior

from deepinv_deal import DEAL
from deepinv_deal import weights as weights_of
from deepinv_deal.cli import main
from deepinv_deal.cli._options import load_class
from deepinv_deal.evaluation import make_kernel
from deepinv_deal.evaluation.tasks import birdcage_maps, line_mask
from deepinv_deal.priors import (
    DEALPrior,
    MMRPrior,
    PatchSynthesisPrior,
    SAFIPrior,
    SmoothPlusSparsePrior,
)

SIZE = (14, 12)
FAST = ["--rtol", "1e-2"]


def photograph(channels=1, size=SIZE):
    """A smooth image with an edge, ``(H, W)`` or ``(H, W, 3)``, in [0, 1]."""
    rows, columns = (np.linspace(0, 1, n) for n in size)
    x = 0.2 + 0.3 * rows[:, None] + 0.4 * (columns > 0.5)
    return x if channels == 1 else np.stack([x, 0.5 * x, 1 - x], -1)


def noisy(channels=1, sigma=20 / 255, size=SIZE):
    x = photograph(channels, size)
    return x + np.random.default_rng(0).normal(0, sigma, x.shape)


def save(path, x):
    if path.suffix == ".npy":
        np.save(path, x)
    else:
        top, kind = (65535, np.uint16) if "16" in path.stem else (255, np.uint8)
        Image.fromarray((x.clip(0, 1) * top).round().astype(kind)).save(path)
    return str(path)


def load(path):
    if str(path).endswith("npy"):
        return np.load(path)
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def colour_weights(tmp_path):
    path = tmp_path / "colour.safetensors"
    weights_of.save(random_prior(3, 4, dtype=torch.float32), path)
    return str(path)


# -- denoise ---------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["image.png", "image.npy"])
def test_denoise_gives_what_the_model_gives(tmp_path, channels, name, capsys):
    source, target = tmp_path / name, tmp_path / "out" / name
    save(source, noisy(channels).astype(np.float32))
    assert main(["denoise", str(source), str(target), "--sigma", "20", *FAST]) == 0
    assert "converged" in capsys.readouterr().out
    read, written = load(source), load(target)
    assert (written.shape, written.dtype) == (read.shape, read.dtype)
    white = 255 if name.endswith("png") else 1
    y = torch.from_numpy(read / np.float32(white)).reshape(1, *SIZE, channels)
    with torch.no_grad():  # colour images by the weights for colour
        x_hat = DEAL(channels, rtol=1e-2)(y.permute(0, 3, 1, 2), sigma=20 / 255)
    expected = x_hat[0].permute(1, 2, 0).reshape(read.shape) * white
    np.testing.assert_allclose(written, expected, atol=0.51 if white == 255 else 1e-6)
    error = written / white - photograph(channels)
    assert np.square(error).mean() < 0.5 * (20 / 255) ** 2


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    source, target = tmp_path / "deep16.png", tmp_path / "out.png"
    save(source, noisy())
    assert main(["denoise", str(source), str(target), "--sigma", "20", *FAST]) == 0
    assert load(target).dtype == np.uint16
    assert 0.1 < load(target).mean() / 65535 < 0.9


def test_a_folder_keeps_its_tree_and_shows_no_bar_off_terminals(tmp_path, capsys):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    save(tmp_path / "in" / "a.png", noisy(size=(40, 40)))
    save(tmp_path / "in" / "sub" / "b.jpg", noisy(3, size=(40, 42)))
    save(tmp_path / "in" / "c.npy", noisy(size=(42, 40)))
    command = ["denoise", str(tmp_path / "in"), str(tmp_path / "out"), "--sigma"]
    assert main([*command, "estimate", *FAST]) == 0
    found = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")
    }
    assert found == {"a.png", "sub", "sub/b.png", "c.npy"}
    assert "Denoising:" not in capsys.readouterr().err


def test_colour_weights_take_gray_and_colour_images(tmp_path, colour_weights):
    for channels in (1, 3):
        source, target = tmp_path / f"{channels}.npy", tmp_path / f"out{channels}.npy"
        save(source, noisy(channels))
        command = ["denoise", str(source), str(target), "--sigma", "20", *FAST]
        assert main([*command, "--pretrained", colour_weights]) == 0
        assert load(target).shape == load(source).shape


def test_gray_weights_take_the_channels_of_a_colour_image_one_by_one(tmp_path):
    source, target = tmp_path / "image.npy", tmp_path / "out.npy"
    save(source, noisy(3).astype(np.float32))
    command = ["denoise", str(source), str(target), "--sigma", "20", *FAST]
    assert main([*command, "--pretrained", "deal_gray"]) == 0
    y = torch.from_numpy(load(source)).permute(2, 0, 1)[:, None]
    with torch.no_grad():
        expected = DEAL(rtol=1e-2)(y, sigma=20 / 255)[:, 0].permute(1, 2, 0)
    np.testing.assert_allclose(load(target), expected, atol=1e-6)


def test_options_of_denoise_change_the_result(tmp_path):
    source = save(tmp_path / "image.npy", noisy() * 2)
    results = []
    for i, options in enumerate(
        [["--white", "2"], ["--white", "2.5"], ["--white", "2", "--lambda-reg", "1"]]
    ):
        target = str(tmp_path / f"{i}.npy")
        assert main(["denoise", source, target, "--sigma", "20", *FAST, *options]) == 0
        results.append(load(target))
    assert not np.allclose(results[0], results[1], atol=1e-3)
    assert not np.allclose(results[0], results[2], atol=1e-3)
    assert abs(results[0].mean() - 2 * photograph().mean()) < 0.05


def test_strict_makes_failure_an_exit_code_and_a_figure_is_drawn(tmp_path, capsys):
    source, target = save(tmp_path / "a.png", noisy(3)), str(tmp_path / "b.png")
    command = ["denoise", source, target, "--sigma", "20", "--max-iter", "1"]
    figure = tmp_path / "figure.png"
    assert main([*command, "--rtol", "1e-6", "--figure", str(figure)]) == 0
    assert "NOT converged" in capsys.readouterr().out
    assert load(figure).shape[1] > 500
    assert main([*command, "--rtol", "1e-6", "--strict"]) == 1
    assert main(["denoise", source, target, "--sigma", "20", *FAST, "--strict"]) == 0


@pytest.mark.parametrize("white", [None, "max"])
def test_the_true_image_tells_the_quality(tmp_path, capsys, white):
    source, truth = save(tmp_path / "a.npy", noisy()), photograph()
    target, figure = str(tmp_path / "b.npy"), tmp_path / "figure.png"
    command = ["denoise", source, target, "--sigma", "20", *FAST]
    command += [] if white is None else ["--white", white]
    true = save(tmp_path / "x.npy", truth)
    assert main([*command, "--truth", true, "--figure", str(figure)]) == 0
    # relative to the white of the noisy image
    unit = 1.0 if white is None else load(source).max()
    mse = np.square(np.clip(load(target) / unit, 0, 1) - truth / unit).mean()
    assert f"PSNR {-10 * np.log10(mse):.2f} dB" in capsys.readouterr().out
    assert load(figure).shape[1] > 500


def test_a_wrong_true_image_is_noticed_before_it_takes_long(tmp_path, capsys):
    source, target = save(tmp_path / "a.npy", noisy()), tmp_path / "b.npy"
    small = save(tmp_path / "x.npy", photograph()[1:])
    command = ["denoise", source, str(target), "--sigma", "20", "--truth", small]
    assert main(command) == 2
    assert "--truth has shape" in capsys.readouterr().err and not target.exists()
    command[1:3] = [str(tmp_path), str(tmp_path / "out")]
    assert main(command) == 2
    assert "--truth is for one image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no file"),
        ({"a.png": b"no image"}, "not a readable image"),
        ({"a.txt": b"1"}, "unknown kind"),
        ({"a.npy": np.zeros((2, 2, 4, 5))}, "shape"),
        ({"a.npy": np.zeros((3, 8, 3))}, r"may be \(3, H, W\) or \(H, W, 3\)"),
        ({"a.npy": np.zeros((2, 3, 4, 5))}, "cannot hold 2 pages"),
        ({"a.npy": np.full((8, 8), 100.0)}, "white"),
        ({"a.npy": np.zeros((8, 8), np.int64)}, "white"),
        ({"a.npy": np.zeros((8, 8), complex)}, "complex"),
        ({"a.npy": np.full((8, 8), np.nan)}, "NaN"),
        ({"a.npy": b"damaged"}, "cannot be read|pickle"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, files, words):
    import re

    name = next(iter(files), "a.png")
    for content in files.values():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            np.save(tmp_path / name, content)
    source, target = str(tmp_path / name), str(tmp_path / "out.png")
    assert main(["denoise", source, target, "--sigma", "20"]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_bad_arguments_of_denoise_are_named(tmp_path, capsys):
    source = save(tmp_path / "a.png", noisy())
    for bad in ("0", "-3", "many"):
        with pytest.raises(SystemExit):
            main(["denoise", source, "b.png", "--sigma", bad])
        assert "estimate" in capsys.readouterr().err
    assert main(["denoise", source, str(tmp_path / "b.txt"), "--sigma", "9"]) == 2
    assert ".npy" in capsys.readouterr().err
    folder = str(tmp_path)
    assert main(["denoise", folder, str(tmp_path / "b.png"), "--sigma", "9"]) == 2
    assert "must be one" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["denoise", folder + "/empty", folder + "/x", "--sigma", "9"]) == 2
    assert "No image" in capsys.readouterr().err


# -- reconstruct -----------------------------------------------------------------


def measured(physics, channels=1):
    x = torch.from_numpy(photograph(channels)).float().reshape(1, *SIZE, channels)
    x = x.permute(0, 3, 1, 2)
    return physics.A(x if channels == 3 else x[:, :1])[0].permute(1, 2, 0).squeeze(-1)


@pytest.mark.parametrize(
    ("operator", "channels"),
    [
        pytest.param("blur", 1, marks=pytest.mark.slow),
        ("blur", 3),
        ("inpainting", 1),
        pytest.param("inpainting", 3, marks=pytest.mark.slow),
        pytest.param("downsampling", 1, marks=pytest.mark.slow),
        ("downsampling", 3),
    ],
)
def test_pictures_are_reconstructed(tmp_path, capsys, operator, channels):
    kernel = make_kernel("gaussian:0.6")[1]
    mask = (torch.rand(SIZE, generator=generator()) > 0.4).float()
    np.save(tmp_path / "mask.npy", mask.numpy())
    np.save(tmp_path / "kernel.npy", kernel[0, 0].numpy())
    physics, options, weight = {
        "blur": (
            dinv.physics.Blur(kernel, padding="circular"),
            ["--kernel", str(tmp_path / "kernel.npy")],
            0.1,
        ),
        "inpainting": (
            dinv.physics.Inpainting((channels, *SIZE), mask=mask[None]),
            ["--mask", str(tmp_path / "mask.npy")],
            1.0,
        ),
        "downsampling": (
            dinv.physics.Downsampling((channels, *SIZE), filter=kernel, factor=2),
            ["--factor", "2", "--kernel", "gaussian:0.6"],
            0.1,
        ),
    }[operator]
    source = save(tmp_path / "y.npy", measured(physics, channels).numpy())
    truth = save(tmp_path / "x.npy", photograph(channels))
    target = str(tmp_path / "x_hat.npy")
    command = ["reconstruct", operator, source, target, *options]
    command += ["--lambda-reg", str(weight), "--truth", truth, "--rtol", "3e-4"]
    assert main(command) == 0
    assert load(target).shape == photograph(channels).shape
    error = np.square(load(target) - photograph(channels)).mean()
    psnr = float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0])
    assert psnr == pytest.approx(-10 * np.log10(error), abs=0.2)
    assert psnr > 18
    other = str(tmp_path / "other.npy")
    for extra in (["--lambda-reg", "5"], ["--sigma-model", "60"]):
        main([*command[:3], other, *command[4:], *extra])
        assert not np.allclose(load(target), load(other), atol=1e-3)


@pytest.mark.parametrize(
    ("corner", "coils"),
    [
        (False, 1),
        pytest.param(False, 4, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
        (True, 4),
    ],
)
def test_k_space_is_reconstructed(tmp_path, capsys, coils, corner):
    x = photograph(size=(16, 18)).astype(complex)
    # Rows plus columns alone would have a spectrum of zeros off the axes.
    x += 0.02 * np.random.default_rng(0).normal(size=x.shape)
    mask = line_mask((16, 18), 2, 0.3).numpy()
    maps = birdcage_maps(coils, (16, 18)).numpy()
    images = x * maps if coils > 1 else x
    if corner:
        mask = np.fft.fftshift(mask)
        y = mask * np.fft.fft2(images, norm="ortho")
    else:
        shifted = np.fft.fft2(np.fft.ifftshift(images, (-2, -1)), norm="ortho")
        y = mask * np.fft.fftshift(shifted, (-2, -1))
    np.savez(tmp_path / "data.npz", y=y, mask=mask, maps=maps)
    np.save(tmp_path / "x.npy", x)
    data, target = str(tmp_path / "data.npz"), str(tmp_path / "x_hat.npy")
    command = ["reconstruct", "mri", data + ":y", target, "--lambda-reg", "0.01"]
    command += ["--coil-maps", data + ":maps"] if coils > 1 else []
    command += ["--zero-frequency", "corner"] if corner else []
    command += ["--truth", str(tmp_path / "x.npy"), *FAST]
    figure = str(tmp_path / "figure.png")
    assert main([*command, "--mask", data + ":mask", "--figure", figure]) == 0
    given = load(target)
    assert given.dtype == np.complex64 and given.shape == x.shape
    psnr = float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0])
    assert psnr > 20
    assert main(command) == 0  # the mask is where y is not zero
    np.testing.assert_allclose(load(target), given, atol=1e-4)
    command += ["--rtol", "0.3"]  # enough for what follows
    assert main([*command, "--complex-mode", "real"]) == 0
    assert np.abs(load(target).imag).max() == 0 < np.abs(given.imag).max()
    picture = str(tmp_path / "x_hat.png")
    assert main([picture if part == target else part for part in command]) == 0
    assert load(picture).max() == 255
    assert "White in" in capsys.readouterr().out


def test_bad_measurements_are_named(tmp_path, capsys):
    y = save(tmp_path / "y.npy", noisy())
    small = save(tmp_path / "m.npy", np.ones((3, 3)))
    zero = save(tmp_path / "zero.npy", np.zeros(SIZE))
    three = save(tmp_path / "three.npy", np.zeros((3, *SIZE), complex))
    plane = save(tmp_path / "plane.npy", np.ones(SIZE, complex))
    ones = save(tmp_path / "ones.npy", np.ones(SIZE))
    for command, words in [
        (["inpainting", y, "--mask", small], "--mask has shape"),
        (["inpainting", y, "--mask", zero], "zero everywhere"),
        (["blur", y, "--kernel", zero], "positive sum"),
        (["blur", y, "--kernel", three], "real matrix"),
        (["blur", y, "--kernel", "gaussian:x"], "positive number"),
        (["blur", y, "--kernel", "none.npy"], "no file"),
        (["downsampling", y, "--factor", "0"], "--factor"),
        (["mri", y], "complex"),
        (["mri", three], "coils need --coil-maps"),
        (["mri", three, "--coil-maps", three], "Nothing was measured"),
        (["mri", plane, "--mask", small], "--mask has shape"),
        (["mri", three, "--mask", ones, "--coil-maps", plane], "--coil-maps have"),
        (["inpainting", y, "--mask", ones, "--truth", small], "--truth has shape"),
        (["inpainting", y, "--mask", y], "between zero and its largest"),
    ]:
        command.insert(2, str(tmp_path / "out.npy"))
        assert main(["reconstruct", *command]) == 2
        assert words in capsys.readouterr().err


# -- evaluate --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(2):
        save(tmp_path / "data" / f"{i}.png", noisy(sigma=0.02 * i, size=(20, 18)))
    return str(tmp_path / "data")


@pytest.mark.parametrize(
    ("task", "options", "rows", "words"),
    [
        ("denoising", [], 6, "DEAL 29.16"),
        ("denoising", ["--sigma", "10"], 2, "nothing at these"),
        ("super-resolution-x2", ["--sigma", "2.55"], 8, "gray instead of colour"),
        ("super-resolution-x3", ["--sigma", "2.55"], 8, "DEAL 26.20"),
        ("deblurring", ["--sigma", "2.55"], 4, "other kernels"),
        ("mri-single-coil-4x", ["--lambda-reg", "0.01"], 2, "DEAL 36.59"),
        ("mri-single-coil-8x", ["--lambda-reg", "0.01"], 2, "nothing at these"),
        ("mri-multi-coil-8x", ["--lambda-reg", "0.01"], 2, "simulated coil maps"),
    ],
)
def test_every_task_runs_and_is_put_beside_what_was_published(
    folder, tmp_path, capsys, task, options, rows, words
):
    table = str(tmp_path / "scores.csv")
    command = ["evaluate", "--task", task, "--data", folder, "--csv", table, *options]
    assert main([*command, "--rtol", "0.5"]) == 0
    with open(table, newline="") as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == rows
    assert all(float(s["psnr"]) > 5 and 0 < float(s["ssim"]) < 1 for s in scores)
    out = capsys.readouterr().out
    assert words in out
    assert "NOT the published setting" in out or "nothing at" in out


def test_the_weight_can_be_tuned_on_other_images(folder, capsys):
    command = ["evaluate", "--task", "mri-single-coil-4x", "--data", folder]
    command += ["--rtol", "0.3"]
    assert main(command) == 2
    assert "--tune" in capsys.readouterr().err
    assert main([*command, "--tune", folder]) == 0
    assert "lambda_reg" in capsys.readouterr().err
    assert main([*command, "--tune", folder, "--lambda-reg", "1"]) == 2
    assert main([*command, "--tune", folder, "--beta", "1"]) == 2
    assert main([*command, "--lambda-reg", "1", "--beta", "1"]) == 2
    assert "beta is for dictionaries" in capsys.readouterr().err
    assert main([*command, "--kernel", "square:3"]) == 2
    assert "--kernel is for" in capsys.readouterr().err
    assert main(["evaluate", "--data", folder, "--method", "tv"]) == 2
    assert "give --tune DIR" in capsys.readouterr().err


def test_operators_of_a_task_are_chosen_by_name(folder, capsys):
    command = ["evaluate", "--data", folder, "--task", "super-resolution-x4"]
    command += ["--method", "adjoint", "--sigma", "2.55"]
    assert main([*command, "--only", "blur 1."]) == 0
    out = capsys.readouterr().out
    assert "some operators only" not in out  # nothing was published for it
    assert [line.split("  ")[-1] for line in out.splitlines()[1:4]] == [
        "blur 1.2",
        "blur 1.6",
        "mean",
    ]
    assert main([*command, "--only", "motion"]) == 2
    assert "'motion' fits none of blur 0.7, blur 1.2" in capsys.readouterr().err


def test_only_the_centre_of_every_image_is_evaluated_on_request(folder, capsys):
    command = ["evaluate", "--data", folder, "--method", "adjoint", "--sigma", "25"]
    psnr = {}
    for crop in ("16", "9999", None):
        assert main([*command, *([] if crop is None else ["--crop", crop])]) == 0
        out = capsys.readouterr().out
        assert ("cropped images" in out) == (crop == "16")
        psnr[crop] = out.splitlines()[1].split()[2:4]
    assert psnr["16"] != psnr["9999"] == psnr[None]
    assert main([*command, "--crop", "5"]) == 2
    assert "--crop must be at least 16, got 5" in capsys.readouterr().err


def test_a_crop_does_not_undo_that_of_the_task(tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 256, (260, 262), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    command = ["evaluate", "--data", str(tmp_path), "--task", "super-resolution-x2"]
    command += ["--method", "adjoint", "--sigma", "2.55", "--only", "blur 0.7"]
    said = []
    for crop in ([], ["--crop", "258"]):
        assert main([*command, *crop]) == 0
        said.append(capsys.readouterr().out.split("s/image")[1].split("blur")[0])
        said[-1] = said[-1].split()[:4]
    assert said[0] == said[1]


@pytest.mark.parametrize("method", ["tv", "adjoint"])
def test_rivals_are_evaluated_by_the_same_protocol(folder, method, capsys):
    command = ["evaluate", "--data", folder, "--method", method, "--sigma", "25"]
    assert main([*command, "--rtol", "1"]) == 2
    assert f"--rtol is for models, not for --method {method}" in capsys.readouterr().err
    if method == "adjoint":
        assert main([*command, "--tune", folder]) == 2
        assert "no weight" in capsys.readouterr().err
    if method == "tv":
        command += ["--lambda-reg", "0.08"]
    assert main(command) == 0
    psnr = float(capsys.readouterr().out.splitlines()[1].split()[2])
    assert (15 < psnr < 21) if method == "adjoint" else psnr > 21


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    """Weights files of the models that are not DEAL."""
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    priors = {
        "smooth-plus-sparse": SmoothPlusSparsePrior(
            num_atoms=8, patch_size=4, num_free_atoms=4
        ),
        "patch-synthesis": PatchSynthesisPrior(8, 4),
        "mmr": MMRPrior(3),
        "safi": SAFIPrior(3),
    }
    for name, prior in priors.items():
        weights_of.save(prior, path / f"{name}.safetensors")
    return path


@pytest.mark.parametrize(
    "name", ["smooth-plus-sparse", "patch-synthesis", "mmr", "safi"]
)
def test_the_weights_tell_the_model(folder, other_weights, tmp_path, name, capsys):
    weights = str(other_weights / f"{name}.safetensors")
    command = ["evaluate", "--data", folder, "--sigma", "25", "--pretrained", weights]
    table = tmp_path / "scores.csv"
    command += ["--csv", str(table), "--rtol", "0.05"]
    psnr = []
    l1 = name in ("mmr", "safi")
    solver = [] if l1 else [["--solver", "ipalm"]]
    for own in ([], ["--method", name], ["--lambda-reg", "0.02"], *solver):
        assert main([*command, *own]) == 0
        with open(table, newline="") as file:
            psnr.append([float(row["psnr"]) for row in csv.DictReader(file)])
    assert min(map(min, psnr)) > 15
    assert psnr[0] == psnr[1] and psnr[0] not in psnr[2:]
    if l1:
        assert main([*command, "--solver", "admm"]) == 0
    assert main([*command, "--solver", "none"]) == 2
    assert "solver='none' is no method of" in capsys.readouterr().err
    assert main([*command, "--method", "deal"]) == 2
    assert "is not a weights file of DEALPrior" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smooth-plus-sparse", "mmr"])
def test_other_models_denoise_and_reconstruct(
    folder, other_weights, tmp_path, name, capsys
):
    weights = ["--pretrained", str(other_weights / f"{name}.safetensors")]
    weights += ["--rtol", "0.1"]
    figure = tmp_path / "figure.png"
    out = str(tmp_path / "out.npy")
    source = str(next(Path(folder).iterdir()))
    command = ["denoise", source, out, *weights, "--figure", str(figure)]
    assert main([*command, "--sigma", "25"]) == 0
    said = capsys.readouterr()
    assert ("inner iterations" in said.out) == (name == "mmr")
    assert figure.stat().st_size > 1000
    assert not np.array_equal(np.load(out), load(source) / 255)
    assert main([*command, "--sigma", "10"]) == 0
    rescaled = "rescaled to sigma=0.03922" in capsys.readouterr().err
    assert rescaled == (name == "mmr")
    assert main([*command, "--sigma", "estimate"]) == 2
    assert "needs a number" in capsys.readouterr().err
    blur = ["reconstruct", "blur", source, out, "--kernel", "gaussian:1", *weights]
    assert main(blur) == (2 if name == "mmr" else 0)
    if name == "mmr":
        assert "lambda_reg is missing" in capsys.readouterr().err
    denoised = np.load(out)
    known = save(tmp_path / "known.png", np.ones((20, 18)))
    inpainting = ["reconstruct", "inpainting", source, out, "--mask", known, *weights]
    assert main([*inpainting, "--lambda-reg", "0.3"]) == 0
    assert not np.allclose(np.load(out), denoised)


OWN = """
import torch
from deepinv_deal.operators import MultiConv
from deepinv_deal.priors import AttentiveQuadratic, AttentiveQuadraticPrior


class EdgeStopping(AttentiveQuadraticPrior):
    def __init__(self, filters=2, contrast=0.3):
        super().__init__()
        self.filters = filters
        self.W = MultiConv((1, filters), kernel_size=3)
        self.contrast = torch.nn.Parameter(torch.tensor(contrast))

    def regularizer(self, sigma):
        W, c = self.W.operator(), self.contrast + sigma[:, None, None, None]
        return AttentiveQuadratic(W, lambda x: 1 / (1 + (W(x) / c).square()))
"""


def test_training_from_weights_takes_their_size_and_a_small_rate(
    folder, tmp_path, capsys
):
    source, run = tmp_path / "three.safetensors", tmp_path / "run"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights_of.save(DEALPrior(num_filters=3), source)
    train = ["train", "deal", "--data", folder, "--out", str(run), "--device", "cpu"]
    train += ["--steps", "2", "--val-every", "1", "--batch-size", "2", "--pool", "2"]
    train += ["--patch-size", "10", "--val-size", "16", "--init", str(source)]
    assert main(train) == 0
    said = capsys.readouterr().out
    assert "--lr 0.0002, --num-filters 3" in said
    assert weights_of.load(run / "best.safetensors", DEALPrior).num_filters == 3
    assert main(train) == 0  # resumes with the same settings
    assert "complete" in capsys.readouterr().out
    # A rate that spoils them: the best weights are those at the start.
    spoil = [*train, "--restart", "--init", "deal_gray", "--lr", "10", "--warmup", "0"]
    assert main(spoil) == 0
    said = capsys.readouterr().out
    assert "is there already" in said and "No step was better" in said
    assert "--num-filters 32" in said and "--lr" not in said.split(".")[0]
    assert weights_of.load(run / "best.safetensors", DEALPrior).num_filters == 32


def test_colour_from_gray_weights_takes_three_times_their_filters(
    folder, tmp_path, capsys
):
    run = tmp_path / "run"
    train = ["train", "deal", "--data", folder, "--out", str(run), "--device", "cpu"]
    train += ["--steps", "1", "--val-every", "1", "--batch-size", "1", "--pool", "1"]
    train += ["--patch-size", "10", "--val-size", "16", "--in-channels", "3"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights_of.save(DEALPrior(num_filters=2), tmp_path / "two.safetensors")
    assert main([*train, "--init", str(tmp_path / "two.safetensors")]) == 0
    assert "--num-filters 6" in capsys.readouterr().out
    trained = weights_of.load(run / "best.safetensors", DEALPrior)
    assert (trained.in_channels, trained.num_filters) == (3, 6)


def test_a_regularizer_of_ones_own_is_trained_and_evaluated(folder, tmp_path, capsys):
    source, run = tmp_path / "own.py", tmp_path / "run"
    source.write_text(OWN)
    prior = ["--prior", f"{source}:EdgeStopping"]
    train = ["train", "deal", "--data", folder, "--out", str(run), *prior]
    train += ["--steps", "2", "--val-every", "2", "--batch-size", "2", "--pool", "2"]
    train += ["--patch-size", "10", "--val-size", "16", "--device", "cpu"]
    assert main(train) == 0
    kind = load_class(f"{source}:EdgeStopping")
    weights = tmp_path / "own.safetensors"
    own = weights_of.load(run / "best.safetensors", kind)
    assert (own.filters, type(own).__name__) == (2, "EdgeStopping")
    with torch.no_grad():
        own.kappa.coefficients.fill_(2.0)
    weights_of.save(own, weights)

    def psnr(*options):
        table = tmp_path / "scores.csv"
        command = ["evaluate", "--data", folder, "--sigma", "25", "--rtol", "0.05"]
        command += ["--pretrained", str(weights), *options, "--csv", str(table)]
        assert main(command) == 0
        with table.open() as file:
            return [float(row["psnr"]) for row in csv.DictReader(file)]

    first = psnr(*prior)
    with torch.no_grad():
        own.kappa.coefficients.fill_(0.1)
    weights_of.save(own, weights)
    assert psnr(*prior) != first
    target = str(tmp_path / "out.npy")
    picture = str(next(Path(folder).iterdir()))
    command = ["denoise", picture, target, "--sigma", "25"]
    assert main([*command, "--pretrained", str(weights), *prior]) == 0
    # Nothing is imported on the word of a file, and misuse is named.
    capsys.readouterr()
    for options, message in (
        (["--pretrained", str(weights)], "--prior FILE.py:EdgeStopping"),
        (prior, "needs --pretrained"),
        ([*prior, "--pretrained", "deal_gray"], "not of a EdgeStopping"),
        (
            ["--prior", f"{source}:Nothing", "--pretrained", str(weights)],
            "has no class 'Nothing'",
        ),
        (["--prior", "no.py:X", "--pretrained", str(weights)], "does not exist"),
        (["--prior", "no_module:X", "--pretrained", str(weights)], "FILE.py:CLASS"),
        (["--prior", "pathlib:Path", "--pretrained", str(weights)], "a subclass of"),
    ):
        assert main(["evaluate", "--data", folder, *options]) == 2
        assert message in capsys.readouterr().err
    command = ["train", "deal", "--data", folder, "--out", str(run / "b")]
    assert main([*command, "--prior", "pathlib:Path"]) == 2
    assert "must be an AttentiveQuadraticPrior" in capsys.readouterr().err


def test_a_method_without_weights_is_named(folder, capsys):
    command = ["evaluate", "--data", folder, "--method", "smooth-plus-sparse"]
    assert main(command) == 2
    assert "needs --pretrained: cpr_5" in capsys.readouterr().err
    assert main(["evaluate", "--data", folder, "--pretrained", "weights.pth"]) == 2
    said = capsys.readouterr().err
    assert "does not say which model it is for" in said and "add --method deal" in said
    assert main(["evaluate", "--data", folder, "--pretrained", "no.safetensors"]) == 2
    assert "'no.safetensors' does not exist" in capsys.readouterr().err


def test_a_solver_of_other_models_is_named(folder, capsys):
    assert main(["evaluate", "--data", folder, "--solver", "fista"]) == 2
    assert "solver='fista' is no method of DEAL" in capsys.readouterr().err


def test_an_inner_precision_is_for_deal(folder, tmp_path, capsys):
    command = ["evaluate", "--data", folder, "--sigma", "25"]
    precision = ["--inner-dtype", "bfloat16"]
    assert main([*command, "--pretrained", "cpr_25", *precision]) == 2
    assert "--inner-dtype is for DEAL" in capsys.readouterr().err
    assert main([*command, "--method", "adjoint", *precision]) == 2
    assert "--inner-dtype is for models" in capsys.readouterr().err
    scores = {}
    for name, options in {"plain": [], "fast": precision}.items():
        assert main([*command, *options, "--csv", str(tmp_path / name)]) == 0
        with (tmp_path / name).open() as file:
            scores[name] = [float(row["psnr"]) for row in csv.DictReader(file)]
    assert scores["fast"] == pytest.approx(scores["plain"], abs=5e-3)
    assert scores["fast"] != scores["plain"]


def test_the_demo_runs_and_draws(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert main(["demo", "--size", "16", "--out", str(picture), *FAST]) in (0, 1)
    assert "reconstruction" in capsys.readouterr().out
    assert picture.stat().st_size > 5000


def test_the_package_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["deepinv-deal", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("deepinv_deal", run_name="__main__")
    assert end.value.code == 0
    assert "demo" in capsys.readouterr().out
