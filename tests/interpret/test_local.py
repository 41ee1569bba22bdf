"""Local behaviour of the reconstruction map against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from linearized import PROBLEMS, SIZE, small_problem
from matplotlib.figure import Figure
from problems import DOUBLE, generator, images, random_l1_prior, relative_error

from deepinv_deal import (
    DEAL,
    MMR,
    SAFI,
    MMRPrior,
    PatchSynthesis,
    SAFIPrior,
    SolverOptions,
)
from deepinv_deal.interpret import (
    asymptotic_rate,
    divergence,
    jacobian_norm,
    linearize,
    plot_convergence,
    solution_path,
    spectral_radius,
    stability_constant,
)

#: Problems whose rate takes longest to observe.
LONG = ("denoising", "blur")


@pytest.fixture(
    scope="module",
    params=[
        "blur",  # the most general, the others take minutes more
        pytest.param("counts", marks=pytest.mark.slow),
        pytest.param("denoising", marks=pytest.mark.slow),
        pytest.param("inpainting", marks=pytest.mark.slow),
    ],
)
def problem(request):
    return small_problem(request.param)


def test_products_are_those_of_the_matrices(problem):
    v = torch.randn(3, 1, SIZE, SIZE, generator=generator(1), dtype=DOUBLE)
    at, flat = problem.at, v.flatten(1).T

    def check(product, matrix):
        expected = (matrix @ flat).T.reshape(v.shape)
        assert relative_error(product(v), expected) < 1e-6

    check(at.normal, problem.B)
    check(at.solve, torch.linalg.inv(problem.B))
    check(at.jacobian, problem.J)
    check(at.jacobian_adjoint, problem.J.T)
    check(at.sensitivity, torch.linalg.inv(-problem.F))
    check(at.sensitivity_adjoint, torch.linalg.inv(-problem.F).T)
    check(at.data_normal, problem.H)


def test_the_spectral_radius_is_that_of_the_matrix(problem):
    expected = torch.linalg.eigvals(problem.J).abs().max()
    assert spectral_radius(problem.at) == pytest.approx(float(expected), rel=1e-3)


def test_the_norm_of_the_jacobian_is_that_of_the_matrix(problem):
    expected = float(torch.linalg.matrix_norm(problem.J, 2))
    assert jacobian_norm(problem.at) == pytest.approx(expected, rel=1e-3)


def test_the_stability_constant_is_that_of_the_matrix(problem):
    expected = float(torch.linalg.matrix_norm(problem.sensitivity, 2))
    assert stability_constant(problem.at) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_divergence_is_the_trace_of_the_matrix(problem):
    expected = float(torch.trace(problem.A @ problem.sensitivity))
    assert divergence(problem.at, batch_size=72) == pytest.approx(expected, rel=1e-5)


def test_random_probes_estimate_the_divergence():
    problem = small_problem("denoising")
    exact = float(torch.trace(problem.A @ problem.sensitivity))
    one = divergence(problem.at, 64, batch_size=64, generator=generator(1))
    two = divergence(problem.at, 64, batch_size=64, generator=generator(2))
    assert one != two
    assert one == pytest.approx(exact, rel=0.1)
    assert two == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize(
    "name", ["denoising", pytest.param("blur", marks=pytest.mark.slow)]
)
def test_the_stability_constant_is_reached_by_finite_perturbations(name):
    problem = small_problem(name)
    _, _, V = torch.linalg.svd(problem.sensitivity)
    constant, y = stability_constant(problem.at), problem.y
    size = 1e-5
    ratios = []
    random = torch.randn(1, V.shape[1], generator=generator(3), dtype=DOUBLE)
    for direction in (V[:1], random):
        delta = size * (direction / direction.norm()).view_as(y)
        moved = linearize(
            problem.model, y + delta, problem.physics, rtol=1e-10, **problem.settings
        )
        change = torch.linalg.vector_norm(moved.x - problem.at.x)
        ratios.append(float(change) / size)
    assert ratios[0] == pytest.approx(constant, rel=1e-2)
    assert ratios[1] < constant


def path_residuals(problem, num_iter):
    path = solution_path(
        problem.model,
        problem.y,
        problem.physics,
        num_iter=num_iter,
        inner_rtol=1e-4,
        **problem.settings,
    )
    return path.residual[:, 0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in PROBLEMS],
)
def test_the_spectral_radius_predicts_the_observed_rate(name):
    problem = small_problem(name)
    rate = asymptotic_rate(path_residuals(problem, 40))
    assert rate == pytest.approx(spectral_radius(problem.at), rel=0.05)


def test_the_rate_of_a_geometric_sequence_is_found_above_rounding():
    k = torch.arange(200, dtype=DOUBLE)
    residuals = 0.7**k + 1e-15
    assert asymptotic_rate(residuals) == pytest.approx(0.7, rel=2e-3)
    assert asymptotic_rate(residuals, last=3) == pytest.approx(0.7, rel=1e-2)
    with pytest.raises(ValueError, match="two or more"):
        asymptotic_rate(residuals[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kind"), [(SAFI, SAFIPrior), (MMR, MMRPrior)], ids=["safi", "mmr"]
)
def test_the_rate_of_attentive_l1_models_is_predicted_too(form, kind):
    solver = SolverOptions(inner_max_iter=5000)
    model = form(prior=random_l1_prior(kind), max_iter=300, solver=solver)
    y = images(1, 1, SIZE, SIZE)
    at = linearize(model, y, rtol=1e-5)
    radius = spectral_radius(at)
    assert 0 < radius < 1
    path = solution_path(model, y, num_iter=12, inner_rtol=1e-4)
    rate = asymptotic_rate(path.residual[:, 0], last=4)
    assert rate == pytest.approx(radius, abs=0.15)
    with pytest.raises(TypeError, match="linear systems of DEAL"):
        at.jacobian(at.x)


def test_real_and_imaginary_part_are_linearised_together():
    model = small_problem("denoising").model
    y = images(1, 2, SIZE, SIZE)
    at = linearize(model, y, sigma=0.05, rtol=1e-10)
    v = torch.randn(2, 2, SIZE, SIZE, generator=generator(1), dtype=DOUBLE)
    both = at.jacobian(v)
    for part in (0, 1):
        alone = linearize(model, y[:, part : part + 1], sigma=0.05, rtol=1e-10)
        product = alone.jacobian(v[:, part : part + 1])
        assert relative_error(both[:, part : part + 1], product) < 1e-5


def test_bad_arguments_are_named():
    model = small_problem("denoising").model
    y = images(2, 1, SIZE, SIZE)
    with pytest.raises(ValueError, match="y must hold one sample, got 2"):
        linearize(model, y, sigma=0.05)
    with pytest.raises(TypeError, match="PatchSynthesis, which has no mask"):
        linearize(PatchSynthesis(num_atoms=4, patch_size=3), y)
    at = linearize(model, y[:1], sigma=0.05)
    with pytest.raises(ValueError, match="v must be a batch"):
        at.solve(y[..., 1:])
    assert isinstance(model, DEAL)


def test_the_figure_of_convergence_shows_the_prediction():
    problem = small_problem("denoising")
    figure = plot_convergence(path_residuals(problem, 20), 0.5)
    assert isinstance(figure, Figure)
    assert "0.500" in figure.axes[0].get_legend().get_texts()[1].get_text()
    assert len(figure.axes) == 1
