"""The comparison of solvers: it must count right and favour nobody."""

from __future__ import annotations

import csv
import math
from collections import Counter
from functools import partial
from pathlib import Path

import deepinv as dinv
import numpy as np
import pytest
import torch
from PIL import Image
from problems import images

pytest.importorskip("speed", reason="the scripts are not part of this distribution")

from _common import (
    SPEED_TASKS,
    PeakMemory,
    application_times,
    deepinv_model,
    plain_normal,
)
from speed import SOLVERS, _Case, _Watch, compare_speed, main, picture, speed_table

from deepinv_deal import DEAL
from deepinv_deal.priors import AttentiveQuadratic, DEALPrior
from deepinv_deal.weights import save

IMAGE = (255 * images(1, 1, 16, 16)[0]).clamp(0, 255).round().byte()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return DEAL(pretrained=None, num_filters=4, warn=False)


@pytest.fixture(scope="module")
def runs(model):
    return [
        run
        for task in ("denoising", "inpainting")
        for run in compare_speed(model, IMAGE, task, time_limit=1e9)
    ]


@pytest.mark.parametrize("in_channels", [1, 3])
def test_deepinvs_model_gets_the_same_weights(in_channels):
    torch.manual_seed(1)
    prior = DEALPrior(in_channels, 6)
    inner = deepinv_model(prior).model
    x = images(1, in_channels, 20, 23).float()
    bound = prior.bind(0.1, x)
    with torch.no_grad():
        inner.W1.spectral_norm()
        inner.cal_scaling(torch.tensor([[25.5]]))
        torch.testing.assert_close(inner.W1(x), bound.W(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(inner.cal_mask(x), bound.mask(x), rtol=1e-4, atol=0)


def test_deepinvs_model_has_one_norm_rule():
    with pytest.raises(ValueError, match="norm rule 'published' only"):
        deepinv_model(DEALPrior(1, 4, "exact"))


def test_runs_end_where_the_target_is_reached(runs):
    for run in runs:
        if math.isnan(run.target):
            assert run.solver == "deepinv TV"
            continue
        assert run.reached == (run.residual <= run.target)
        *before, last = run.path
        assert last[0] == run.applications and last[2] == run.residual
        assert len(run.path) == run.n_iter
        if run.reached:
            assert all(residual > run.target for _, _, residual in before)
        work = [applications for applications, _, _ in run.path]
        assert work == sorted(work)


def test_this_package_reaches_every_target(runs):
    own = [run for run in runs if run.solver == "deepinv_deal"]
    assert [run.target for run in own] == [1e-3, 1e-5] * 2
    for run in own:
        assert run.reached
        # In denoising the inverse Jacobian is of order one.
        assert run.distance < 10 * run.target or run.task != "denoising"


def test_solvers_find_the_same_image(runs):
    for task in ("denoising", "inpainting"):
        psnr = [run.psnr for run in runs if run.task == task and run.residual < 1e-3]
        assert len(psnr) >= 2
        assert max(psnr) - min(psnr) < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_work_is_counted_and_judging_is_not(model, monkeypatch, solver):
    case = _Case(model, SPEED_TASKS["denoising"], IMAGE, reference=False)
    done, now = Counter(), 0.0

    def counted(form, name):
        method = getattr(form, name)

        def call(*args, **kwargs):
            done[name] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(form, name, call)

    def residual(self, x):
        """Takes long, and is content with the second iterate."""
        nonlocal now
        now += 1000.0
        done["looks"] += 1
        return float(done["looks"] < 2)

    def clock(self):
        nonlocal now
        now += 1.0
        return now

    counted(AttentiveQuadratic, "normal")
    counted(dinv.models.deal.MultiConv2d, "transpose")
    counted(dinv.models.deal.DEAL, "forward")
    monkeypatch.setattr(_Case, "residual", residual)
    monkeypatch.setattr(_Case, "clock", clock)
    watch = _Watch(case, solver, (1e-6,), time_limit=1e9)
    (run,) = watch.watch(partial(SOLVERS[solver], case))
    assert run.reached and run.n_iter == run.masks == 2
    assert 2 < run.applications < 500
    # deepinv's model applies its operator once more, for the norm.
    assert run.applications == done["normal"] + done["transpose"] - done["forward"]
    assert run.seconds < 100


def test_a_run_that_takes_too_long_is_stopped(model):
    runs = compare_speed(
        model, IMAGE, "denoising", targets=[1e-7], time_limit=0.0, reference=False
    )
    for run in runs:
        if run.solver != "deepinv TV":
            assert not run.reached and run.n_iter == 1
            assert math.isnan(run.distance)
    assert "> the target was not reached" in speed_table(runs)


def test_mri_is_not_asked_of_deepinv(model):
    runs = compare_speed(
        model, IMAGE, "mri", targets=[1e-2], reference=False, time_limit=1.0
    )
    assert {run.solver for run in runs} == {
        "deepinv_deal",
        "published iteration",
        "deepinv TV",
    }


def test_table_file_and_figure(model, tmp_path, capsys):
    weights, table = tmp_path / "w.safetensors", tmp_path / "runs.csv"
    save(model.prior, weights)
    args = ["--size", "20", "--task", "denoising", "--target", "1e-3", "--no-reference"]
    args += ["--csv", str(table), "--figure", str(tmp_path / "runs.png"), "--bfloat16"]
    assert main(["--pretrained", str(weights), *args]) == 0
    out = capsys.readouterr().out
    assert "One application of W^T M^2 W at 20 x 20" in out
    for solver in (*SOLVERS, "deepinv TV"):
        assert f"\n{solver} " in out
    with table.open() as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["denoising"] * 5
    assert (tmp_path / "runs.png").stat().st_size > 5000


def test_a_picture_that_is_too_small_is_named(tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(np.zeros((24, 20), np.uint8)).save(path)
    with pytest.raises(ValueError, match="at least 22 x 22 pixels"):
        picture(str(path), 22, 1)


def test_plain_convolutions_are_the_same_operator(model):
    prior, x = model.prior, images(1, 1, 21, 17).float()
    squared_mask = torch.rand(1, 4, 21, 17)
    with torch.no_grad():
        expected = prior.bind(0.1, x).normal(x, squared_mask)
        plain = plain_normal(prior.W)(x, squared_mask)
        torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-5)
    times = application_times(model, 24, repeats=2)
    assert min(times.normal, times.plain, times.mask) > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_is_that_of_what_runs_while_it_is_measured():
    """Twice, for what was freed once must not count as free."""
    for _ in range(2):
        memory = PeakMemory(torch.device("cpu"))
        memory.start()
        torch.ones(5_000_000)
        memory.stop()
        torch.ones(20_000_000)  # while it is off
        memory.start()
        memory.stop()
        assert 18 < memory.peak < 40
