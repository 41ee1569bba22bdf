"""The comparison of solvers: it must count right and favour nobody."""

from __future__ import annotations

import math

import pytest
import torch
from problems import images

from deepinv_deal import DEAL
from deepinv_deal.evaluation import (
    SPEED_TASKS,
    application_times,
    compare_speed,
    deepinv_model,
    plot_speed,
    speed_table,
    write_speed_csv,
)
from deepinv_deal.priors import DEALPrior

IMAGE = (255 * images(1, 1, 16, 16)[0]).clamp(0, 255).round().byte()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return DEAL(pretrained=None, num_filters=4, warn=False)


@pytest.fixture(scope="module")
def runs(model):
    names = ["denoising", "inpainting"]
    return compare_speed(model, IMAGE, names, time_limit=1.0, progress=False)


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
        assert len(psnr) >= 3
        assert max(psnr) - min(psnr) < 0.05


def test_applications_are_counted(model):
    (run,) = compare_speed(
        model, IMAGE, ["denoising"], targets=[1e-4], solvers=["deepinv_deal"]
    )
    x = SPEED_TASKS["denoising"].ground_truth(IMAGE)
    y, physics = SPEED_TASKS["denoising"].conditions[0].measure(x)
    same = DEAL(
        prior=model.prior[0], pretrained=None, scale=None, max_iter=run.n_iter, rtol=0.0
    )
    same.warn = False
    with torch.no_grad():
        x_hat, info = same(y, physics, return_info=True, sigma=25 / 255)
    # One application for each conjugate gradient step, and one to pose each system.
    # Without a tolerance the last solves are more accurate, so there are some more.
    assert run.applications <= int(info.cg_iter) + run.n_iter + 1
    assert run.applications >= 2 * run.n_iter
    assert run.masks == run.n_iter


def test_a_run_that_takes_too_long_is_stopped(model):
    runs = compare_speed(
        model, IMAGE, ["denoising"], targets=[1e-7], time_limit=0.0, reference=False
    )
    for run in runs:
        if run.solver != "deepinv TV":
            assert not run.reached and run.n_iter == 1
            assert math.isnan(run.distance)
    assert "> the target was not reached" in speed_table(runs)


def test_mri_is_not_asked_of_deepinv(model):
    runs = compare_speed(
        model, IMAGE, ["mri"], targets=[1e-2], reference=False, time_limit=1.0
    )
    assert {run.solver for run in runs} == {
        "deepinv_deal",
        "published iteration",
        "deepinv TV",
    }


def test_table_file_and_figure(runs, tmp_path):
    table = speed_table(runs)
    assert table.count("deepinv.models.DEAL") == 4 and "inpainting" in table
    write_speed_csv(runs, tmp_path / "runs.csv")
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + len(runs) and "path" not in lines[0]
    figure = plot_speed(runs)
    assert [axis.get_title() for axis in figure.axes] == ["denoising", "inpainting"]
    assert len(figure.axes[0].lines) == 3


def test_unknown_names_are_named(model):
    with pytest.raises(ValueError, match="tasks must be among denoising.*'blur'"):
        compare_speed(model, IMAGE, ["blur"])
    with pytest.raises(ValueError, match="solvers must be among.*'fast'"):
        compare_speed(model, IMAGE, solvers=["fast"])


def test_times_of_single_applications(model):
    times = application_times(model, 24, repeats=2)
    assert min(times.normal, times.plain, times.mask) > 0
