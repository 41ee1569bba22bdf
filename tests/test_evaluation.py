"""The published protocols."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from deepinv.models import Reconstructor
from deepinv.optim import TVPrior
from problems import images, random_model
from scipy import ndimage
from scipy.io import savemat

from deepinv_deal import SmoothPlusSparse
from deepinv_deal._batch import central
from deepinv_deal.evaluation import (
    PUBLISHED,
    TASKS,
    Adjoint,
    Score,
    TotalVariation,
    add_noise,
    evaluate,
    make_kernel,
    summarise,
    tune_task,
)
from deepinv_deal.evaluation.tasks import birdcage_maps, line_mask
from deepinv_deal.files import read_array
from deepinv_deal.priors import SmoothPlusSparsePrior


def photograph(channels=1, height=20, width=22):
    x = images(1, channels, height, width, dtype=torch.float32)[0]
    return (x.clamp(0, 1) * 255).round().byte()


def seeded_noise(level, shape):
    return np.random.RandomState(0).normal(0, level / 255, shape)


@pytest.mark.parametrize("factor", [2, 3])
def test_super_resolution_is_the_degradation_of_dpir(factor):
    task = TASKS[f"super-resolution-x{factor}"]()
    assert len(task.conditions) == 12
    x = task.ground_truth(photograph(3))
    assert x.shape[-1] % factor == x.shape[-2] % factor == 0
    r = np.arange(25) - 12
    for condition in task.conditions[:4]:
        std = float(condition.setting.split()[1])
        kernel = np.exp(-(r[:, None] ** 2 + r**2) / (2 * std**2))
        expected = np.stack(
            [
                ndimage.convolve(c, kernel / kernel.sum(), mode="wrap")
                for c in x[0].double().numpy()
            ]
        )[:, ::factor, ::factor]
        y, _ = condition.measure(x)
        expected = expected + seeded_noise(2.55, expected.shape)
        np.testing.assert_allclose(y[0], expected, atol=1e-5)
        assert condition.lambda_reg == 0.28


def test_deblurring_convolves_circularly_with_the_kernel_of_a_file(tmp_path):
    kernel = np.random.default_rng(0).random((5, 7))
    np.savez(tmp_path / "k.npz", a=kernel, b=kernel[:3])
    file = f"{tmp_path / 'k.npz'}:a"
    task = TASKS["deblurring"](kernels=[file], noise=[7.65])
    (condition,) = task.conditions
    assert condition.setting == "k.npz:a 5x7" and condition.lambda_reg == 2.5
    x = task.ground_truth(photograph())
    y, _ = condition.measure(x)
    blurred = ndimage.convolve(
        x[0, 0].double().numpy(), kernel / kernel.sum(), mode="wrap"
    )
    expected = blurred + seeded_noise(7.65, (1, 20, 22))[0]
    np.testing.assert_allclose(y[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("coils", [1, 15])
def test_mri_transforms_masks_and_adds_noise(coils):
    task = TASKS["mri-single-coil-4x" if coils == 1 else "mri-multi-coil-8x"]()
    x = task.ground_truth(photograph(1, 40, 36))
    assert x.max() == 1 and not x[:, 1].any()
    y, physics = task.conditions[0].measure(x)
    sensitivity = birdcage_maps(coils, (40, 36)) if coils > 1 else torch.ones(1, 40, 36)
    mask = line_mask((40, 36), 4, 0.08) if coils == 1 else line_mask((40, 36), 8, 0.04)
    k = torch.fft.fft2(
        torch.fft.ifftshift(sensitivity * x[0, 0], (-2, -1)), norm="ortho"
    )
    k = mask * torch.fft.fftshift(k, (-2, -1))
    noise = torch.from_numpy(seeded_noise(0.51, y.shape[1:])).float()
    expected = torch.view_as_real(k).movedim(-1, 0).reshape(y.shape[1:]) + noise
    torch.testing.assert_close(y[0], expected, atol=1e-5, rtol=0)
    assert noise.std() == pytest.approx(0.002, rel=0.1)
    # The noise where nothing is sampled does not reach the image.
    sampled = y * (mask if coils == 1 else mask[None])
    torch.testing.assert_close(physics.A_adjoint(y), physics.A_adjoint(sampled))


def test_masks_have_a_centre_and_the_asked_share_of_lines():
    mask = line_mask((6, 400), 4, 0.08)
    assert mask.shape == (6, 400) and bool((mask == mask[0]).all())
    assert bool(mask[0, 184:216].all())
    assert float(mask.mean()) == pytest.approx(1 / 4, abs=0.04)


def test_coil_maps_are_normalised_and_differ():
    maps = birdcage_maps(5, (9, 11))
    torch.testing.assert_close(maps.abs().square().sum(0), torch.ones(9, 11))
    strongest = {tuple(divmod(int(m.abs().argmax()), 11)) for m in maps}
    assert len(strongest) == 5


def test_images_are_cropped_as_the_task_says():
    x = torch.arange(35.0).view(1, 1, 5, 7)
    assert torch.equal(central(x, 3), x[..., 1:4, 2:5])
    assert torch.equal(central(x, 9), x)
    assert TASKS["super-resolution-x3"]().ground_truth(
        photograph(1, 300, 260)
    ).shape[-2:] == (255, 255)  # fmt: skip
    assert TASKS["mri-single-coil-4x"]().compare(torch.zeros(1, 2, 330, 300)).shape == (
        1, 1, 320, 300,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["gaussian:1.5", "motion:9", "square:3"])
def test_built_in_kernels_sum_to_one(text):
    state = torch.get_rng_state()
    name, kernel = make_kernel(text)
    assert torch.equal(torch.get_rng_state(), state)
    assert name.startswith(text) and float(kernel.sum()) == pytest.approx(1)
    assert torch.equal(kernel, make_kernel(text)[1])


def test_evaluate_gives_the_published_settings_to_the_model():
    model = random_model(rtol=0.2).float()
    task = TASKS["super-resolution-x2"](noise=[7.65])
    data = [("a", photograph()), ("b", photograph(1, 18, 20))]
    scores = evaluate(model, task, data, progress=False)
    assert [s.lambda_reg for s in scores] == pytest.approx([2.5] * 8)
    assert [s.image for s in scores] == ["a", "b"] * 4
    x = task.ground_truth(data[1][1])
    y, physics = task.conditions[3].measure(x)
    with torch.no_grad():
        x_hat = model(y, physics, sigma=15 / 255, lambda_reg=2.5).clamp(0, 1)
    mse = float((x_hat - x).square().mean())
    assert scores[-1].psnr == pytest.approx(-10 * np.log10(mse), abs=1e-3)
    one, task = data[:1], replace(task, conditions=task.conditions[:1])
    other = evaluate(model, task, one, lambda_reg=0.1, sigma=30, progress=False)
    assert other[0].lambda_reg == pytest.approx(0.1)
    same_weight = evaluate(model, task, one, lambda_reg=0.1, progress=False)
    assert other[0].psnr != same_weight[0].psnr


def test_denoising_is_noisy_as_published_and_takes_the_level_from_there():
    model = random_model(rtol=1e-3).float()
    (condition,) = (task := TASKS["denoising"]([15])).conditions
    x = task.ground_truth(photograph())
    y, _ = condition.measure(x)
    torch.testing.assert_close(y, add_noise(x, 15 / 255))
    (score,) = evaluate(model, task, [("a", photograph())], progress=False)
    with torch.no_grad():
        x_hat = model(y, sigma=15 / 255).clamp(0, 1)
    mse = float((x_hat - x).square().mean())
    assert score.psnr == pytest.approx(-10 * np.log10(mse), abs=1e-3)


def test_what_is_missing_is_named():
    model = random_model(rtol=1e-2).float()
    with pytest.raises(ValueError, match="no image"):
        evaluate(model, TASKS["denoising"](), [])
    with pytest.raises(ValueError, match="No weight was published"):
        evaluate(model, TASKS["mri-single-coil-4x"](), [("a", photograph())])
    with pytest.raises(ValueError, match="No weight was published"):
        evaluate(model, TASKS["deblurring"](noise=[4]), [("a", photograph())])


def test_published_rows_fit_the_tasks():
    for row in PUBLISHED:
        levels = {c.noise for c in TASKS[row.task]().conditions}
        assert row.noise in levels and next(iter(row.psnr)) == "DEAL"
    assert len({(r.task, r.channels, r.noise, r.setting, r.data) for r in PUBLISHED}) \
        == len(PUBLISHED)  # fmt: skip


def test_the_summary_says_when_the_data_are_others():
    scores = [Score(str(i), 25, 29.0, 0.8, 1.0) for i in range(68)]
    same = summarise(scores, "denoising")
    assert "DEAL 29.16" in same and "NOT the published" not in same
    assert "CBSD68" not in same and "CBSD68" in summarise(scores, "denoising", 3)
    assert "1 image instead of 68" in summarise(scores[:1], "denoising")
    assert "Published" not in summarise(scores)
    levin = [
        Score(n, 2.55, 30, 0.9, 1, setting="Levin.npz:k1 17x17") for n in ("01", "02")
    ]
    text = summarise(levin, "deblurring")
    assert "35.20" in text and "35.03" not in text  # 17x17, not 27x27


def test_arrays_are_read_from_every_kind_of_file(tmp_path):
    a = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "a.npy", a)
    np.savez(tmp_path / "one.npz", a)
    torch.save(torch.from_numpy(a), tmp_path / "a.pt")
    torch.save({"a": torch.from_numpy(a), "b": 1}, tmp_path / "d.pt")
    cells = np.empty((1, 2), object)
    cells[0, 0], cells[0, 1] = a + 1, a
    savemat(tmp_path / "a.mat", {"cells": cells, "a": a})
    names = ["a.npy", "one.npz", "a.pt", "d.pt:a", "a.mat:a", "a.mat:cells/1"]
    for name in names:
        np.testing.assert_array_equal(read_array(f"{tmp_path}/{name}"), a)
    for name in ("d.pt", "d.pt:c", "a.mat", "a.mat:cells", "a.mat:cells/7", "d.pt:b"):
        with pytest.raises(ValueError, match="NAME|INDEX|not a tensor"):
            read_array(f"{tmp_path}/{name}")


def test_hdf5_files_are_read_by_name(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["group/a"], file["b"] = np.eye(2), np.ones(3)
    read = read_array(f"{tmp_path}/a.h5:group/a")
    np.testing.assert_array_equal(read, np.eye(2))
    with pytest.raises(ValueError, match="group/a"):
        read_array(tmp_path / "a.h5")


def test_total_variation_is_the_minimum_and_knows_a_real_image():
    task = TASKS["mri-single-coil-4x"]()
    x = task.ground_truth(photograph(1, 14, 16))
    y, physics = task.conditions[0].measure(x)
    weight = 0.01

    def objective(z):
        tv = TVPrior().fn(z)
        return 0.5 * (physics.A(z) - y).square().sum() + weight * tv

    x_hat = TotalVariation()(y, physics, lambda_reg=weight)
    best = objective(TotalVariation(max_iter=800)(y, physics, lambda_reg=weight))
    assert objective(x_hat) < 1.001 * best
    assert objective(TotalVariation(max_iter=1)(y, physics, weight)) > 1.05 * best
    for other in (x, physics.A_adjoint(y), torch.zeros_like(x)):
        assert objective(x_hat + 0.1 * (other - x_hat)) > best
    real = TotalVariation(real=True)(y, physics, lambda_reg=weight)
    assert real[:, 1].abs().max() == 0 and x_hat[:, 1].abs().max() > 0


def test_a_tuned_rival_is_no_worse_than_at_other_weights():
    task = TASKS["denoising"](noise=[25])
    data = [("a", photograph())]
    rival = TotalVariation()
    tuned = tune_task(rival, task, data, progress=False)
    (best,) = evaluate(rival, tuned, data, progress=False)
    assert best.lambda_reg == tuned.conditions[0].lambda_reg
    for factor in (0.5, 2):
        (other,) = evaluate(
            rival, task, data, lambda_reg=factor * best.lambda_reg, progress=False
        )
        assert other.psnr < best.psnr
    (noisy,) = evaluate(Adjoint(), task, data, progress=False)
    assert noisy.psnr < best.psnr


def test_weight_and_coupling_of_a_dictionary_are_tuned_together():
    # It starts near the best coupling, and the blur is circular: its solves are cheap.
    prior = SmoothPlusSparsePrior("group", 8, 4, num_free_atoms=4, beta=0.01)
    model = SmoothPlusSparse(prior=prior, max_iter=10, warn=False)
    data = [("a", photograph(1, 16, 16))]
    task = TASKS["deblurring"](kernels=["gaussian:1"], noise=[2.55])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights are random: best without atoms
        tuned = tune_task(model, task, data, progress=False)
        plain = TASKS["denoising"](noise=[25])
        denoising = tune_task(model, plain, data, progress=False)
    (condition,) = tuned.conditions
    assert condition.beta != pytest.approx(prior.beta.item())
    (best,) = evaluate(model, tuned, data, progress=False)
    assert (best.lambda_reg, best.beta) == pytest.approx(
        (condition.lambda_reg, condition.beta)
    )
    (other,) = evaluate(
        model, task, data, lambda_reg=best.lambda_reg, beta=10 * best.beta,
        progress=False,
    )  # fmt: skip
    assert other.beta == pytest.approx(10 * best.beta) and other.psnr < best.psnr
    assert denoising.conditions[0].beta is None  # learned
    (own,) = evaluate(model, tuned, data, lambda_reg=1e-3, progress=False)
    assert own.beta == pytest.approx(prior.beta.item())  # not that of another weight
    assert np.isnan(evaluate(Adjoint(), tuned, data, progress=False)[0].beta)
    with pytest.raises(ValueError, match="beta is for dictionaries, not for Adjoint"):
        evaluate(Adjoint(), task, data, beta=1.0)
    with pytest.raises(ValueError, match="for DEAL only, not for SmoothPlusSparse"):
        evaluate(model, task, data, sigma=15.0)


def test_the_weight_published_for_deal_is_not_given_to_rivals():
    class Blind(Reconstructor):
        def forward(self, y, physics):
            return physics.A_adjoint(y)

    task, data = TASKS["super-resolution-x2"](noise=[2.55]), [("a", photograph())]
    scores = evaluate(Blind(), task, data, progress=False)
    assert all(np.isnan(score.lambda_reg) for score in scores)


def test_total_variation_leaves_the_random_state_alone():
    task = TASKS["denoising"](noise=[25])
    y, physics = task.conditions[0].measure(task.ground_truth(photograph()))
    state = torch.get_rng_state()
    TotalVariation()(y, physics, lambda_reg=0.1)
    assert torch.equal(torch.get_rng_state(), state)
