"""The joint problem of image and coefficients: solvers, constraints, derivatives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    Counted,
    gradients_equal_finite_differences,
    random,
    spd_matrix,
)
from problems import images, relative_error

from deepinv_deal._batch import inner
from deepinv_deal.operators import PatchConv
from deepinv_deal.operators.patches import patch_count
from deepinv_deal.priors import PatchSynthesisPrior, SmoothPlusSparsePrior
from deepinv_deal.problems import L1Penalty, operator_term
from deepinv_deal.problems.synthesis import (
    CoefficientEquation,
    with_means,
)
from deepinv_deal.problems.synthesis_solvers import (
    coordinate_descent,
    eliminated_fista,
    ipalm,
    joint_admm,
    sparse_coding,
)
from deepinv_deal.solvers import AdjointOptions, Status, implicit

CONVEX = ("group", "l1", "synthesis")
ALL = (*CONVEX, "weakly_convex")


def small_prior(kind, rng, num_atoms=6, **options):
    """A small prior with random atoms and thresholds, float64."""
    if kind == "synthesis":
        settings = {"beta": 0.5, "lambda_reg": 0.05, **options}
        prior = PatchSynthesisPrior(num_atoms, 3, **settings).double()
    else:
        settings = {"beta": 0.7, "lambda_reg": 0.01, "order": 2.0, **options}
        prior = SmoothPlusSparsePrior(kind, num_atoms, 3, 3, **settings).double()
    with torch.no_grad():
        for p in prior.dictionary.parameters():
            p.copy_(random(rng, *p.shape))
        if kind != "synthesis":
            prior.log_scale.copy_(0.3 * random(rng, num_atoms))
    return prior


def blur(rng, n):
    """A data term without structure: conjugate gradients are needed."""
    matrix = spd_matrix(rng, n * n, 5.0) / 5

    def H(x):
        return (x.flatten(1) @ matrix).view_as(x)

    b = images(2, 1, n, n)
    return operator_term(b, H)


def solve(problem, method, rtol=1e-7, **options):
    x, a = problem.data.b, problem.zero_coefficients()
    if method is joint_admm:
        options.setdefault("r", 0.15 if problem.penalty.weak_convexity else 0.1)
    with torch.no_grad():
        result = method(problem, x, a, rtol=rtol, max_iter=20000, **options)
    assert result.converged.all()
    return result


def objective(problem, result):
    with torch.no_grad():
        return problem.objective(result.x, result.state[0])


# -- minimisers ------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONVEX)
def test_all_solvers_of_convex_problems_find_the_same_minimum(kind, rng):
    prior = small_prior(kind, rng, boundary="circular")
    problem = prior.problem(operator_term(images(2, 1, 5, 6)))
    reference = solve(problem, ipalm)
    for method in (eliminated_fista, joint_admm):
        other = solve(problem, method)
        torch.testing.assert_close(
            objective(problem, other), objective(problem, reference), rtol=1e-8, atol=0
        )
        torch.testing.assert_close(other.x, reference.x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_solvers_agree_without_a_fourier_solve(boundary, rng):
    problem = small_prior("synthesis", rng, boundary=boundary).problem(blur(rng, 5))
    reference = solve(problem, ipalm)
    for method in (eliminated_fista, joint_admm):
        other = solve(problem, method, rtol=1e-6)
        torch.testing.assert_close(
            objective(problem, other), objective(problem, reference), rtol=1e-8, atol=0
        )


def test_coordinate_descent_lowers_the_objective_and_stops(rng):
    prior = small_prior("group", rng)
    problem = prior.problem(operator_term(images(1, 1, 5, 6)))
    x, a = problem.data.b, problem.zero_coefficients()
    with torch.no_grad():
        values = [problem.objective(x, a)]
        for n in (1, 2, 3):
            result = coordinate_descent(problem, x, a, rtol=0, max_iter=n)
            assert result.n_iter == n and result.n_inner > n
            assert result.status == Status.FINISHED
            values.append(objective(problem, result))
        assert (torch.cat(values).diff() < 0).all()
        stopped = coordinate_descent(problem, x, a, rtol=1e-2, max_iter=100)
    assert stopped.converged and 3 < stopped.n_iter < 100
    lowest = objective(problem, solve(problem, eliminated_fista, rtol=1e-5))
    assert lowest < objective(problem, stopped) < values[1]


def test_bounds_hold_and_solvers_agree_on_them(rng):
    prior = small_prior("group", rng)
    problem = prior.problem(operator_term(images(2, 1, 5, 6)))
    bounds = (0.4, 0.6)
    results = [solve(problem, method, bounds=bounds) for method in (ipalm, joint_admm)]
    free = solve(problem, joint_admm)
    values = [objective(problem, result) for result in results]
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=0)
    assert (values[0] > objective(problem, free) + 1e-4).all()
    for result in results:
        assert result.x.min() == 0.4 and result.x.max() == 0.6


@pytest.mark.parametrize("method", [ipalm, eliminated_fista, joint_admm])
def test_weakly_convex_solutions_are_stationary(method, rng):
    prior = small_prior("weakly_convex", rng)
    problem = prior.problem(operator_term(images(2, 1, 4, 5)))
    result = solve(problem, method, rtol=1e-6)
    with torch.no_grad():
        x, a = result.x, result.state[0]
        torch.testing.assert_close(problem.image(a), x, rtol=0, atol=1e-4)
        step = problem.threshold(a, problem.features(x)) - a
        assert step.abs().max() < 1e-4
        start = problem.objective(problem.data.b, torch.zeros_like(a))
        assert (problem.objective(x, a) < start).all()


@pytest.mark.parametrize(
    "method", [ipalm, eliminated_fista, joint_admm, coordinate_descent]
)
def test_a_batch_equals_its_samples(method, rng):
    prior = small_prior("group", rng)
    y = images(3, 1, 5, 6) * torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1, 1)
    beta = torch.tensor([0.2, 0.5, 1.0], dtype=y.dtype)
    weight = torch.tensor([0.1, 0.02, 0.05], dtype=y.dtype)

    def run(s):
        data = operator_term(y[s])
        problem = prior.problem(data, beta=beta[s], lambda_reg=weight[s])
        return solve(problem, method, rtol=1e-2)

    batch = run(slice(None))
    assert len(set(batch.n_iter.tolist())) > 1
    for i in range(3):
        single = run(slice(i, i + 1))
        assert single.n_iter == batch.n_iter[i]
        torch.testing.assert_close(single.x[0], batch.x[i], rtol=0, atol=1e-11)


def test_the_penalty_of_admm_must_exceed_the_weak_convexity(rng):
    problem = small_prior("weakly_convex", rng).problem(
        operator_term(images(1, 1, 4, 4))
    )
    with pytest.raises(ValueError, match="larger than 0.111"):
        solve(problem, joint_admm, r=0.1)


# -- the objective ---------------------------------------------------------------


def test_objective_of_patch_synthesis_is_that_of_the_paper(rng):
    prior = small_prior("synthesis", rng)
    y, x = images(1, 1, 5, 6), random(rng, 1, 1, 5, 6)
    problem = prior.problem(operator_term(y))
    a = random(rng, 1, 6, 3, 4)
    D = prior.dictionary.frame().atoms.flatten(1).T
    patches = torch.nn.functional.unfold(x, 3)
    patches = patches - patches.mean(1, keepdim=True)
    codes = a.flatten(2)
    expected = 0.5 * inner(x, x) - inner(x, y)
    expected = expected + 0.25 * inner(*[patches - D @ codes] * 2)
    expected = expected + 0.5 * 0.05 * codes.abs().sum()
    # The solver's coefficients are those of the paper times the root of beta.
    actual = problem.objective(x, 0.5**0.5 * a)
    torch.testing.assert_close(actual, expected)


def test_plain_mean_handling_ties_the_means(rng):
    prior = small_prior("synthesis", rng)
    y, x = images(2, 1, 5, 6), random(rng, 2, 1, 5, 6)
    unfold = torch.nn.functional.unfold
    means = unfold(y, 3).mean(1).view(2, 1, 3, 4)
    data = with_means(operator_term(y), y, 3, prior.beta.expand(2))
    problem = prior.problem(data)
    a = random(rng, 2, 6, 3, 4)
    D = prior.dictionary.frame().atoms.flatten(1).T
    # E_k x = P_k x - m_k 1 with m_k given; constants in the data term aside
    tied = unfold(x, 3) - means.flatten(2) - D @ a.flatten(2)
    expected = 0.5 * inner(x, x) - inner(x, y) + 0.25 * inner(tied, tied)
    expected = expected - 0.25 * 9 * inner(means, means)
    expected = expected + problem.penalty.value(0.5**0.5 * a)
    torch.testing.assert_close(problem.objective(x, 0.5**0.5 * a), expected)
    # for denoising, the image step is then a division by 1 + beta count
    scaled = random(rng, 2, 1, 5, 6)
    torch.testing.assert_close(
        problem.solve_image(scaled).x, scaled / (1 + 0.5 * patch_count(x, 3))
    )


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_aggregation_is_the_normal_operator_of_the_features(boundary, rng):
    prior = small_prior("group", rng, boundary=boundary)
    problem = prior.problem(operator_term(images(2, 2, 6, 7)))
    x = random(rng, 2, 2, 6, 7)
    with torch.no_grad():
        expected = problem.features_adjoint(problem.features(x))
        torch.testing.assert_close(problem.aggregate(x), expected)
        assert problem.aggregation_norm >= 0
        ratio = inner(x, problem.aggregate(x)) / inner(x, x)
        assert (ratio <= 0.7 * problem.aggregation_norm).all()


def test_coefficients_of_a_given_image_minimise_the_objective(rng):
    for kind in ALL:
        problem = small_prior(kind, rng).problem(operator_term(images(2, 1, 5, 6)))
        with torch.no_grad():
            f = problem.features(problem.data.b)
            a = problem.zero_coefficients()
            result = sparse_coding(problem, f, a, rtol=1e-9)
            assert result.converged.all()
            gap = problem.threshold(result.x, f) - result.x
            assert gap.abs().max() < 1e-7
            # a start at the solution stays there
            again = sparse_coding(problem, f, result.x, rtol=1e-6)
            assert (again.n_iter <= 2).all()


def test_image_solves_start_at_the_last_image(rng):
    """Late images hardly move, so their systems cost a few products with H."""
    data = blur(rng, 6)
    H = Counted(data.normal)
    problem = small_prior("group", rng).problem(operator_term(data.b, H))
    result = solve(problem, eliminated_fista, rtol=1e-5)
    total, H.calls = H.calls, 0
    problem.image(result.state[0])  # as costly as every image without warm start
    assert total < 0.8 * int(result.n_iter.max()) * H.calls


# -- derivatives -----------------------------------------------------------------


def functional_problem(prior, y, data, parameters):
    """The problem with other parameters, as a function of them."""
    problem = torch.func.functional_call(
        _Problem(prior), {f"prior.{k}": v for k, v in parameters.items()}, (data(y),)
    )
    return problem


class _Problem(torch.nn.Module):
    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, data):
        return self.prior.problem(data)


@pytest.mark.parametrize(
    ("kind", "exact"),
    [("group", True), ("l1", False), ("synthesis", True), ("weakly_convex", False)],
)
def test_implicit_gradients_equal_finite_differences(kind, exact, rng):
    prior = small_prior(kind, rng, boundary="circular")
    names = [name for name, _ in prior.named_parameters()]
    if kind == "synthesis":
        names.remove("dictionary.free_atoms")
    target = random(rng, 1, 1, 5, 5)
    options = AdjointOptions(jacobian_free=not exact, rtol=1e-10)
    # warm starts keep a weakly convex problem at the same minimiser
    warm = {}

    def run(y, *parameters):
        named = dict(zip(names, parameters, strict=True))
        problem = functional_problem(prior, y, operator_term, named)
        with torch.no_grad():
            a = warm.get("a", problem.zero_coefficients())
            max_iter = 600 if warm else 3000
            result = eliminated_fista(problem, y, a, rtol=1e-13, max_iter=max_iter)
            warm.setdefault("a", result.state[0])
        x, a = problem.differentiable(result.x, result.state[0], options)
        return (x * target).sum() + 0.1 * a.square().sum()

    parameters = dict(prior.named_parameters())
    y = images(1, 1, 5, 5)
    gradients_equal_finite_differences(run, [y, *map(parameters.get, names)], rng)


def cut_off(problem, slope):
    return replace(problem, penalty=replace(problem.penalty, largest_slope=slope))


def test_slopes_cut_off_give_systems_that_are_solved_at_any_coefficients(rng):
    prior = small_prior("weakly_convex", rng, boundary="circular")
    problem = prior.problem(operator_term(images(1, 1, 6, 7)))
    a = random(rng, *problem.zero_coefficients().shape)
    v = random(rng, *a.shape)
    rtol = torch.full((1,), 1e-8, dtype=v.dtype)
    for slope, solved in ((2.0, False), (0.99, True)):
        with torch.no_grad():
            equation = CoefficientEquation(cut_off(problem, slope))
            result = equation.adjoint_solver(a)(v, rtol)
        # Far from a minimiser, the exact system is indefinite.
        assert result.converged.all() == solved


@pytest.mark.parametrize(("factor", "equal"), [(1.0, False), (30.0, True)])
def test_gradients_are_exact_where_no_slope_is_cut_off(rng, factor, equal):
    prior = small_prior("weakly_convex", rng, boundary="circular")
    prior.lambda_reg.mul_(factor)
    data = operator_term(images(1, 1, 6, 7))
    with torch.no_grad():
        problem = prior.problem(data)
        start = problem.zero_coefficients()
        result = eliminated_fista(problem, data.b, start, rtol=1e-12, max_iter=5000)

    def gradient(slope):
        options = AdjointOptions(jacobian_free=True, rtol=1e-12)
        problem = cut_off(prior.problem(data), slope)
        x, _ = problem.differentiable(result.x, result.state[0], options)
        loss = (x * images(1, 1, 6, 7, seed=1)).sum()
        return torch.autograd.grad(loss, prior.dictionary.atoms)[0]

    exact = gradient(math.inf)
    assert exact.norm() > 0
    assert (relative_error(gradient(0.99), exact) < 1e-8) == equal


def test_two_step_gradients_equal_finite_differences(rng):
    prior = small_prior("synthesis", rng)
    target = random(rng, 1, 1, 5, 5)

    def run(y, atoms):
        problem = functional_problem(
            prior, y, operator_term, {"dictionary.atoms": atoms}
        )
        a = problem.zero_coefficients()
        result = coordinate_descent(problem, y, a, rtol=0, max_iter=2, inner_rtol=1e-12)
        return (result.x * target).sum()

    atoms = prior.dictionary.atoms
    gradients_equal_finite_differences(run, [images(1, 1, 5, 5), atoms], rng)


def test_closed_form_and_conjugate_gradients_give_the_same_adjoint(rng, monkeypatch):
    problem = small_prior("synthesis", rng).problem(operator_term(images(2, 1, 6, 6)))
    with torch.no_grad():
        f = problem.features(problem.data.b)
        a = sparse_coding(problem, f, problem.zero_coefficients(), rtol=1e-12).x
        equation = CoefficientEquation(problem, f)
        v = random(rng, *a.shape)
        rtol = torch.full((2,), 1e-13, dtype=v.dtype)
        a[:, :, :1] = 0  # some patches that use no atom
        f[:, :, :1] = 0
        assert (a != 0).sum(1).max() > 3  # and some that use several
        closed = equation.adjoint_solver(a)(v, rtol).x
        monkeypatch.setattr("deepinv_deal.problems.synthesis.ACTIVE_SET_CHUNK", 2)
        in_chunks = equation.adjoint_solver(a)(v, rtol).x
        torch.testing.assert_close(in_chunks, closed, rtol=1e-9, atol=1e-12)

        class Other(L1Penalty):
            pass

        generic = CoefficientEquation(
            replace(problem, penalty=Other(problem.penalty.threshold)), f
        )
        monkeypatch.setattr(
            "deepinv_deal.problems.synthesis.L1Penalty", type("Nothing", (), {})
        )
        expected = generic.adjoint_solver(a)(v, rtol).x
    torch.testing.assert_close(closed, expected, rtol=1e-7, atol=1e-9)
    # and both solve the system of the generic backward pass
    check = implicit.solve_adjoint_system(
        equation,
        a,
        v,
        solve=lambda r, _: equation.adjoint_solver(a)(r, rtol),
        options=AdjointOptions(rtol=1e-9, max_iter=2),
    )
    assert check.converged.all()


@pytest.mark.parametrize("kind", ["synthesis", "group", "weakly_convex"])
def test_pointwise_steps_in_blocks_of_rows_are_those_of_all_rows(
    rng, kind, monkeypatch
):
    problem = small_prior(kind, rng).problem(operator_term(images(2, 2, 9, 7)))
    a = random(rng, *problem.zero_coefficients().shape)
    heights = []
    prox = type(problem.penalty).prox

    def recorded(self, v, *args):
        heights.append(v.shape[-2])
        return prox(self, v, *args)

    monkeypatch.setattr(type(problem.penalty), "prox", recorded)
    with torch.no_grad():
        f = problem.features(problem.data.b)
        step, shrunk = problem.threshold(a, f), problem.local_prox(0.7)(a)
        assert heights == 2 * [a.shape[-2]]
        monkeypatch.setattr("deepinv_deal.operators.blocks.CACHE_BYTES", 1)
        torch.testing.assert_close(problem.threshold(a, f), step, rtol=1e-13, atol=0)
        again = problem.local_prox(0.7)(a)
        torch.testing.assert_close(again, shrunk, rtol=1e-12, atol=1e-15)
    assert set(heights[2:]) == {2, a.shape[-2] % 2} - {0}  # groups of 2 rows stay whole


@pytest.mark.parametrize(
    ("kind", "num_atoms"),  # 20 are more than twice the rank, and have many minima
    [
        ("synthesis", 6),
        ("group", 6),
        ("weakly_convex", 6),
        ("synthesis", 20),
        ("group", 20),
    ],
)
def test_coefficients_found_in_blocks_of_rows_are_those_of_all_rows(
    rng, kind, num_atoms, monkeypatch
):
    prior = small_prior(kind, rng, num_atoms)
    problem = prior.problem(operator_term(images(2, 1, 9, 7)))
    with torch.no_grad():
        f = problem.features(problem.data.b)
        f[1] = 0  # nothing to find: stops in every block
        a = problem.zero_coefficients()
        whole = sparse_coding(problem, f, a, rtol=1e-11)
        monkeypatch.setattr("deepinv_deal.operators.blocks.CACHE_BYTES", 1)
        blocks = sparse_coding(problem, f, a, rtol=1e-11)
        short = sparse_coding(problem, f, a, rtol=1e-11, max_iter=3)
        # all coefficients are unique only if there are few atoms
        found, expected = (problem.synthesis(r.x) for r in (blocks, whole))
    assert whole.converged.all() and blocks.converged.all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert blocks.n_iter[0] > blocks.n_iter[1]
    assert short.status.tolist() == [Status.MAX_ITER, Status.CONVERGED]


@pytest.mark.parametrize("kind", ("group", "weakly_convex"))
def test_iterations_in_blocks_of_rows_are_those_of_all_rows(rng, kind, monkeypatch):
    problem = small_prior(kind, rng, 6).problem(operator_term(images(2, 1, 9, 7)))
    x, a = problem.data.b, problem.zero_coefficients()
    whole = eliminated_fista(problem, x, a, rtol=1e-9)
    monkeypatch.setattr("deepinv_deal.operators.blocks.CACHE_BYTES", 1)
    blocks = eliminated_fista(problem, x, a, rtol=1e-9)
    assert whole.converged.all() and blocks.converged.all()
    torch.testing.assert_close(blocks.x, whole.x, rtol=0, atol=1e-8)


def test_nothing_is_differentiated_without_gradients(rng):
    prior = small_prior("group", rng)
    problem = prior.problem(operator_term(images(1, 1, 6, 6)))
    result = solve(problem, joint_admm, rtol=1e-6)
    with torch.no_grad():
        x, a = problem.differentiable(result.x, result.state[0], AdjointOptions())
    assert x is result.x and a is result.state[0]


def test_patch_count_is_what_valid_patches_cover():
    x = torch.ones(1, 1, 7, 9, dtype=torch.float64)
    ones = PatchConv(torch.ones(1, 4, 4, dtype=x.dtype), "valid")
    expected = ones.adjoint(torch.ones(1, 1, 4, 6, dtype=x.dtype))
    torch.testing.assert_close(patch_count(x, 4), expected[0, 0])
