"""What all trainings share: exact resume, a loss that falls, files, the command."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from problems import OwnPrior
from trainers import KINDS, SMALL, options, take, weights_after

from deepinv_deal.cli import main
from deepinv_deal.training import AttentiveQuadraticTrainer, DEALRecipe, engine


# MMR and NCPR run the code of SAFI and CPR.
@pytest.fixture(
    params=[
        pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("mmr", "ncpr")))
        for kind in KINDS
    ]
)
def name(request):
    return request.param


def test_resuming_gives_the_weights_of_an_uninterrupted_run_bit_for_bit(
    folder, tmp_path, name
):
    kind = KINDS[name]
    same = {"steps": 3}  # the third takes a batch of the first again, from the file
    whole = kind.start(folder, tmp_path / "whole", **same)
    whole.train()
    interrupted = kind.start(folder, tmp_path / "parts", **same)
    take(interrupted, 2)
    interrupted.save()
    resumed = kind.start(folder, tmp_path / "parts", resume=True, **same)
    assert resumed.step == 2
    resumed.train()
    for key, value in whole.prior.state_dict().items():
        assert torch.equal(value, resumed.prior.state_dict()[key]), key


def test_other_images_refuse_to_resume(folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    KINDS["deal"].start(images, tmp_path / "run").save()
    assert KINDS["deal"].start(images, tmp_path / "run", resume=True).step == 0
    shutil.move(images, tmp_path / "moved")  # the same images elsewhere are no others
    KINDS["deal"].start(tmp_path / "moved", tmp_path / "run", resume=True)
    image = Image.fromarray(np.full((40, 40), 99, dtype=np.uint8))
    image.save(tmp_path / "moved" / "one_more.png")
    with pytest.raises(ValueError, match=r"has changed.*\d+ images, checksum"):
        KINDS["deal"].start(tmp_path / "moved", tmp_path / "run", resume=True)


def test_a_few_steps_lower_the_loss_on_the_same_patches(folder, tmp_path, name):
    same = {"steps": 1000, "pool": 1, "reuse": 1000, "lr": 0.02}
    training = KINDS[name].start(folder, tmp_path, **same)
    if name in ("safi", "mmr"):  # they start well, so make it too smooth
        training.prior.lambda_reg.data.mul_(5)
    if name == "mmr":  # and the potential nearly linear
        training.prior.potential.scale.data.fill_(0.1)
    losses = take(training, 10)
    assert min(losses[-3:]) < (0.9 if name == "deal" else 0.99) * losses[0]


def test_weights_files_give_the_model_that_was_trained(folder, tmp_path, name):
    kind = KINDS[name]
    trainer = kind.start(folder, tmp_path)
    take(trainer, 2)
    trainer.save_prior(tmp_path / "weights.safetensors", {})
    y = torch.rand(1, 1, 16, 17, generator=torch.Generator().manual_seed(0))
    loaded = kind.model(pretrained=tmp_path / "weights.safetensors", warn=False)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(y, sigma=0.1),
            trainer.new_model(trainer.prior)(y, sigma=0.1),
            rtol=0,
            atol=0,
        )
    other = next(k for k in KINDS.values() if k.model is not kind.model)
    with pytest.raises(ValueError, match="is not a weights file of"):
        other.model(pretrained=tmp_path / "weights.safetensors")


def test_the_help_has_no_markup(capsys, name):
    with pytest.raises(SystemExit):
        main(["train", name, "--help"])
    out = capsys.readouterr().out
    assert "learning rate" in out
    assert not set(out) & set("`\\")


def test_a_validation_that_fails_does_not_become_the_best(folder, tmp_path):
    trainer = KINDS["deal"].start(folder, tmp_path)
    trainer.best = 10.0
    info = SimpleNamespace(n_iter=torch.ones(1), succeeded=torch.zeros(1))
    trainer.new_model = lambda _: lambda y, **_: (torch.nan * y, info)
    trainer._validate(0.0)
    assert trainer.best == 10.0
    trainer.new_model = lambda _: lambda y, **_: (y, info)
    trainer._validate(0.0)
    assert trainer.best > 10.0 and (tmp_path / "best.safetensors").exists()


def test_without_a_bar_lines_tell_how_far_the_training_is(
    folder, tmp_path, capsys, monkeypatch
):
    kind = KINDS["deal"]
    trainer = kind.start(folder, tmp_path / "silent", steps=3)
    trainer.train()
    assert "%: loss" not in capsys.readouterr().out
    monkeypatch.setattr(engine, "TELL_EVERY", 0.0)
    trainer = kind.start(folder, tmp_path / "told", steps=3)
    trainer.train()
    out = capsys.readouterr().out
    assert "step 1, " in out and "33%: loss" in out
    assert "100%: loss" not in out  # the validation tells it


def test_the_noise_level_is_given_in_gray_levels(folder, tmp_path, capsys):
    settings = SMALL | {"steps": 1, "num_filters": 3}
    folders = [f"--data={folder}", f"--out={tmp_path}"]
    command = ["train", "mmr", *options(settings), *folders, "--sigma"]
    assert main([*command, "10"]) == 0
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["recipe"]["sigma"] == 10 / 255
    with pytest.raises(SystemExit):
        main([*command, "0.098"])
    assert "'0.098' is no noise level in gray levels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "deal", "--help"])
    assert "gray levels (of 255 for white) (default: 50)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_command_trains(folder, tmp_path, capsys, name):
    settings = SMALL | KINDS[name].settings | {"steps": 2}
    settings.pop("model", None)
    folders = [f"--data={folder}", f"--out={tmp_path}"]
    assert main(["train", name, *options(settings), *folders]) == 0
    assert "2 steps" in capsys.readouterr().out
    model = KINDS[name].model(pretrained=tmp_path / "best.safetensors")
    if "num_filters" in settings:
        assert model.prior.num_filters == settings["num_filters"]


def test_a_full_disk_keeps_the_last_checkpoint(folder, tmp_path, monkeypatch, capsys):
    kind = KINDS["deal"]
    trainer = kind.start(folder, tmp_path, checkpoint_every=0.0)
    take(trainer, 2)
    trainer.save()
    before = trainer.state_path.read_bytes()

    def fill_the_disk(state, path):
        path.write_bytes(b"the first half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match=r"state\.pt could not be written: No space left"):
        trainer.train()
    assert trainer.state_path.read_bytes() == before
    assert not trainer.state_path.with_suffix(".tmp").exists()
    command = ["train", "deal", f"--data={folder}", f"--out={tmp_path}"]
    settings = SMALL | kind.settings | {"checkpoint_every": 0}
    assert main([*command, *options(settings)]) == 2
    assert "make room" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    command = ["train", "deal", f"--data={folder}", f"--out={tmp_path / 'file'}"]
    assert main([*command, "--steps=1"]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_short_trainings_warm_up_and_are_saved_in_time(folder, tmp_path):
    def start(**changes):
        return KINDS["cpr"].start(folder, tmp_path, **({"steps": None} | changes))

    long = start(time_budget=7200.0, warmup=200)
    assert long.checkpoint_interval == 60
    short = start(time_budget=20.0, warmup=200)
    assert short.checkpoint_interval == 2
    rates = []
    for short.elapsed in (0.0, 1.0, 2.0):
        rates.append(short._learning_rate())
    assert rates[0] < rates[1] < rates[2]
    assert rates[2] > 0.9 * short.recipe.lr


class OwnTrainer(AttentiveQuadraticTrainer):
    def new_prior(self):
        return OwnPrior()


def test_a_regularizer_of_ones_own_is_trained_stored_and_taken_up(folder, tmp_path):
    def start(out, **changes):
        settings = SMALL | {"lr": 0.01} | changes
        return OwnTrainer(DEALRecipe(data=str(folder), out=str(out), **settings))

    first = start(tmp_path / "first")
    before = weights_after(first, 0)
    first.train()
    assert not torch.equal(weights_after(first, 0), before)
    last = str(tmp_path / "first" / "last.safetensors")
    second = start(tmp_path / "second", init=last)
    assert torch.equal(weights_after(second, 0), weights_after(first, 0))
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        start(tmp_path / "third", init="nowhere.safetensors")
    with pytest.raises(ValueError, match="not a weights file of DEALPrior"):
        KINDS["deal"].start(folder, tmp_path / "fourth", init=last)


@pytest.mark.parametrize("name", ["safi", "patch"])
def test_the_weight_is_chosen_anew_at_the_end(folder, tmp_path, name):
    same = {"steps": 1, "val_every": 1, "val_size": 12, "sigma": 0.2}
    training = KINDS[name].start(folder, tmp_path, **same)
    training.prior.lambda_reg.data.mul_(4)  # too large a weight
    best = training.train()
    (entry,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert best == training.best > json.loads(entry)["psnr_mean"]
    prior = training.load_prior(str(tmp_path / "best.safetensors"))
    assert prior.lambda_reg < training.prior.lambda_reg
    last = training.load_prior(str(tmp_path / "last.safetensors"))
    assert torch.equal(last.lambda_reg, training.prior.lambda_reg)
    # The command, repeated, does nothing.
    written = (tmp_path / "best.safetensors").read_bytes()
    again = KINDS[name].start(folder, tmp_path, resume=True, **same)
    assert again.train() == best
    assert (tmp_path / "best.safetensors").read_bytes() == written
