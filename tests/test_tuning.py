"""Choosing lambda and sigma on a validation set."""

import csv
import warnings

import deepinv as dinv
import numpy as np
import pytest
import torch
from deepinv.loss.metric import MSE, PSNR, Metric
from deepinv.physics import (
    Blur,
    Denoising,
    GaussianNoise,
    Inpainting,
    StackedLinearPhysics,
)
from problems import DOUBLE, generator, images, random_l1_model, random_model
from skimage.data import camera
from skimage.transform import resize

from deepinv_deal import DEAL, MMR, SAFI, SmoothPlusSparse, SolverOptions
from deepinv_deal.priors import SmoothPlusSparsePrior
from deepinv_deal.tuning import tune
from deepinv_deal.tuning.search import minimise, vertex

SHAPE = (1, 9, 8)


def noise(sigma=0.1, seed=0):
    return GaussianNoise(sigma, rng=generator(seed))


def denoising(sigma=0.1):
    return Denoising(noise(sigma))


def blur(**kwargs):
    kernel = torch.tensor([[1.0, 2, 1], [2, 9, 2], [1, 2, 3]], dtype=DOUBLE)[None, None]
    return Blur(kernel / kernel.sum(), padding="circular", **kwargs)


@pytest.fixture(scope="module")
def model():
    return random_model(rtol=1e-4)


@pytest.fixture
def x():
    return images(2, *SHAPE)


# -- the search ------------------------------------------------------------------


@pytest.mark.parametrize("best", [-7.3, -1.0, 0.2, 3.9])
@pytest.mark.parametrize("skew", [0.0, 0.15])
def test_the_search_comes_within_three_per_cent_of_a_smooth_minimum(best, skew):
    calls = []

    def evaluate(points):
        calls.extend(points)
        t = [float(p[0]) - best for p in points]
        return [s**2 + skew * abs(s) * s for s in t]

    steps = np.array([np.log(4.0)])
    assert minimise(evaluate, np.zeros(1), steps, np.log(1.2), 20)
    closest = min(abs(float(p[0]) - best) for p in calls)
    assert closest < (0.03 if skew else 1e-9)
    assert len(calls) == len({round(float(p[0]), 6) for p in calls}) <= 18


def test_the_search_in_two_variables_follows_a_tilted_valley():
    tried = []

    def evaluate(points):
        tried.extend(points)
        return [(p[0] - 2) ** 2 + (p[1] + 1) ** 2 + 1.2 * (p[0] - 2) * (p[1] + 1)
                for p in points]  # fmt: skip

    steps = np.array([1.4, 0.7])
    assert minimise(evaluate, np.zeros(2), steps, 0.4, 60)
    assert min(np.abs(p - [2, -1]).max() for p in tried) < 1e-9


def test_a_search_that_has_no_end_stops_at_its_budget():
    calls = []

    def evaluate(points):
        calls.extend(points)
        return [-float(p[0]) for p in points]

    assert not minimise(evaluate, np.zeros(1), np.ones(1), 0.4, 6)
    assert len(calls) == 6


def test_a_fit_that_is_not_convex_has_novertex():
    points = np.array([[0.0], [-1], [1]])
    assert vertex(points, np.array([1.0, 0, 0])) is None
    np.testing.assert_allclose(vertex(points, np.array([1.0, 3, 1])), [0.5])


# -- real problems ---------------------------------------------------------------


def photograph(size):
    image = resize(camera() / 255.0, (64, 64), anti_aliasing=True)
    return torch.from_numpy(image).float()[None, None, 18 : 18 + size, 26 : 26 + size]


@pytest.mark.parametrize(
    "physics",
    [
        pytest.param(
            Denoising(noise(25 / 255)), id="denoising", marks=pytest.mark.slow
        ),
        pytest.param(
            Blur(
                dinv.physics.functional.gaussian_blur((5, 5), (0.7, 0.7)),
                padding="circular",
                noise_model=noise(10 / 255),
            ),
            id="blur",
        ),
        pytest.param(
            Inpainting(
                (1, 16, 16), mask=0.7, rng=generator(), noise_model=noise(10 / 255)
            ),
            id="inpainting",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tuning_is_within_two_hundredths_of_a_decibel_of_a_fine_grid(physics):
    x, model = photograph(16), DEAL(rtol=1e-3, max_iter=100)
    result = tune(model, physics, [x], batch_candidates=True)
    assert result.complete and len(result.trials) <= 15

    # The same measurements, and a fine grid that the optimum lies well inside of.
    physics.noise_model.rng.manual_seed(0)
    y, fine = physics(x), torch.logspace(-0.2, 0.2, 9)
    with torch.no_grad():
        x_hat = model(
            y.repeat(len(fine), 1, 1, 1), physics, lambda_reg=result.lambda_reg * fine
        )
        scores = PSNR()(x_hat, x.expand_as(x_hat))
    assert result.best.score > float(scores.max()) - 0.02
    assert min(scores[0], scores[-1]) < scores.max() - 0.02  # there is a choice


def test_sure_chooses_nearly_as_well_as_the_ground_truth():
    x, model, sigma = photograph(24), DEAL(), 25 / 255
    y = denoising(sigma)(x)
    physics = Denoising(GaussianNoise(sigma))
    options = {"batch_candidates": True, "precision": 1.5, "max_trials": 6}
    with_truth = tune(model, physics, [(x, y)], **options)
    without = tune(model, physics, [{"y": y}], metric="sure", **options)
    assert without.metric == "SURE" and without.lower_better
    with torch.no_grad():
        psnr = float(PSNR()(model(y, physics, lambda_reg=without.lambda_reg), x))
    assert psnr > with_truth.best.score - 0.1
    # It estimates the error, up to the deviation of the mean of as many squares.
    deviation = (2 / x.numel()) ** 0.5 * sigma**2
    assert without.best.score == pytest.approx(10 ** (-psnr / 10), abs=3 * deviation)


# -- what is compared ------------------------------------------------------------


def test_the_result_says_what_the_model_gives(model, x):
    physics = blur()
    y = physics(x)
    result = tune(model, physics, [(x, y)], lambda_reg=0.2, max_trials=3)
    assert [t.lambda_reg for t in result.trials] == pytest.approx([0.2, 0.05, 0.8])
    with torch.no_grad():
        for trial in result.trials:
            x_hat, info = model(
                y, physics, lambda_reg=trial.lambda_reg, return_info=True
            )
            assert trial.score == pytest.approx(float(PSNR()(x_hat, x).mean()))
            assert trial.n_iter == float(info.n_iter.double().mean())
            assert trial.converged == 1 and trial.seconds > 0
    assert result.best.score == max(t.score for t in result.trials)
    assert result.settings == {"lambda_reg": result.lambda_reg}


# A budget that ends the search early is the test's own choice.
pytestmark = pytest.mark.filterwarnings("ignore:Tuning stopped at max_trials")


@pytest.mark.parametrize(
    "tune_sigma", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_candidates_in_one_batch_give_what_they_give_one_by_one(x, tune_sigma):
    data = [(x, blur()(x)), (x[:1], blur()(x[:1]) + 0.01)]
    model = random_model(rtol=1e-4)
    results = [
        tune(
            model,
            blur(),
            data,
            tune_sigma=tune_sigma,
            max_trials=9 if tune_sigma else 5,
            batch_candidates=batched,
        )
        for batched in (False, True)
    ]
    for a, b in zip(results[0].trials, results[1].trials, strict=True):
        assert (a.lambda_reg, a.sigma, a.n_iter) == (b.lambda_reg, b.sigma, b.n_iter)
        assert a.score == pytest.approx(b.score, rel=1e-9)


def test_stacked_measurements_are_repeated_part_by_part(model, x):
    physics = StackedLinearPhysics([blur(), blur()])
    one, all_at_once = (
        tune(model, physics, [x], max_trials=3, batch_candidates=batched)
        for batched in (False, True)
    )
    for a, b in zip(one.trials, all_at_once.trials, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-9)


def test_lower_is_better_where_the_metric_says_so(model, x):
    by_psnr = tune(model, denoising(), [x])
    by_mse = tune(model, denoising(), [x], metric=MSE())
    by_loss = tune(model, denoising(), [x], metric=PSNR(train_loss=True))
    assert by_mse.lower_better and by_loss.lower_better and not by_psnr.lower_better
    assert by_mse.best.score == min(t.score for t in by_mse.trials)
    # PSNR and MSE of one image agree; here two are averaged, so only nearly.
    assert by_mse.lambda_reg == pytest.approx(by_psnr.lambda_reg, rel=0.2)
    assert by_loss.lambda_reg == pytest.approx(by_psnr.lambda_reg)


def test_images_count_once_whatever_the_batches(model, x):
    y = blur()(x)
    batch = tune(model, blur(), [(x, y)], max_trials=3)
    singles = tune(
        model,
        blur(),
        [(x[0], y[0]), {"x": x[1:], "y": y[1:]}],
        max_trials=3,
        metric=PSNR(reduction="mean"),
    )
    for a, b in zip(batch.trials, singles.trials, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*dict.*:DeprecationWarning")
def test_datasets_loaders_and_tensors_are_taken(model, x):
    y = blur()(x)
    dataset = torch.utils.data.TensorDataset(x, y)
    forms = [
        dataset,
        torch.utils.data.DataLoader(dataset, batch_size=2),
        iter([(x, y)]),
        x,
    ]
    scores = {
        round(tune(model, blur(), form, max_trials=1).best.score, 9) for form in forms
    }
    assert len(scores) == 1  # blur() adds no noise


def test_parameters_of_an_item_reach_its_physics_only(model, x):
    mask = torch.ones(SHAPE, dtype=DOUBLE)
    physics = Inpainting(SHAPE, mask=mask)
    other = mask.clone()
    other[..., ::2] = 0
    plain, masked = (
        tune(model, physics, data, max_trials=1)
        for data in ([x], [(x, physics(x) * other, {"mask": other[None]})])
    )
    assert masked.best.score < plain.best.score
    assert bool((physics.mask == 1).all())


def test_sigma_is_chosen_or_fixed_on_request(model, x):
    physics = blur()
    both = tune(model, physics, [x], tune_sigma=True, sigma=0.05, max_trials=9)
    assert {round(t.sigma, 6) for t in both.trials} == {0.025, 0.05, 0.1}
    assert set(both.settings) == {"lambda_reg", "sigma"}
    fixed = tune(model, physics, [x], sigma=0.3, max_trials=1)
    own = tune(model, physics, [x], max_trials=1)
    assert fixed.sigma is None and fixed.best.score != own.best.score
    # settings are what was tried, fixed parameters too
    assert fixed.settings == {"lambda_reg": fixed.lambda_reg, "sigma": 0.3}
    assert set(own.settings) == {"lambda_reg"}


def test_denoising_starts_at_the_learned_weight(model, x):
    level = torch.tensor(0.1, dtype=DOUBLE)
    learned = float(model.prior.default_lambda(level, x)[0].detach())
    start = tune(model, denoising(0.1), [x], max_trials=1)
    assert start.lambda_reg == pytest.approx(learned, rel=1e-6)
    pair = tune(model, None, [(x, x + 0.1)], sigma=0.1, max_trials=1)
    assert pair.lambda_reg == pytest.approx(learned, rel=1e-6)


# -- randomness ------------------------------------------------------------------


@pytest.mark.parametrize("own_generator", [False, True])
def test_measurements_depend_on_the_seed_and_no_generator_is_touched(
    model, x, own_generator
):
    physics = Denoising(noise() if own_generator else GaussianNoise(0.1))
    scores = []
    for seed in (0, 0, 1):
        torch.rand(3)
        before = torch.get_rng_state()
        scores.append(tune(model, physics, x, max_trials=1, seed=seed).best.score)
        assert torch.equal(torch.get_rng_state(), before)
    if own_generator:  # as if it had never been used
        drawn = torch.rand(5, generator=physics.noise_model.rng)
        assert torch.equal(drawn, torch.rand(5, generator=generator()))
    assert scores[0] == scores[1] != scores[2]


# -- interruption, errors --------------------------------------------------------


class Failing(PSNR):
    """Fails at the n-th call."""

    def __init__(self, n, error):
        super().__init__()
        self.left, self.error = n, error

    def metric(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return super().metric(*args, **kwargs)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_search_returns_what_it_has(model, x, tmp_path):
    log = tmp_path / "log.csv"
    with pytest.warns(RuntimeWarning, match="interrupted after 2 trials"):
        result = tune(
            model, blur(), [x], metric=Failing(3, KeyboardInterrupt()), log=log
        )
    assert len(result.trials) == 2 and not result.complete
    rows = read(log)
    assert [float(row["score"]) for row in rows] == [t.score for t in result.trials]
    with pytest.raises(KeyboardInterrupt):  # nothing to return
        tune(model, blur(), [x], metric=Failing(1, KeyboardInterrupt()))


def test_an_error_carries_what_was_tried(model, x, tmp_path):
    log = tmp_path / "log.csv"
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        tune(
            model, blur(), [x], metric=Failing(3, RuntimeError("out of memory")),
            log=log,
        )  # fmt: skip
    assert len(caught.value.tuning.trials) == len(read(log)) == 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dataset": []}, ValueError, "empty"),
        ({"dataset": torch.zeros(0, *SHAPE, dtype=DOUBLE)}, ValueError, "empty"),
        ({"dataset": 3}, TypeError, "iterable"),
        ({"dataset": ["camera.png"]}, TypeError, "Item 0.*str"),
        ({"dataset": [(1, 2)]}, TypeError, "x of item 0"),
        ({"dataset": [{}]}, ValueError, "neither x nor y"),
        ({"dataset": [{"y": torch.zeros(1, *SHAPE)}]}, ValueError, "no ground truth"),
        ({"physics": None}, ValueError, "without physics"),
        ({"metric": "psnr"}, TypeError, "lower_better"),
        (
            {"metric": Metric(metric=lambda a, b: (a - b).mean((1, 2, 3)) / 0)},
            ValueError,
            "Metric gave .*lambda_reg",
        ),
        ({"metric": Metric(metric=lambda a, b: a - b)}, ValueError, "one number"),
        ({"metric": "sure"}, ValueError, "level of the Gaussian noise"),
        ({"lambda_reg": 0.0}, ValueError, "positive.*lambda_reg"),
        ({"lambda_reg": -1.0}, ValueError, "positive.*lambda_reg"),
        ({"sigma": 0.0, "tune_sigma": True}, ValueError, "positive.*sigma"),
        ({"beta": 1.0}, ValueError, "beta can be .* not for DEAL"),
        ({"tune_beta": True}, ValueError, "beta can be .* not for DEAL"),
        ({"model": MMR(num_filters=2), "beta": 1.0}, ValueError, "not for MMR"),
        (
            {"model": SmoothPlusSparse(num_atoms=2), "tune_sigma": True},
            ValueError,
            "sigma can be .* not for SmoothPlusSparse",
        ),
        (
            {"model": SmoothPlusSparse(num_atoms=2), "sigma": 0.1},
            ValueError,
            "no effect",
        ),
        ({"patience": 3}, TypeError, "patience"),
        ({"sigma": torch.ones(2)}, ValueError, "sigma must be one number"),
        ({"spread": 1.0}, ValueError, "spread"),
        ({"precision": 5.0}, ValueError, "precision"),
        ({"max_trials": 0}, ValueError, "max_trials"),
        ({"model": torch.nn.Identity()}, TypeError, "model must be"),
    ],
)
def test_bad_input_is_named(model, x, change, error, words):
    arguments = {"model": model, "physics": blur(), "dataset": [x]} | change
    with pytest.raises(error, match=words):
        tune(**arguments)


def test_a_search_cut_short_and_a_best_that_did_not_converge_are_told(x):
    model = random_model(max_iter=2, rtol=1e-8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = tune(model, blur(), [x], max_trials=2)
    words = [str(w.message) for w in seen]
    assert not result.complete
    assert "max_trials=2" in words[0] and "0% of the images converged" in words[1]
    assert len(words) == 2  # not one per candidate


# -- output ----------------------------------------------------------------------


def test_table_and_curve_hold_every_trial(model, x, tmp_path):
    for tune_sigma in (False, True):
        result = tune(model, blur(), [x], tune_sigma=tune_sigma, max_trials=5)
        result.to_csv(tmp_path / "t.csv")
        rows = read(tmp_path / "t.csv")
        assert [float(r["lambda_reg"]) for r in rows] == [
            t.lambda_reg for t in result.trials
        ]
        assert all((r["sigma"] != "") == tune_sigma for r in rows)
        axis = result.plot().axes[0]
        drawn = len(axis.collections[0].get_offsets() if tune_sigma
                    else axis.lines[0].get_xdata())  # fmt: skip
        assert drawn == len(result.trials)
        axis.clear()
        assert result.plot(axis) is axis.figure and axis.get_xlabel() == "lambda_reg"


def test_a_progress_bar_is_drawn_on_request(model, x, capsys):
    for progress in (True, False):
        tune(model, blur(), [x], max_trials=2, progress=progress)
        assert ("Tuning" in capsys.readouterr().err) == progress


def test_models_for_one_noise_level_are_tuned_too():
    physics = Denoising(GaussianNoise(0.2))
    model = MMR(num_filters=4, warn=False)
    with pytest.warns(RuntimeWarning, match="max_trials=2"):
        result = tune(model, physics, torch.rand(1, 1, 12, 12), max_trials=2)
    # Rescaled to this noise, as a call without lambda_reg is.
    own = float(model.prior.lambda_reg.detach()) * 0.2 / float(model.prior.sigma)
    assert result.trials[0].lambda_reg == pytest.approx(own)
    assert len({trial.score for trial in result.trials}) == 2
    y = torch.rand(1, 1, 12, 12, generator=generator())
    with torch.no_grad():
        plain, told = model(y, sigma=0.2), model(y, sigma=0.2, lambda_reg=own)
    torch.testing.assert_close(plain, told)


@pytest.mark.filterwarnings("ignore:At the best setting")
@pytest.mark.parametrize("kind", [SAFI, MMR])
def test_the_noise_level_of_rescaled_models_is_chosen_or_fixed_on_request(x, kind):
    # Few iterations are enough to compare.
    few = {"max_iter": 2, "solver": SolverOptions(inner_max_iter=5), "warn": False}
    model, physics = random_l1_model(kind, **few), blur()
    own = float(model.prior.sigma)
    both = tune(model, physics, [x], tune_sigma=True, max_trials=9)
    assert {round(t.sigma / own, 6) for t in both.trials} == {0.5, 1, 2}
    assert set(both.settings) == {"lambda_reg", "sigma"}
    fixed = {}
    for sigma in (None, own, 2 * own):
        found = tune(model, physics, [x], sigma=sigma, lambda_reg=0.1, max_trials=1)
        assert found.sigma is None and found.settings.get("sigma") == sigma
        fixed[sigma] = found.best.score
    assert fixed[None] == pytest.approx(fixed[own]) != pytest.approx(fixed[2 * own])
    with torch.no_grad():
        x_hat = model(physics(x), physics, lambda_reg=0.1, sigma=2 * own)
    assert fixed[2 * own] == pytest.approx(float(PSNR()(x_hat, x).mean()))


def test_dictionaries_are_tuned_from_their_own_weight(x):
    prior = SmoothPlusSparsePrior("group", 8, 4, num_free_atoms=4).double()
    learned = float(prior.lambda_reg)
    for own, physics, expected in (
        (None, blur(), learned),
        (None, denoising(0.1), learned * 0.1 / float(prior.sigma)),
        (0.02, denoising(0.1), 0.02),
    ):
        model = SmoothPlusSparse(prior=prior, lambda_reg=own)
        with pytest.warns(RuntimeWarning, match="max_trials=1"):
            result = tune(model, physics, x, max_trials=1, progress=False)
        assert result.lambda_reg == pytest.approx(expected)
        with torch.no_grad():
            _, info = model(physics(x), physics, return_info=True)
        assert float(info.lambda_reg[0]) == pytest.approx(expected)


def test_the_coupling_of_a_dictionary_is_chosen_or_fixed_on_request(x, tmp_path):
    prior = SmoothPlusSparsePrior("group", 8, 4, num_free_atoms=4, beta=0.7).double()
    model, physics = SmoothPlusSparse(prior=prior), blur()
    with pytest.warns(RuntimeWarning, match=r"beta=.* is the best so far"):
        both = tune(model, physics, [x], tune_beta=True, max_trials=9)
    assert {round(t.beta, 3) for t in both.trials} == {0.175, 0.7, 2.8}
    assert set(both.settings) == {"lambda_reg", "beta"}
    assert torch.isfinite(model(physics(x), physics, **both.settings)).all()
    both.to_csv(tmp_path / "t.csv")
    assert [float(r["beta"]) for r in read(tmp_path / "t.csv")] == [
        t.beta for t in both.trials
    ]
    axis = both.plot().axes[0]
    assert len(axis.collections[0].get_offsets()) == 9
    assert (axis.get_ylabel(), axis.get_yscale()) == ("beta", "log")

    scores = {}
    for beta in (None, 0.7, 2.8):
        with pytest.warns(RuntimeWarning, match="max_trials=1"):
            result = tune(model, physics, [x], beta=beta, max_trials=1)
        assert result.beta is None and result.settings.get("beta") == beta
        scores[beta] = result.best.score
    assert scores[None] == pytest.approx(scores[0.7]) != pytest.approx(scores[2.8])


def test_any_reconstructor_is_tuned_with_the_same_care(x):
    class Ridge(dinv.models.Reconstructor):
        def forward(self, y, physics, lambda_reg):
            return y / (1 + lambda_reg)

    y = x + 0.3 * torch.randn(x.shape, generator=generator(1), dtype=DOUBLE)
    # The best multiple of y is <x, y> / <y, y>, for each image and nearly for all.
    result = tune(
        Ridge(), denoising(), [(x[:1], y[:1])], metric=MSE(), lambda_reg=0.1,
        progress=False,
    )  # fmt: skip
    best = float(y[:1].square().sum() / (x[:1] * y[:1]).sum()) - 1
    assert best > 0.01
    assert abs(np.log(result.lambda_reg / best)) < np.log(1.2)
    assert np.isnan(result.best.converged) and result.complete
    with pytest.raises(ValueError, match="lambda_reg must be given"):
        tune(Ridge(), denoising(), [(x, y)])
