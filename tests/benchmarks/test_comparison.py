"""The comparison of methods: all must see the same, and nothing may be lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from problems import generator, images

pytest.importorskip(
    "comparison", reason="the scripts are not part of this distribution"
)

import comparison
from _rivals import (
    OTHERS,
    OURS,
    Proximal,
    Ridge,
    RidgeRegularizer,
    make_methods,
    nearest,
    read_dncnn,
    real_part,
)
from comparison import (
    REPORTED,
    check_measurements,
    iterations,
    main,
    make_tasks,
    photographs,
    table,
)

from deepinv_deal.evaluation import TotalVariation, evaluate

METHODS, TASKS = ["adjoint or FBP", "DEAL", "TV"], ["denoising 25", "MRI 4x"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("comparison") / "rows.json"
    arguments = ["--small", "--json", str(path), "--methods"]
    main([*arguments, *METHODS, "--only", "denoising 25"])
    arguments += [*METHODS[:2], "--only", *TASKS]  # goes on
    return arguments, main(arguments), path


def test_all_methods_see_the_same_measurements(run):
    _, store, path = run
    assert json.loads(path.read_text())["rows"] == store.rows
    for rows in store.rows.values():
        assert {"DEAL", "adjoint or FBP"} <= set(rows)
        seen = {row["images"][0]["measurements"] for row in rows.values()}
        assert len(seen) == 1
    rows = store.rows["MRI 4x"]
    rows = {**rows, "DEAL": json.loads(json.dumps(rows["DEAL"]))}
    rows["DEAL"]["images"][0]["measurements"] = "other"
    with pytest.raises(AssertionError, match="same measurements"):
        check_measurements(rows)


def test_the_noisy_image_has_the_noise_of_the_protocol(run):
    (image,) = run[1].rows["denoising 25"]["adjoint or FBP"]["images"]
    x = photographs(REPORTED, 16, None)[0][1].double().numpy()
    noise = np.random.RandomState(0).normal(0, 25 / 255, x.shape)
    error = np.clip(x + noise, 0, 1) - x
    assert image["psnr"] == pytest.approx(-10 * np.log10((error**2).mean()), abs=1e-3)
    assert image["n_iter"] is image["converged"] is None


def test_total_variation_is_that_of_the_package(run):
    row = run[1].rows["denoising 25"]["TV"]
    (score,) = evaluate(
        TotalVariation(),
        make_tasks()["denoising 25"],
        photographs(REPORTED, 16, None)[:1],
        lambda_reg=row["weight"],
    )
    assert row["images"][0]["psnr"] == pytest.approx(score.psnr, abs=1e-3)
    assert row["images"][0]["n_iter"] == 3 and row["images"][0]["converged"]


def test_others_know_that_images_of_mri_are_real():
    task = make_tasks()["MRI 4x"]
    x = task.ground_truth(photographs(REPORTED, 16, None)[0][1])
    y, physics = task.conditions[0].measure(x)
    real, v = real_part(physics), images(1, 1, 16, 16).float()
    both = torch.cat([v, torch.zeros_like(v)], 1)
    torch.testing.assert_close(real.A(v), physics.A(both))
    lhs, rhs = (real.A(v) * y).sum(), (v * real.A_adjoint(y)).sum()
    torch.testing.assert_close(lhs, rhs, rtol=1e-4, atol=1e-4)
    found = Proximal(TotalVariation(max_iter=2), 0.01).solve(y, physics, 0.01)
    assert found.x.shape == v.shape
    assert found.n_iter == 2 and found.converged is False


def test_all_tuned_methods_have_the_same_number_of_trials(run):
    rows = run[1].rows
    for row in (
        rows["denoising 25"]["TV"],
        rows[TASKS[1]]["DEAL"],
        rows[TASKS[0]]["DEAL"],
    ):
        assert len(row["trials"]) == 2
        assert row["weight"] == max(row["trials"], key=lambda t: t[1])[0]


def test_a_second_call_goes_on(run, monkeypatch, capsys):
    arguments, store, _ = run

    def again(*_):
        raise AssertionError("This row is done.")

    monkeypatch.setattr(comparison, "run_row", again)
    assert main(arguments).rows == store.rows
    printed = capsys.readouterr().out
    assert "WCRR (lr_wcrr_bilevel_ift.pt is not given by --baselines)" in printed
    assert f"{store.rows['MRI 4x']['DEAL']['images'][0]['psnr']:.2f}" in printed
    with pytest.raises(ValueError, match="other settings"):
        main(arguments[1:])


@pytest.mark.parametrize("task", list(make_tasks()))
def test_every_family_is_compared_in_every_task(task):
    methods, missing = make_methods(make_tasks()[task], None)
    left_out = {text.split(" (")[0] for text in missing}
    assert set(methods) | left_out == {*OURS, *OTHERS}
    assert set(OURS) <= set(methods)
    method = methods["SAFI"]()
    noise = make_tasks()[task].conditions[0].noise
    level = noise if task.startswith("denoising") else 15
    assert float(method.model.prior.sigma) == pytest.approx(level / 255)


def test_the_lead_and_missing_convergence_are_shown():
    def row(psnr, converged):
        image = {"psnr": psnr, "n_iter": 7, "converged": converged}
        return {"images": [image, {**image, "converged": True}]}

    rows = {"DEAL": row(30.0, True), "MMR": row(31.0, False), "TV": row(31.5, None)}
    lines = table({"MRI 8x": rows}, lambda r: iterations(r), lead=True).splitlines()
    assert [line.split() for line in lines[3:-1]] == [
        ["DEAL", "7"],
        ["MMR", r"7\*"],
        ["TV", "7", "fixed"],
        ["lead", "of", "ours", "-0.50"],
    ]


def test_the_nearest_weights_are_taken():
    assert [nearest(s / 255, (5, 25)) for s in (5, 15, 25)] == [5, 25, 25]
    assert nearest(None, (5, 15, 25)) == 15


def ridge_state():
    rng = generator(0)
    shapes = [(2, 1, 3, 3), (3, 2, 3, 3), (4, 3, 3, 3)]
    first, second, third = (torch.randn(s, generator=rng) for s in shapes)
    return {
        "regularizer.filters.0.parametrizations.weight.original": first,
        "regularizer.filters.1.weight": second,
        "regularizer.filters.2.weight": third,
        "regularizer.scaling": torch.rand(1, 4, 1, 1, generator=rng),
        "regularizer.beta": torch.tensor(1.0),
        "alpha": torch.tensor(0.3),
        "scale": torch.tensor(0.5),
    }


@pytest.mark.parametrize("concave", [0.0, 1.0])
def test_ridge_regularizers_have_their_gradient_and_norm(concave):
    regularizer = RidgeRegularizer(ridge_state(), concave)
    x = (3 * images(1, 1, 12, 13).float()).requires_grad_()
    value, slope = regularizer.value_and_grad(x, 0.7)
    (expected,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)
    for _ in range(100):
        with torch.no_grad():
            x = regularizer.adjoint(regularizer.apply_filters(x)) / regularizer.norm**2
            gain, x = float(x.norm()), x / x.norm()
    assert 0.5 < gain < 1 + 1e-4


def test_a_ridge_regularizer_denoises_to_a_stationary_point():
    task = make_tasks()["denoising 25"]
    method = Ridge(RidgeRegularizer(ridge_state(), 0.0), 25 / 255)
    x = task.ground_truth(photographs(REPORTED, 24, None)[0][1])
    y, physics = task.conditions[0].measure(x)
    solution = method.solve(y, physics, 1.0)
    a = 25 / 255 / RidgeRegularizer.level
    slope = method.regularizer.value_and_grad(solution.x, a)[1]
    assert solution.converged and solution.n_iter > 1
    assert (solution.x - y + slope).norm() < 0.05 * slope.norm()


def test_dncnn_subtracts_what_its_file_predicts(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(64, 1, 3, 3), (64, 64, 3, 3), (1, 64, 3, 3)]
    arrays = {f"w{i}": 0.05 * rng.standard_normal(s) for i, s in enumerate(shapes)}
    arrays |= {f"b{i}": 0.1 * rng.standard_normal(s[0]) for i, s in enumerate(shapes)}
    np.savez(tmp_path / "weights.npz", **{k: v.astype("f4") for k, v in arrays.items()})
    x = images(1, 1, 10, 11).float()
    noise = x
    for i in range(3):
        noise = torch.nn.functional.conv2d(
            noise.relu() if i else noise,
            torch.from_numpy(arrays[f"w{i}"]).float(),
            torch.from_numpy(arrays[f"b{i}"]).float(),
            padding=1,
        )
    with torch.no_grad():
        found = read_dncnn(tmp_path / "weights.npz")(x)
    torch.testing.assert_close(found, x - noise, rtol=1e-4, atol=1e-5)
