"""Implicit gradients against finite differences, one tracked step and dense solves."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import CoupledEquation, central_difference, random
from torch.autograd.functional import jacobian
from torch.autograd.graph import saved_tensors_hooks

from deepinv_deal.solvers import (
    AdjointOptions,
    ConvergenceWarning,
    implicit_solution,
    solve_adjoint_system,
    solve_equation,
)

TIGHT = AdjointOptions(rtol=1e-12, max_iter=200)
JACOBIAN_FREE = AdjointOptions(jacobian_free=True, rtol=1e-12)

both_kinds = pytest.mark.parametrize(
    "adjoint", [TIGHT, JACOBIAN_FREE], ids=["exact", "jacobian-free"]
)


def start(equation) -> torch.Tensor:
    return torch.zeros_like(equation.b)


def solve(equation, adjoint=TIGHT, **options):
    """The solution, accurate to rounding unless told otherwise."""
    options = dict(rtol=1e-13, max_iter=300) | options
    x, result = solve_equation(equation, start(equation), adjoint=adjoint, **options)
    assert result.converged.all()
    return x


def tracked(equation) -> CoupledEquation:
    """The same equation with every parameter a leaf that wants gradients."""
    leaves = {
        name: getattr(equation, name).clone().requires_grad_()
        for name in equation.names
    }
    return equation.replace(**leaves)


def gradients(equation, cotangent, **options):
    """Gradients of ``<cotangent, x>`` in all parameters."""
    equation = tracked(equation)
    x = solve(equation, **options)
    parameters = [getattr(equation, name) for name in equation.names]
    return torch.autograd.grad(x, parameters, cotangent)


def finite_difference(equation, cotangent, name, direction):
    def function(value):
        return (solve(equation.replace(**{name: value})) * cotangent).sum()

    return central_difference(function, getattr(equation, name), direction, h=1e-4)


# -- exact gradients -----------------------------------------------------------


@pytest.mark.parametrize("anderson", [0, 5])
@pytest.mark.parametrize("n_samples", [1, 2, 3])
def test_exact_gradients_are_finite_differences(n_samples, anderson, rng):
    equation = CoupledEquation.draw(rng, n_samples)
    cotangent = random(rng, n_samples, 6)
    options = AdjointOptions(rtol=1e-12, max_iter=200, anderson=anderson)
    grads = gradients(equation, cotangent, adjoint=options)
    for name, grad in zip(equation.names, grads, strict=True):
        direction = random(rng, *grad.shape)
        expected = finite_difference(equation, cotangent, name, direction)
        actual = (grad * direction).sum()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_gradients_equal_those_of_unrolled_iterations(rng):
    equation, cotangent = CoupledEquation.draw(rng, 2), random(rng, 2, 6)
    unrolled = tracked(equation)
    x = start(equation)
    for _ in range(60):
        weights = unrolled.weights(x)
        K = torch.eye(6) + unrolled.L @ unrolled.L.T + torch.diag_embed(weights)
        x = torch.linalg.solve(K, unrolled.b)
    parameters = [getattr(unrolled, name) for name in unrolled.names]
    expected = torch.autograd.grad(x, parameters, cotangent)
    actual = gradients(equation, cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@both_kinds
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_gradients_scale_with_the_loss(scale, adjoint, rng):
    equation, cotangent = CoupledEquation.draw(rng, 2), random(rng, 2, 6)
    expected = gradients(equation, cotangent, adjoint=adjoint)
    actual = gradients(equation, scale * cotangent, adjoint=adjoint)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a / scale, e, rtol=1e-9, atol=1e-12)


def test_acceleration_and_forcing_of_the_forward_pass_do_not_change_gradients(rng):
    equation, cotangent = CoupledEquation.draw(rng, 2), random(rng, 2, 6)
    expected = gradients(equation, cotangent)
    for options in (dict(anderson=4), dict(forcing=0.05)):
        actual = gradients(equation, cotangent, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_the_batch_gradient_is_the_sum_over_its_samples(rng):
    equation, cotangent = CoupledEquation.draw(rng, 3), random(rng, 3, 6)
    db, *shared = gradients(equation, cotangent)
    alone = [gradients(equation.sample(i), cotangent[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(
        db, torch.cat([a[0] for a in alone]), rtol=1e-9, atol=1e-10
    )
    for j, actual in enumerate(shared, start=1):
        expected = sum(a[j] for a in alone)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_a_sample_without_cotangent_gets_a_zero_gradient(rng):
    equation, cotangent = CoupledEquation.draw(rng, 3), random(rng, 3, 6)
    cotangent[1] = 0
    db = gradients(equation, cotangent)[0]
    assert (db != 0).any(1).tolist() == [True, False, True]


def test_gradients_of_float32_agree_with_float64(rng):
    equation, cotangent = CoupledEquation.draw(rng, 2), random(rng, 2, 6)
    single = {name: getattr(equation, name).float() for name in equation.names}
    expected = gradients(equation, cotangent)
    adjoint = AdjointOptions(rtol=1e-5)
    actual = gradients(
        equation.replace(**single), cotangent.float(), rtol=1e-6, adjoint=adjoint
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        error = torch.linalg.vector_norm(a - e) / torch.linalg.vector_norm(e)
        assert error < 1e-4


# -- Jacobian-free gradients ---------------------------------------------------


def test_jacobian_free_gradients_are_those_of_one_step_with_frozen_weights(rng):
    equation, cotangent = CoupledEquation.draw(rng, 2), random(rng, 2, 6)
    actual = gradients(equation, cotangent, adjoint=JACOBIAN_FREE)
    solution = solve(equation)
    step = tracked(equation)
    K = torch.eye(6) + step.L @ step.L.T + torch.diag_embed(step.weights(solution))
    x = torch.linalg.solve(K, step.b)
    torch.testing.assert_close(x, solution, rtol=1e-10, atol=1e-10)
    parameters = [getattr(step, name) for name in step.names]
    expected = torch.autograd.grad(x, parameters, cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_jacobian_free_gradients_differ_from_exact_ones(rng):
    equation, cotangent = CoupledEquation.draw(rng, 2), random(rng, 2, 6)
    exact = gradients(equation, cotangent)
    approximate = gradients(equation, cotangent, adjoint=JACOBIAN_FREE)
    for e, a in zip(exact, approximate, strict=True):
        assert torch.linalg.vector_norm(e - a) > 1e-3 * torch.linalg.vector_norm(e)


def test_both_agree_where_the_weights_do_not_depend_on_the_image(rng):
    equation, cotangent = CoupledEquation.draw(rng, 2), random(rng, 2, 6)
    equation = equation.replace(C=torch.zeros(6, 6, dtype=torch.float64))
    for name, exact, approximate in zip(
        equation.names,
        gradients(equation, cotangent),
        gradients(equation, cotangent, adjoint=JACOBIAN_FREE),
        strict=True,
    ):
        torch.testing.assert_close(exact, approximate, rtol=1e-9, atol=1e-10, msg=name)


# -- the graph -----------------------------------------------------------------


@both_kinds
def test_a_second_forward_before_the_backward_changes_nothing(adjoint, rng):
    first, second = CoupledEquation.draw(rng, 2), CoupledEquation.draw(rng, 2)
    cotangent = random(rng, 2, 6)
    expected = gradients(first, cotangent, adjoint=adjoint)
    leaves = tracked(first)
    x = solve(leaves, adjoint=adjoint)
    solve(tracked(second), adjoint=adjoint).sum().backward()
    parameters = [getattr(leaves, name) for name in leaves.names]
    actual = torch.autograd.grad(x, parameters, cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_gradients_of_two_solutions_add_up(rng):
    equation = CoupledEquation.draw(rng, 2)
    cotangent = random(rng, 2, 6)
    leaves = tracked(equation)
    total = (solve(leaves) * cotangent).sum() + (2 * solve(leaves) * cotangent).sum()
    actual = torch.autograd.grad(total, [getattr(leaves, n) for n in leaves.names])
    for a, e in zip(actual, gradients(equation, cotangent), strict=True):
        torch.testing.assert_close(a, 3 * e, rtol=1e-9, atol=1e-10)


def test_no_graph_is_kept_when_gradients_are_disabled(rng):
    equation = tracked(CoupledEquation.draw(rng, 2))
    with torch.no_grad():
        x = solve(equation)
    assert not x.requires_grad and x.grad_fn is None


def test_no_graph_is_kept_when_nothing_requires_gradients(rng):
    x = solve(CoupledEquation.draw(rng, 2))
    assert not x.requires_grad and x.grad_fn is None


def test_the_result_carries_no_graph(rng):
    equation = tracked(CoupledEquation.draw(rng, 2))
    x, result = solve_equation(equation, start(equation))
    assert x.requires_grad and torch.equal(x.detach(), result.x)
    for name in ("x", "residual", "history"):
        assert not getattr(result, name).requires_grad


def test_the_start_receives_no_gradient(rng):
    equation = tracked(CoupledEquation.draw(rng, 2))
    init = random(rng, 2, 6).requires_grad_()
    x, _ = solve_equation(equation, init, rtol=1e-10)
    x.sum().backward()
    assert init.grad is None and equation.b.grad is not None


def test_what_is_saved_does_not_grow_with_the_iterations(rng):
    equation = tracked(CoupledEquation.draw(rng, 2))

    def saved_bytes(max_iter):
        sizes = []
        with saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            _, result = solve_equation(
                equation, start(equation), rtol=0, max_iter=max_iter
            )
        assert result.n_iter.tolist() == [max_iter] * 2
        return sum(sizes)

    assert saved_bytes(2) == saved_bytes(12) > 0


def test_second_derivatives_are_refused(rng):
    equation = tracked(CoupledEquation.draw(rng, 1))
    x = solve(equation)
    (grad,) = torch.autograd.grad(x.sum(), equation.L, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


# -- the adjoint system --------------------------------------------------------


@pytest.mark.parametrize("anderson", [0, 5])
def test_the_adjoint_system_is_solved(anderson, rng):
    equation, v = CoupledEquation.draw(rng, 3), random(rng, 3, 6)
    x = solve(equation)
    jacobians = torch.stack(
        [jacobian(equation.sample(i), x[i : i + 1])[0, :, 0] for i in range(3)]
    )
    result = solve_adjoint_system(
        equation,
        x,
        v,
        solve=equation.adjoint_solver(x),
        options=AdjointOptions(rtol=1e-11, max_iter=200, anderson=anderson),
    )
    expected = torch.linalg.solve(-jacobians.mT, v)
    assert result.converged.all()
    torch.testing.assert_close(result.x, expected, rtol=1e-9, atol=1e-9)
    wrong = torch.linalg.solve(-jacobians, v)
    assert (wrong - expected).abs().max() > 1e-3  # the transpose matters here


def test_the_first_adjoint_iterate_is_the_jacobian_free_answer(rng):
    equation, v = CoupledEquation.draw(rng, 2), random(rng, 2, 6)
    x, iterates = solve(equation), []

    def linear_solve(r, rtol):
        step = equation.adjoint_solver(x)(r, torch.full_like(rtol, 1e-13))
        iterates.append(step.x.clone())
        return step

    options = AdjointOptions(rtol=1e-3)
    solve_adjoint_system(equation, x, v, solve=linear_solve, options=options)
    expected = equation.adjoint_solver(x)(v, torch.full((2,), 1e-13)).x
    torch.testing.assert_close(iterates[0], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "adjoint, max_iter",
    [
        pytest.param(AdjointOptions(rtol=1e-12, max_iter=1), 100, id="exact"),
        pytest.param(
            AdjointOptions(jacobian_free=True, rtol=1e-12), 2, id="jacobian-free"
        ),
    ],
)
def test_an_adjoint_that_does_not_converge_warns(adjoint, max_iter, rng):
    equation = CoupledEquation.draw(rng, 2)
    solution = solve(equation)
    equation = tracked(equation)
    equation.max_iter = max_iter
    x, _ = solve_equation(equation, solution, adjoint=adjoint, rtol=1e-6)
    with pytest.warns(ConvergenceWarning, match="adjoint system of the backward pass"):
        x.sum().backward()
    assert equation.L.grad.isfinite().all()


def test_an_adjoint_that_converges_does_not_warn(rng):
    equation = tracked(CoupledEquation.draw(rng, 2))
    x, _ = solve_equation(equation, start(equation))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x.sum().backward()


def test_a_looser_adjoint_tolerance_gives_a_less_accurate_gradient(rng):
    equation, cotangent = CoupledEquation.draw(rng, 2), random(rng, 2, 6)
    exact = gradients(equation, cotangent)[1]
    errors = [
        torch.linalg.vector_norm(
            gradients(equation, cotangent, adjoint=AdjointOptions(rtol=rtol))[1] - exact
        ).item()
        for rtol in (1e-1, 1e-4, 1e-8)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_implicit_solution_differentiates_a_square_root():
    theta = torch.tensor([[4.0], [9.0]], requires_grad=True)
    x = theta.detach().sqrt()
    # F(x, theta) = theta - x^2, hence -F_x = 2 x.
    y = implicit_solution(x, theta - x.square(), lambda v: v / (2 * x))
    assert torch.equal(y, x)
    y.sum().backward()
    torch.testing.assert_close(theta.grad, 1 / (2 * x))
