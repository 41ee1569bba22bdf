"""Training of DEAL: data from a seed, the published loss, exact resume."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import deepinv as dinv
import numpy as np
import pytest
import torch
from matplotlib import image
from PIL import Image
from problems import random_prior
from trainers import SMALL, SOLVE, options, stopping_at, weights_after

from deepinv_deal import DEAL, AdjointOptions
from deepinv_deal.cli import main
from deepinv_deal.problems import operator_term
from deepinv_deal.splines import LinearSpline
from deepinv_deal.training import (
    DEALRecipe,
    DEALTrainer,
    DenoisingSampler,
    color_from_gray,
    deal_loss,
    grow,
    load_image,
    load_images,
    mask_drift,
    plot_learning_curve,
)
from deepinv_deal.training.curve import read_log
from deepinv_deal.training.growth import OPPONENT_COLORS
from deepinv_deal.training.losses import LOG_WEIGHT
from deepinv_deal.weights import save

SETTINGS = SMALL | {
    "num_filters": 4,
    "patch_size": 16,
    "warmup": 2,
    "depth_min": 2,
    "depth_max": 4,
}


def recipe(folder, out, **changes):
    return DEALRecipe(data=str(folder), out=str(out), **(SETTINGS | changes))


# -- data ----------------------------------------------------------------------


def test_batches_depend_on_seed_and_index_only(folder):
    images = load_images(folder, 1)
    sampler = DenoisingSampler(images, 12, 0.2, seed=3)
    late = sampler.batch(7, 4)
    again = DenoisingSampler(images, 12, 0.2, seed=3).batch(7, 4)
    for name in ("x", "y", "sigma"):
        assert torch.equal(getattr(late, name), getattr(again, name))
    assert not torch.equal(late.x, sampler.batch(8, 4).x)
    assert not torch.equal(
        late.x, DenoisingSampler(images, 12, 0.2, seed=4).batch(7, 4).x
    )
    assert late.x.shape == (4, 1, 12, 12)
    assert late.x.min() >= 0
    assert late.x.max() <= 1
    assert late.sigma.max() <= 0.2


def test_sampling_leaves_the_global_random_state_alone(folder):
    state = torch.get_rng_state()
    DenoisingSampler(load_images(folder, 1), 12, 0.2).batch(0, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_noise_has_the_level_it_says():
    images = [torch.full((1, 64, 64), 128, dtype=torch.uint8)]
    problems = DenoisingSampler(images, 64, 0.2).batch(0, 8)
    measured = (problems.y - problems.x).flatten(1).std(1)
    torch.testing.assert_close(measured, problems.sigma, rtol=0.1, atol=0)


def test_noise_levels_are_skewed_on_request(folder):
    images = load_images(folder, 1)

    def levels(skew):
        sampler = DenoisingSampler(images, 8, 0.2, 0, skew)
        return torch.cat([sampler.batch(i, 1).sigma for i in range(99)])

    plain, skewed = levels(1.0), levels(2.0)
    torch.testing.assert_close(skewed, 0.2 * (plain / 0.2) ** 2)
    assert (skewed < plain).all()


def test_gray_follows_matlab_and_colour_is_kept(tmp_path):
    rgb = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 13
    Image.fromarray(rgb).save(tmp_path / "c.png")
    weights = [0.298936021, 0.587043074, 0.114020904]
    expected = np.rint(rgb.astype(float) @ weights)
    np.testing.assert_array_equal(load_image(tmp_path / "c.png", 1)[0], expected)
    np.testing.assert_array_equal(
        load_image(tmp_path / "c.png", 3).permute(1, 2, 0), rgb
    )


def test_bad_data_is_named(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"data folder '.*nowhere' does not exist"
    ):
        load_images(tmp_path / "nowhere", 1)
    with pytest.raises(FileNotFoundError, match="No image found"):
        load_images(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png is not a readable image"):
        load_images(tmp_path, 1)
    with pytest.raises(ValueError, match=r"Image 0 has size \(30, 40\).*patch_size=31"):
        DenoisingSampler(load_images(folder, 1), 31, 0.2)


def test_bad_settings_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="Give steps or time_budget"):
        recipe(folder, tmp_path, steps=None)
    with pytest.raises(ValueError, match="steps must be positive, got -1"):
        recipe(folder, tmp_path, steps=-1)
    with pytest.raises(ValueError, match="pool must be positive, got 0"):
        recipe(folder, tmp_path, pool=0)
    with pytest.raises(ValueError, match="gamma must not be negative, got -1"):
        recipe(folder, tmp_path, gamma=-1)
    with pytest.raises(ValueError, match="sigma_max must be below 1"):
        recipe(folder, tmp_path, sigma_max=50)


# -- loss ----------------------------------------------------------------------


def test_the_loss_is_equation_12(rng):
    x_hat, x = torch.rand(2, 3, 1, 5, 4, generator=rng, dtype=torch.float64)
    mask, previous = torch.rand(2, 3, 6, 5, 4, generator=rng, dtype=torch.float64)
    spline = LinearSpline(5, 0, 2, init=lambda t: t**2).double()
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    loss = deal_loss(
        x_hat,
        x,
        mask,
        previous,
        [spline, spline],
        gamma=0.3,
        drift=0.7,
        weights=weights,
    )
    expected = 0.0
    for i in range(3):
        expected += float(weights[i]) * ((x_hat - x)[i] ** 2).sum() / 3
        expected += 0.7 / 6 * ((mask - previous)[i] ** 2).sum() / 3
    slopes = np.diff(np.linspace(0, 2, 5) ** 2) / 0.5
    expected += 0.3 * 2 * np.abs(np.diff(slopes)).sum()
    assert loss.item() == pytest.approx(float(expected), rel=1e-12)


# -- the loop ------------------------------------------------------------------


def weights_of(trainer):
    return {k: v.clone() for k, v in trainer.prior.state_dict().items()}


def test_training_starts_from_the_weights_asked_for(folder, tmp_path):
    first = DEALTrainer(recipe(folder, tmp_path / "first"))
    first.train()
    last = str(tmp_path / "first" / "last.safetensors")
    second = DEALTrainer(recipe(folder, tmp_path / "second", init=last, seed=1))
    for name, value in weights_of(first).items():
        torch.testing.assert_close(weights_of(second)[name], value, rtol=0, atol=0)
    assert second.step == 0


def test_a_grown_prior_reconstructs_as_before_and_trains(folder, tmp_path):
    small = random_prior(num_filters=4).float()
    # Without the new filters nothing has changed at all.
    same = DEAL(pretrained=None, prior=grow(small, 7, strength=0.0))
    y = torch.rand(2, 1, 24, 25, generator=torch.Generator().manual_seed(0))
    expected = DEAL(pretrained=None, prior=small)(y, sigma=0.1)
    torch.testing.assert_close(same(y, sigma=0.1), expected, rtol=0, atol=1e-6)
    weak = DEAL(pretrained=None, prior=grow(small, 7))(y, sigma=0.1)
    assert 0 < (weak - expected).norm() < 0.05 * (y - expected).norm()
    # New filters learn: every parameter of the grown prior has a gradient.
    save(small, tmp_path / "small.safetensors")
    grown = recipe(
        folder, tmp_path, num_filters=7, init=str(tmp_path / "small.safetensors")
    )
    trainer, again = DEALTrainer(grown), DEALTrainer(grown)
    for a, b in zip(trainer.prior.parameters(), again.prior.parameters(), strict=True):
        assert torch.equal(a, b), "the new filters come from the seed"
    trainer.train_step()
    new_filters = trainer.prior.W.weight[-1].grad[4:]
    assert (new_filters.flatten(1).norm(dim=1) > 0).all()
    with pytest.raises(ValueError, match="num_filters must be at least the prior's 4"):
        grow(small, 3)


def test_a_color_prior_made_from_gray_treats_opponent_colors_as_gray_images(rng):
    gray = random_prior(num_filters=4)
    gray.mask_network.scaling.coefficients.data.fill_(3.0)  # a straight line
    color = color_from_gray(gray, 12)
    mix = OPPONENT_COLORS
    torch.testing.assert_close(mix @ mix.T, torch.eye(3, dtype=torch.float64))
    y = torch.rand(2, 3, 22, 25, generator=rng, dtype=torch.float64)
    sigma = 15 / 255  # where brightness and hue are balanced

    def model(prior):
        return DEAL(pretrained=None, prior=prior, rtol=1e-9, scale=None)

    first, *others = torch.einsum("kc,bchw->kbhw", mix, y)[:, :, None]
    contrast = 3**0.5
    parts = [
        contrast * model(gray)(first / contrast, sigma=sigma / contrast),
        *[model(gray)(other, sigma=sigma) for other in others],
    ]
    expected = torch.einsum("kc,kbhw->bchw", mix, torch.cat(parts, 1).transpose(0, 1))
    torch.testing.assert_close(
        model(color)(y, sigma=sigma), expected, rtol=0, atol=1e-7
    )


def test_fewer_filters_for_hue_are_its_strongest():
    gray = random_prior(num_filters=4)
    for i in range(4):
        gray.W.weight[-1].data[i] *= (1.0, 9.0, 1.0, 5.0)[i]
    color = color_from_gray(gray, 8)
    kernels = gray.W.weight[-1].data
    torch.testing.assert_close(color.W.weight[-1].data[4:6, 8:16], kernels[[1, 3]])
    torch.testing.assert_close(color.W.weight[-1].data[6:8, 16:], kernels[[1, 3]])
    assert not color.W.weight[-1].data[4:6, :8].any()


@pytest.mark.parametrize("num_filters", [4, 7, 14])
def test_filters_that_cannot_be_shared_out_are_refused(num_filters):
    with pytest.raises(ValueError, match="num_filters must be 4 for brightness"):
        color_from_gray(random_prior(num_filters=4), num_filters)


def test_a_color_training_starts_from_a_gray_model(folder, tmp_path):
    gray = tmp_path / "gray.safetensors"
    save(random_prior(num_filters=4).float(), gray)
    trainer = DEALTrainer(
        recipe(folder, tmp_path, in_channels=3, num_filters=6, init=str(gray))
    )
    trainer.train_step()
    between = trainer.prior.W.weight[-1].grad[:4, 8:]  # brightness learns from hue
    assert (trainer.prior.in_channels, len(trainer.prior.W.weight[-1])) == (3, 6)
    assert between.any()


def test_a_gray_prior_that_does_not_regularize_makes_no_color_prior():
    prior = random_prior(num_filters=4)
    prior.kappa.coefficients.data.fill_(0.0)
    with pytest.raises(ValueError, match="prior must have positive .* kappa"):
        color_from_gray(prior, 12)


def test_color_is_made_of_gray_only():
    with pytest.raises(ValueError, match="got one for 3 channels"):
        color_from_gray(random_prior(3, num_filters=4), 8)


def test_initial_weights_of_another_model_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="num_filters=32, the recipe says 4"):
        DEALTrainer(recipe(folder, tmp_path / "out", init="deal_gray"))


@pytest.mark.slow
def test_a_training_killed_again_and_again_resumes_bit_for_bit(folder, tmp_path):
    steps = 150

    def command(out):
        settings = SETTINGS | {"steps": steps, "checkpoint_every": 0.0}
        return [
            sys.executable,
            "-c",
            "import sys; from deepinv_deal.cli import main; sys.exit(main())",
            *("train", "deal", "--threads=1", f"--data={folder}", f"--out={out}"),
            *options(settings),
        ]

    def done(out):
        file = tmp_path / out / "state.pt"
        return torch.load(file, weights_only=True)["step"] if file.exists() else 0

    moments = np.random.default_rng(0).uniform(0, 0.5, 20)
    for moment in moments:
        before = done("killed")
        process = subprocess.Popen(command(tmp_path / "killed"))
        while done("killed") == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    for out in ("killed", "whole"):
        subprocess.run(command(tmp_path / out), check=True)
        assert done(out) == steps
    states = [
        torch.load(tmp_path / out / "state.pt", weights_only=True)["prior"]
        for out in ("killed", "whole")
    ]
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key


def test_other_settings_refuse_to_resume(folder, tmp_path):
    DEALTrainer(recipe(folder, tmp_path)).save()
    with pytest.raises(ValueError, match=r"other settings \(lr: 0.002 -> 0.1\)"):
        DEALTrainer(recipe(folder, tmp_path, lr=0.1))
    assert DEALTrainer(recipe(folder, tmp_path, lr=0.1), resume=False).step == 0


def test_training_writes_a_log_and_the_best_weights(folder, tmp_path):
    trainer = DEALTrainer(recipe(folder, tmp_path))
    best = trainer.train()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2  # at steps 3 and 6
    picture = image.imread(tmp_path / "curve.png")
    assert picture[..., :3].std() > 0.05
    model = DEAL(pretrained=tmp_path / "best.safetensors")
    assert model.prior.num_filters == 4
    assert np.isfinite(best)


def log_of(path, *entries):
    path.mkdir(exist_ok=True)
    lines = [
        json.dumps({"step": step, "seconds": seconds, "psnr": psnr})
        for step, seconds, psnr in entries
    ]
    (path / "log.jsonl").write_text("\n".join(lines))
    return path


def test_learning_curve_shows_trainings_one_after_the_other(tmp_path):
    first = log_of(
        tmp_path / "first",
        (10, 3600, {"5": 36.0, "25": 27.0}),
        (20, 7100, {"5": 1.0, "25": 1.0}),  # lost in a kill, and done again
        (20, 7200, {"5": 36.5, "25": 27.1}),
    )
    second = log_of(tmp_path / "second", (40, 1800, {"25": 27.5, "5": 36.7}))
    figure = plot_learning_curve(first, second / "log.jsonl", gflop_per_step=0.5e6)
    low, high = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["noise 5/255", "noise 25/255"]
    assert [line.get_label() for line in low.lines] == ["first", "second"]
    assert low.lines[0].get_xydata().tolist() == [[1, 36], [2, 36.5]]
    assert low.lines[1].get_xydata().tolist() == [[2.5, 36.7]]
    assert high.lines[1].get_xydata().tolist() == [[2.5, 27.5]]
    # 60 steps of 0.5 PFLOP in 2.5 hours.
    (compute,) = low.child_axes
    assert compute._functions[0](2.5) == pytest.approx(30)
    assert not plot_learning_curve(first).axes[0].child_axes


def test_learning_curve_names_what_it_cannot_show(tmp_path):
    with pytest.raises(ValueError, match="at least one training"):
        plot_learning_curve()
    with pytest.raises(FileNotFoundError, match=r"no .*none.* at least one validation"):
        plot_learning_curve(tmp_path / "none")
    low = log_of(tmp_path / "low", (1, 1.0, {"5": 36.0}))
    high = log_of(tmp_path / "high", (1, 1.0, {"25": 28.0}))
    with pytest.raises(ValueError, match=r"common noise level, got .*low: 5; .*: 25"):
        plot_learning_curve(low, high)
    for bad in ("{}", '{"step": 1, "seconds": 2.0, "psnr": [3]}', '{"step": 1, "psn'):
        (low / "log.jsonl").write_text(bad)
        with pytest.raises(ValueError, match="is no log of a training"):
            plot_learning_curve(low)
    (low / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no validation"):
        plot_learning_curve(high, low)


def steps_of(log):
    return [entry["step"] for entry in read_log(log)]


def test_the_log_of_a_training_holds_that_training_only(folder, tmp_path):
    log = tmp_path / "log.jsonl"
    DEALTrainer(recipe(folder, tmp_path, val_every=2)).train()
    assert steps_of(log) == [2, 4, 6]
    DEALTrainer(recipe(folder, tmp_path), resume=False).train()
    assert steps_of(log) == [3, 6]
    # What came after the checkpoint comes again, and a line that was cut off is none.
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save(state | {"step": 4, "elapsed": 0.0}, tmp_path / "state.pt")
    with open(log, "a") as stream:
        stream.write('{"step": 9, "psn')
    DEALTrainer(recipe(folder, tmp_path, val_every=5)).train()
    assert steps_of(log) == [3, 5, 6]


def test_a_picture_that_cannot_be_drawn_does_not_end_a_training(folder, tmp_path):
    (tmp_path / "curve.png").mkdir()
    with pytest.warns(UserWarning, match=r"curve.png could not be drawn"):
        DEALTrainer(recipe(folder, tmp_path)).train()
    assert (tmp_path / "best.safetensors").exists()
    assert (tmp_path / "last.safetensors").exists()


def test_weights_better_than_those_of_the_checkpoint_are_kept(folder, tmp_path):
    best = tmp_path / "best.safetensors"
    trainer = DEALTrainer(recipe(folder, tmp_path, val_every=2))
    trainer.train()
    assert trainer.best_step == 6  # each validation was better than the one before
    before = best.read_bytes()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    old = {"step": 5, "elapsed": 0.0, "best": state["best"] - 1, "best_step": 4}
    torch.save(state | old, tmp_path / "state.pt")
    for _ in range(2):  # killed before the next checkpoint, too
        resumed = DEALTrainer(recipe(folder, tmp_path, val_every=2))
        assert resumed.best == pytest.approx(state["best"], abs=1e-4)
        resumed._prepare_log()
        assert steps_of(tmp_path) == [2, 4, 6]
    # Those of another training, which this one is to replace, do not count.
    (tmp_path / "log.jsonl").write_text("")
    assert DEALTrainer(recipe(folder, tmp_path, val_every=2)).best == old["best"]
    assert best.read_bytes() == before


def test_pictures_of_a_training_are_no_images_to_train_on(tmp_path, folder):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for out in (data / "run", data, tmp_path):  # below, the same, above
        first = DEALTrainer(recipe(data, out, val=str(data)), resume=False)
        first.train()
        assert (out / "curve.png").exists()
        again = DEALTrainer(recipe(data, out, val=str(data)))  # was: data has changed
        assert again.step == 6 and again.seen == first.seen
        shutil.rmtree(data / "run", ignore_errors=True)
        (out / "curve.png").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_every": 0}, "val_every must be positive"),
        ({"depth_min": 9, "depth_max": 3}, "depth_min must be from 1 to depth_max=3"),
        ({"warm_depth_min": 0}, "warm_depth_min must be from 1"),
    ],
)
def test_more_settings_that_cannot_be(folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        recipe(folder, tmp_path, **settings)


def test_a_damaged_checkpoint_and_a_small_image_are_named(folder, tmp_path):
    state = tmp_path / "state.pt"
    DEALTrainer(recipe(folder, tmp_path)).save()
    whole = state.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive"):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.pt is damaged .*--restart"):
            DEALTrainer(recipe(folder, tmp_path))
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    image.imsave(data / "small.png", np.zeros((8, 30)), cmap="gray")
    with pytest.raises(ValueError, match=r"small\.png has size \(8, 30\)"):
        DEALTrainer(recipe(data, tmp_path / "out", val=str(folder)))


def train(folder, out, **settings):
    """The weights after some steps."""
    # Accurate adjoints: Jacobian-free answers are the first rough ones.
    settings = {"steps": 100, "adjoint_rtol": 1e-4, **settings}
    return weights_after(DEALTrainer(recipe(folder, out, **settings), resume=False), 3)


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The weights after some steps with the usual settings."""
    return train(folder, tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"jacobian_free": False}, id="jacobian_free"),
        pytest.param({"balance": 0.0}, id="balance"),
        pytest.param({"logarithmic": True}, id="logarithmic"),
        pytest.param({"gamma": 1.0}, id="gamma"),
        pytest.param({"seed": 1}, id="seed"),
        pytest.param({"drift": 100.0}, id="drift"),
        pytest.param({"adjoint_rtol": 0.5}, id="adjoint_rtol"),
        pytest.param({"normalization": "exact"}, id="normalization"),
        pytest.param({"sigma_max": 0.1}, id="sigma_max"),
        pytest.param({"skew": 3.0}, id="skew"),
        pytest.param({"clip": 1e-3}, id="clip"),
        pytest.param({"lr": 1e-4}, id="lr"),
    ],
)
def test_each_setting_changes_the_training(folder, tmp_path, plain, change):
    assert not torch.equal(plain, train(folder, tmp_path, **change))


@pytest.mark.parametrize("times", [1, 2])
def test_an_iterate_that_is_not_finite_does_not_spoil_the_loss(
    folder, tmp_path, monkeypatch, times
):
    """The solver returns the iterate before it."""
    stub = stopping_at(1, *times * [torch.nan], kept=1)
    monkeypatch.setattr(SOLVE, stub)
    trainer = DEALTrainer(recipe(folder, tmp_path))
    problems = trainer.sampler.batch(0, 2)
    assert trainer.loss(problems, problems.y)[0].isfinite()


@pytest.mark.parametrize("kept", [0.5, 1])
def test_drift_is_that_of_the_last_step_even_if_it_was_none_to_keep(
    folder, tmp_path, monkeypatch, kept
):
    """The solver returns its best iterate, which may be the one before."""

    monkeypatch.setattr(SOLVE, stopping_at(1, 0.5, kept=kept))
    losses = []
    for drift in (0.0, 2.0):
        trainer = DEALTrainer(recipe(folder, tmp_path, drift=drift))
        problems = trainer.sampler.batch(0, 2)
        losses.append(trainer.loss(problems, problems.y)[0].detach())
    data = operator_term(problems.y)
    equation = trainer.prior.equation(data, sigma=problems.sigma)
    masks = [equation.regularizer.mask(a * problems.y).detach() for a in (0.5, 1)]
    change = mask_drift(*masks)
    assert (change > 0).all()
    torch.testing.assert_close(losses[1] - losses[0], 2 * change.mean())


def test_the_logarithmic_loss_has_the_gradient_of_the_logarithm(folder, tmp_path):
    found = {}
    for logarithmic in (False, True):
        settings = {"balance": 0.0, "gamma": 0.0, "drift": 0.0, "batch_size": 1}
        trainer = DEALTrainer(
            recipe(folder, tmp_path, logarithmic=logarithmic, **settings)
        )
        loss, _ = trainer.loss(trainer.sampler.batch(0, 1), None)
        loss.backward()
        gradient = torch.cat([w.grad.flatten() for w in trainer.prior.W.weight])
        found[logarithmic] = float(loss.detach()), gradient
    error, plain = found[False]
    value, logarithmic = found[True]
    assert value == pytest.approx(LOG_WEIGHT * np.log(error))
    torch.testing.assert_close(
        logarithmic, LOG_WEIGHT / error * plain, rtol=1e-3, atol=1e-5
    )


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(folder, tmp_path):
    trainer = DEALTrainer(recipe(folder, tmp_path))
    trainer.save()
    before = trainer.state_path.read_bytes()
    with torch.no_grad():
        trainer.prior.kappa.coefficients.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0.*kept"):
        trainer.train()
    assert trainer.state_path.read_bytes() == before


def test_gradients_that_are_not_finite_never_reach_the_checkpoint(
    folder, tmp_path, monkeypatch
):
    # The loss is finite and its gradient is not: the step would fill the weights with
    # NaN, and a checkpoint written after it would be lost for ever.
    trainer = DEALTrainer(recipe(folder, tmp_path, checkpoint_every=0.0))
    trainer.save()
    clip = torch.nn.utils.clip_grad_norm_

    def poison(parameters, *args, **kwargs):
        parameters = list(parameters)
        parameters[0].grad.fill_(float("nan"))
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poison)
    with pytest.raises(FloatingPointError, match=r"gradient.*step 0.*kept"):
        trainer.train()
    state = torch.load(trainer.state_path, weights_only=True)
    assert all(value.isfinite().all() for value in state["prior"].values())


def test_the_command_names_bad_input(tmp_path, capsys):
    arguments = ["train", "deal", "--data=nowhere", f"--out={tmp_path}", "--steps=1"]
    assert main(arguments) == 2
    assert "'nowhere' does not exist" in capsys.readouterr().err


def test_deal_trains_in_deepinvs_trainer(tmp_path):
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return {"x": x[i]}

    physics = dinv.physics.Inpainting((1, 8, 8), mask=0.5)
    # The masks of these weights are so steep that an exact adjoint need not converge.
    model = DEAL(
        prior=random_prior(1, 4, dtype=torch.float32),
        pretrained=None,
        rtol=1e-3,
        adjoint=AdjointOptions(jacobian_free=True),
        warn=False,
    )
    before = model.prior.W.weight[0].detach().clone()
    trainer = dinv.Trainer(
        model=model,
        physics=physics,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        train_dataloader=torch.utils.data.DataLoader(Data(), batch_size=1),
        losses=dinv.loss.SupLoss(),
        metrics=dinv.metric.PSNR(),
        epochs=1,
        online_measurements=True,
        save_path=None,
        verbose=False,
        show_progress_bar=False,
        device="cpu",
        non_blocking_transfers=False,
    )
    trainer.train()
    assert not torch.equal(model.prior.W.weight[0], before)
