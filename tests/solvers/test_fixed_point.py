"""The outer iteration on maps and small nonlinear equations with known solutions."""

from __future__ import annotations

import pytest
import torch
from helpers import Counted, CoupledEquation, FrozenMap, FrozenSystem, random
from torch.utils._python_dispatch import TorchDispatchMode

from deepinv_deal._batch import norm
from deepinv_deal.solvers import SolverResult, Status, fixed_point, picard

FIELDS = ("x", "status", "n_iter", "residual", "n_inner")


def affine_map(rng, rates, n=6):
    """``T(x) = M x + c`` per sample, M symmetric with largest eigenvalue ``rate``."""
    matrices = []
    for rate in rates:
        q, _ = torch.linalg.qr(random(rng, n, n))
        matrices.append((q * torch.linspace(0, rate, n, dtype=torch.float64)) @ q.T)
    M, c = torch.stack(matrices), random(rng, len(rates), n)
    solution = torch.linalg.solve(torch.eye(n) - M, c)
    return M, c, solution


def freeze_affine(M, c):
    def T(x):
        return torch.stack([m @ v + w for m, v, w in zip(M, x, c, strict=True)])

    return lambda x: FrozenMap(T, x)


def assert_same(actual, expected, i):
    """Sample ``i`` of a batch equals a result of that sample alone, up to rounding."""
    assert actual.n_iter[i] == expected.n_iter[0]
    assert actual.status[i] == expected.status[0]
    assert actual.n_inner[i] == expected.n_inner[0]
    torch.testing.assert_close(actual.x[i], expected.x[0], rtol=1e-9, atol=1e-11)


# -- convergence ---------------------------------------------------------------


@pytest.mark.parametrize("anderson", [0, 1, 5])
def test_finds_the_fixed_point_of_contractions(anderson, rng):
    M, c, solution = affine_map(rng, (0.5, 0.9, 0.1))
    result = fixed_point(
        freeze_affine(M, c),
        torch.zeros(3, 6, dtype=torch.float64),
        rtol=1e-10,
        max_iter=500,
        anderson=anderson,
    )
    assert result.converged.all() and (result.residual <= 1e-10).all()
    torch.testing.assert_close(result.x, solution, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("anderson", [0, 3])
def test_solves_a_nonlinear_equation(anderson, rng):
    equation = CoupledEquation.draw(rng, 4)
    init = torch.zeros(4, 6, dtype=torch.float64)
    result = fixed_point(equation.freeze, init, rtol=1e-11, anderson=anderson)
    assert result.converged.all()
    residual = norm(equation(result.x)) / norm(equation.b)
    assert (residual <= 1e-11).all()
    torch.testing.assert_close(result.residual, residual, rtol=1e-3, atol=1e-16)
    assert (result.n_inner >= result.n_iter).all()


def test_history_holds_the_residual_of_every_iterate(rng):
    M, c, _ = affine_map(rng, (0.5, 0.9))
    iterates = [random(rng, 2, 6)]
    freeze = freeze_affine(M, c)
    result = fixed_point(
        freeze,
        iterates[0],
        rtol=1e-3,
        callback=lambda k, previous, x: iterates.append(x),
    )
    assert result.history.shape == (result.n_iter.max() + 1, 2)
    expected = torch.stack([freeze(x).residual for x in iterates])
    torch.testing.assert_close(result.history, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(result.history[-1], result.residual, rtol=1e-12, atol=0)


@pytest.mark.parametrize("anderson", [0, 3])
def test_converged_samples_are_left_unchanged(anderson, rng):
    M, c, _ = affine_map(rng, (0.9, 0.2))
    iterates = []
    result = fixed_point(
        freeze_affine(M, c),
        random(rng, 2, 6),
        rtol=1e-6,
        max_iter=500,
        anderson=anderson,
        callback=lambda k, previous, x: iterates.append(x),
    )
    n = result.n_iter[1]
    assert n < result.n_iter[0]
    assert all(torch.equal(x[1], iterates[n - 1][1]) for x in iterates[n:])
    assert torch.equal(result.x[1], iterates[n - 1][1])


@pytest.mark.parametrize("anderson", [0, 3])
def test_samples_that_stopped_stay_even_if_the_inner_solver_moves_them(anderson, rng):
    M, c, _ = affine_map(rng, (0.9, 0.2))
    freeze, iterates = freeze_affine(M, c), []

    def careless(x):
        problem = freeze(x)
        solve = problem.solve_from  # which accelerated and plain steps call
        problem.solve_from = lambda x, r, rtol, active: solve(
            x, r, rtol, torch.ones_like(active)
        )
        return problem

    result = fixed_point(
        careless,
        random(rng, 2, 6),
        rtol=1e-4,
        anderson=anderson,
        callback=lambda k, previous, x: iterates.append(x),
    )
    n = result.n_iter[1]
    assert n < result.n_iter[0]
    assert all(torch.equal(x[1], iterates[n - 1][1]) for x in iterates[n:])


@pytest.mark.parametrize("anderson", [0, 1, 3])
def test_a_batch_gives_what_its_samples_give_alone(anderson, rng):
    M, c, _ = affine_map(rng, (0.95, 0.2, 0.7))
    init = random(rng, 3, 6)
    options = dict(rtol=1e-7, max_iter=500, anderson=anderson)
    together = fixed_point(freeze_affine(M, c), init, **options)
    assert len(together.n_iter.unique()) == 3
    for i in range(3):
        s = slice(i, i + 1)
        alone = fixed_point(freeze_affine(M[s], c[s]), init[s], **options)
        assert_same(together, alone, i)


@pytest.mark.parametrize("anderson", [0, 3])
def test_a_batch_of_nonlinear_equations_gives_what_each_gives_alone(anderson, rng):
    equation = CoupledEquation.draw(rng, 4)
    equation.b[1] *= 10
    equation.b[2] *= 0.01
    options = dict(rtol=1e-8, anderson=anderson)
    init = random(rng, 4, 6)
    together = fixed_point(equation.freeze, init, **options)
    assert len(together.n_iter.unique()) > 1
    for i in range(4):
        alone = fixed_point(equation.sample(i).freeze, init[i : i + 1], **options)
        assert_same(together, alone, i)


def test_solved_at_the_start_means_no_iterations(rng):
    M, c, solution = affine_map(rng, (0.5, 0.9))
    result = fixed_point(freeze_affine(M, c), solution, rtol=1e-10)
    assert result.n_iter.tolist() == [0, 0] and result.converged.all()
    assert torch.equal(result.x, solution) and result.history.shape == (1, 2)


@pytest.mark.parametrize("anderson", [0, 3])
def test_init_is_not_modified(anderson, rng):
    M, c, _ = affine_map(rng, (0.5, 0.9))
    init = random(rng, 2, 6)
    before = init.clone()
    for max_iter in (0, 10):
        result = fixed_point(
            freeze_affine(M, c), init, max_iter=max_iter, anderson=anderson
        )
        result.x.add_(1)
        assert torch.equal(init, before)


# -- options -------------------------------------------------------------------


def test_every_looser_or_tighter_option_changes_something(rng):
    equation = CoupledEquation.draw(rng, 2)
    init = torch.zeros(2, 6, dtype=torch.float64)

    def solve(**options):
        return fixed_point(equation.freeze, init, **dict(rtol=1e-8) | options)

    base = solve()
    assert (solve(rtol=1e-3).n_iter < base.n_iter).all()
    assert solve(max_iter=2).n_iter.tolist() == [2, 2]
    careful = solve(forcing=0.01)
    assert (careful.n_inner / careful.n_iter > base.n_inner / base.n_iter).all()
    assert not torch.equal(solve(anderson=3).x, base.x)
    assert not torch.equal(solve(anderson=1).x, solve(anderson=3).x)


def recording(equation, asked):
    """``equation.freeze`` that notes (residual, factor asked of the inner solve)."""

    def freeze(x):
        problem = equation.freeze(x)
        solve = problem.solve

        def noting(rtol, active):
            asked.append((problem.residual.item(), rtol.item()))
            return solve(rtol, active)

        problem.solve = noting
        return problem

    return freeze


def test_inner_solves_get_more_accurate_where_the_frozen_problem_predicts_well(rng):
    equation = CoupledEquation.draw(rng, 1)
    equation = equation.replace(C=torch.zeros(6, 6, dtype=torch.float64))
    init, asked = torch.zeros(1, 6, dtype=torch.float64), []
    fixed_point(recording(equation, asked), init, rtol=0, max_iter=4, forcing=0.5)
    # The weights are constant: after the first solve the prediction is exact.
    expected = [0.1, 1e-3, 1e-3, 1e-3]
    assert [factor for _, factor in asked] == pytest.approx(expected)


@pytest.mark.parametrize("forcing", [0.5, 0.05])
def test_inner_solves_aim_no_further_than_the_tolerance_needs(forcing, rng):
    equation, asked, rtol = CoupledEquation.draw(rng, 1), [], 1e-4
    init = torch.zeros(1, 6, dtype=torch.float64)
    fixed_point(recording(equation, asked), init, rtol=rtol, forcing=forcing)
    assert len(asked) > 1 and asked[0][1] == pytest.approx(min(forcing, 0.1))
    for residual, factor in asked:
        assert min(0.5 * rtol / residual, forcing) <= factor * (1 + 1e-6)
        assert factor <= forcing * (1 + 1e-6)


def test_rtol_zero_runs_max_iter_iterations(rng):
    M, c, _ = affine_map(rng, (0.9, 0.5))
    result = fixed_point(freeze_affine(M, c), random(rng, 2, 6), rtol=0, max_iter=7)
    assert result.n_iter.tolist() == [7, 7] and result.history.shape == (8, 2)


def test_the_problem_is_frozen_once_per_iterate(rng):
    M, c, _ = affine_map(rng, (0.9, 0.5))
    freeze = Counted(freeze_affine(M, c))
    result = fixed_point(freeze, random(rng, 2, 6), rtol=1e-5, max_iter=500)
    assert freeze.calls == result.n_iter.max() + 1


def test_the_callback_sees_consecutive_iterates(rng):
    M, c, _ = affine_map(rng, (0.9, 0.5))
    calls, init = [], random(rng, 2, 6)
    fixed_point(
        freeze_affine(M, c), init, max_iter=4, callback=lambda *args: calls.append(args)
    )
    assert [k for k, _, _ in calls] == [0, 1, 2, 3]
    assert torch.equal(calls[0][1], init)
    for (_, _, x), (_, previous, _) in zip(calls, calls[1:], strict=False):
        assert torch.equal(x, previous)


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param(dict(forcing=0.0), "forcing must lie in", id="forcing-0"),
        pytest.param(dict(forcing=1.0), "forcing must lie in", id="forcing-1"),
        pytest.param(dict(rtol=-1.0), "must not be negative", id="rtol"),
        pytest.param(dict(max_iter=-1), "must not be negative", id="max_iter"),
        pytest.param(dict(anderson=-1), "must not be negative", id="anderson"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fixed_point(lambda x: FrozenMap(lambda v: v, x), torch.zeros(1, 2), **options)


# -- Anderson acceleration -----------------------------------------------------


def test_anderson_saves_iterations_on_a_slow_contraction(rng):
    M, c, _ = affine_map(rng, (0.99, 0.95))
    n_iter = {}
    for depth in (0, 2, 6):
        result = fixed_point(
            freeze_affine(M, c),
            torch.zeros(2, 6, dtype=torch.float64),
            rtol=1e-8,
            max_iter=5000,
            anderson=depth,
        )
        assert result.converged.all()
        n_iter[depth] = result.n_iter
    assert (5 * n_iter[6] < n_iter[0]).all()
    assert (2 * n_iter[2] < n_iter[0]).all() and (n_iter[6] < n_iter[2]).all()


def test_anderson_of_depth_one_is_the_secant_method():
    iterates = []
    fixed_point(
        lambda x: FrozenMap(torch.cos, x),
        torch.zeros(1, 1, dtype=torch.float64),
        max_iter=4,
        rtol=1e-12,
        anderson=1,
        callback=lambda k, previous, x: iterates.append(x.item()),
    )
    x = [0.0, 1.0]  # the first step is plain
    f = [torch.cos(torch.tensor(v, dtype=torch.float64)).item() - v for v in x]
    for _ in range(3):
        x.append(x[-1] - f[-1] * (x[-1] - x[-2]) / (f[-1] - f[-2]))
        f.append(torch.cos(torch.tensor(x[-1], dtype=torch.float64)).item() - x[-1])
    assert iterates == pytest.approx(x[1:], abs=1e-6)


def test_anderson_makes_up_for_rough_inner_solves(rng):
    equation = CoupledEquation.draw(rng, 3)
    init = torch.zeros(3, 6, dtype=torch.float64)

    def solve(**options):
        result = fixed_point(equation.freeze, init, rtol=1e-8, **options)
        assert result.converged.all()
        return result

    plain, rough = solve(), solve(anderson=5, forcing=0.7)
    assert (rough.n_inner < plain.n_inner).all()
    torch.testing.assert_close(rough.x, plain.x, rtol=1e-6, atol=1e-7)


def test_anderson_needs_linear_frozen_problems(rng):
    class Opaque:
        residual = torch.ones(1)

    with pytest.raises(ValueError, match="anderson=3 needs .* Opaque is none"):
        fixed_point(lambda x: Opaque(), torch.zeros(1, 2), anderson=3)


def kinked(x):
    """Slope 0.9 above 1, -0.6 below: extrapolating the upper branch leads astray."""
    return torch.where(x > 1, 0.9 * x, 1.5 - 0.6 * x)


def test_an_extrapolation_that_raises_the_residual_is_taken_back():
    iterates = []
    result = fixed_point(
        lambda x: FrozenMap(kinked, x),
        torch.tensor([[10.0], [1.0]], dtype=torch.float64),
        rtol=1e-8,
        anderson=2,
        callback=lambda k, previous, x: iterates.append(x.clone()),
    )
    first = [x[0].item() for x in iterates]
    # A plain step, the extrapolation to zero, back to where it came from, and a plain
    # second step, since the history was dropped.
    assert first[:4] == pytest.approx([9.0, 0.0, 9.0, 8.1], abs=1e-5)
    assert result.history[2, 0] > result.history[1, 0]
    assert result.n_inner[0] < result.n_iter[0]  # taking back costs no inner solve
    assert result.converged.all()
    torch.testing.assert_close(result.x, torch.full_like(result.x, 1.5 / 1.6))


def test_an_extrapolation_to_nan_is_taken_back():
    def T(x):  # the extrapolation of the upper branch leads to zero
        return torch.where(x > 0.5, kinked(x), torch.nan)

    init = torch.tensor([[10.0]], dtype=torch.float64)
    result = fixed_point(lambda x: FrozenMap(T, x), init, rtol=1e-8, anderson=2)
    assert result.history.isnan().any() and result.converged.all()
    torch.testing.assert_close(result.x, torch.full_like(result.x, 1.5 / 1.6))


def test_taking_back_concerns_one_sample_only():
    init = torch.tensor([[10.0], [0.7], [40.0]], dtype=torch.float64)
    options = dict(rtol=1e-8, anderson=2)
    together = fixed_point(lambda x: FrozenMap(kinked, x), init, **options)
    for i in range(3):
        alone = fixed_point(lambda x: FrozenMap(kinked, x), init[i : i + 1], **options)
        assert_same(together, alone, i)


class Scheduled(FrozenSystem):
    """Says itself which samples are near."""

    near = None


def test_only_what_is_near_is_accelerated(rng):
    """Always, from the third iteration on, with a break, never."""
    equation = CoupledEquation.draw(rng, 4)
    when = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 1], [0] * 5])

    def solve(samples):
        k, own = 0, equation.replace(b=equation.b[samples])

        def freeze(x):
            nonlocal k
            problem = own.freeze(x)
            problem.__class__ = Scheduled
            problem.near = when[samples, min(k, 4)].bool()
            k += 1
            return problem

        init = torch.zeros(len(own.b), 6, dtype=torch.float64)
        return fixed_point(freeze, init, anderson=3, rtol=1e-8)

    together = solve(slice(None))
    assert together.converged.all()
    for i in range(4):
        assert_same(together, solve(slice(i, i + 1)), i)
    init = torch.zeros(4, 6, dtype=torch.float64)
    always, never = (
        fixed_point(equation.freeze, init, anderson=depth, rtol=1e-8)
        for depth in (3, 0)
    )
    for i, (first, last) in enumerate(((True, False), (0, 0), (0, 0), (False, True))):
        assert torch.equal(together.x[i], always.x[i]) == first
        assert torch.equal(together.x[i], never.x[i]) == last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_anderson_survives_steps_that_repeat(depth, dtype):
    # Steps of equal length make its least-squares problem exactly singular.
    result = fixed_point(
        lambda x: FrozenMap(lambda v: v + 0.5 * (5.5 - v).clamp(-1, 1), x),
        torch.zeros(1, 1, dtype=dtype),
        rtol=1e-5,
        anderson=depth,
    )
    assert result.converged.all()
    assert result.x.item() == pytest.approx(5.5, abs=1e-4)
    assert result.n_iter <= 15  # and still accelerates: 25 without it


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_anderson_does_not_depend_on_the_scale(scale, rng):
    equation = CoupledEquation.draw(rng, 2)
    # x -> scale x, with the weights unchanged: the residual is relative.
    scaled = equation.replace(b=scale * equation.b, C=equation.C / scale)
    init = torch.zeros(2, 6, dtype=torch.float64)
    expected = fixed_point(equation.freeze, init, rtol=1e-9, anderson=3)
    actual = fixed_point(scaled.freeze, init, rtol=1e-9, anderson=3)
    assert torch.equal(actual.n_iter, expected.n_iter)
    torch.testing.assert_close(actual.x / scale, expected.x, rtol=1e-9, atol=1e-11)


# -- samples that fail ---------------------------------------------------------


@pytest.mark.parametrize("anderson", [0, 3])
def test_too_few_iterations_are_flagged_for_those_samples_only(anderson, rng):
    M, c, _ = affine_map(rng, (0.999, 0.05))
    result = fixed_point(
        freeze_affine(M, c), random(rng, 2, 6), rtol=1e-6, max_iter=6, anderson=anderson
    )
    assert result.status.tolist() == [Status.MAX_ITER, Status.CONVERGED]
    assert result.n_iter[0] == 6 and result.n_iter[1] < 6


@pytest.mark.parametrize("anderson", [0, 3])
def test_stops_at_the_first_iterate_within_the_tolerance(anderson, rng):
    M, c, _ = affine_map(rng, (0.9, 0.5))
    freeze, init = freeze_affine(M, c), random(rng, 2, 6)
    options = dict(rtol=1e-6, anderson=anderson)
    result = fixed_point(freeze, init, max_iter=500, **options)
    for i, n in enumerate(result.n_iter.tolist()):
        assert (result.history[:n, i] > 1e-6).all() and result.history[n, i] <= 1e-6
        # One iteration less is not enough, and is not called enough.
        earlier = fixed_point(freeze, init, max_iter=n - 1, **options)
        assert earlier.status[i] == Status.MAX_ITER and earlier.residual[i] > 1e-6


def test_the_best_iterate_is_returned_when_none_converges():
    script = torch.tensor([[5.0, 2.0, 3.0, 4.0, 9.0], [5.0, 4.0, 3.0, 1.0, 2.0]])

    class Scripted(FrozenMap):
        def __init__(self, x):
            super().__init__(lambda v: v + 1, x)
            self.residual = script[[0, 1], x[:, 0].long()]

    options = {"max_iter": 4, "rtol": 0.1, "damped": False}
    result = fixed_point(Scripted, torch.zeros(2, 1), **options)
    assert result.x.flatten().tolist() == [1.0, 3.0]
    assert result.residual.tolist() == [2.0, 1.0]
    assert result.status.tolist() == [Status.MAX_ITER] * 2
    assert torch.equal(result.history, script.T)


def test_damping_finds_the_fixed_point_of_a_map_that_overshoots():
    def solve(**options):
        # The fixed point is 0, and plain steps multiply the error by -1.2.
        freeze = lambda x: FrozenMap(lambda v: -1.2 * v, x)  # noqa: E731
        start = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
        return fixed_point(freeze, start, rtol=1e-6, max_iter=100, **options)

    plain, damped = solve(damped=False), solve()
    assert plain.status.tolist() == [Status.MAX_ITER] * 2
    assert damped.converged.all()
    assert (damped.n_iter < 50).all()


def test_damping_leaves_a_cycle_whose_residual_stays():
    freeze = lambda x: FrozenMap(lambda v: -1.2 * v.clamp(-1, 1), x)  # noqa: E731
    start = torch.tensor([[10.0]], dtype=torch.float64)
    result = fixed_point(freeze, start, rtol=1e-6, max_iter=100)
    assert result.converged.all()


def test_a_residual_that_fluctuates_shortens_steps_for_a_moment_only():
    """Rough solves leave residuals that rise now and then, on their way down."""
    script = iter([1.0, 0.5, 0.7, 0.4, 0.6, 0.3, 0.45, 0.2])

    class Scripted(FrozenMap):
        def __init__(self, x):
            super().__init__(lambda v: v + 1, x)
            self.residual = torch.tensor([next(script)])

    lengths = []
    result = fixed_point(
        Scripted,
        torch.zeros(1, 1),
        rtol=1e-9,
        max_iter=7,
        callback=lambda _, before, after: lengths.append(float(after - before)),
    )
    assert result.n_iter.item() == 7
    expected = [1, 1, 0.7, 0.84, 0.6, 0.72, 0.6]
    assert lengths == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("anderson", [0, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("from_call", [1, 3], ids=["at-once", "midway"])
def test_non_finite_values_are_flagged_on_that_sample_only(
    from_call, value, anderson, rng
):
    M, c, _ = affine_map(rng, (0.9, 0.8, 0.7))
    init, options = random(rng, 3, 6), dict(rtol=1e-7, max_iter=500, anderson=anderson)
    clean = fixed_point(freeze_affine(M, c), init, **options)

    def T(x):
        y = torch.stack([m @ v + w for m, v, w in zip(M, x, c, strict=True)])
        if freeze.calls >= from_call:
            y[1, 2] = value
        return y

    freeze = Counted(lambda x: FrozenMap(T, x))
    result = fixed_point(freeze, init, **options)
    assert result.status.tolist() == [0, Status.NON_FINITE, 0]
    assert result.x.isfinite().all()
    keep = [0, 2]
    assert torch.equal(result.n_iter[keep], clean.n_iter[keep])
    torch.testing.assert_close(result.x[keep], clean.x[keep], rtol=1e-9, atol=1e-11)


def test_a_broken_inner_problem_is_flagged_on_that_sample_only(rng):
    equation = CoupledEquation.draw(rng, 3)
    init = torch.zeros(3, 6, dtype=torch.float64)
    clean = fixed_point(equation.freeze, init, rtol=1e-7)

    def freeze(x):
        problem = equation.freeze(x)
        normal = problem.A
        sign = torch.tensor([1.0, -1.0, 1.0])[:, None]
        problem.A = lambda v: sign * normal(v)
        return problem

    result = fixed_point(freeze, init, rtol=1e-7)
    assert result.status.tolist() == [0, Status.BREAKDOWN, 0]
    assert torch.equal(result.x[1], init[1]) and result.n_iter[1] == 0
    keep = [0, 2]
    assert torch.equal(result.n_iter[keep], clean.n_iter[keep])
    torch.testing.assert_close(result.x[keep], clean.x[keep], rtol=1e-12, atol=0)


def test_inner_solves_that_hit_their_limit_do_not_end_the_iteration(rng):
    equation = CoupledEquation.draw(rng, 2)
    equation.max_iter = 1
    init = torch.zeros(2, 6, dtype=torch.float64)
    result = fixed_point(equation.freeze, init, rtol=1e-8, forcing=0.01, max_iter=500)
    assert result.converged.all()
    assert torch.equal(result.n_inner, result.n_iter)


def test_results_have_one_entry_per_sample(rng):
    equation = CoupledEquation.draw(rng, 3)
    init = torch.zeros(3, 6, dtype=torch.float64)
    result = fixed_point(equation.freeze, init)
    assert isinstance(result, SolverResult)
    assert all(getattr(result, name).shape[0] == 3 for name in FIELDS)
    assert result.history.shape[1] == 3


@pytest.mark.parametrize("anderson", [0, 3])
def test_the_host_waits_once_per_iterate(anderson, rng, monkeypatch):
    equation, reads, read = CoupledEquation.draw(rng, 4), [], picard.read_any
    monkeypatch.setattr(picard, "read_any", lambda f: reads.append(1) or read(f))
    init = torch.zeros(4, 6, dtype=torch.float64)
    with Waits() as waits:
        result = fixed_point(
            waits.uncounted(equation.freeze), init, rtol=1e-8, anderson=anderson
        )
    assert len(reads) == result.n_iter.max() + 1 and waits.number == 0


class Waits(TorchDispatchMode):
    """Counts how often a number is asked of the device, but not by inner solves."""

    def __init__(self):
        super().__init__()
        self.number, self.counts = 0, True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.number += self.counts and name == "_local_scalar_dense"
        return function(*args, **(kwargs or {}))

    def uncounted(self, freeze):
        def frozen(x):
            problem = freeze(x)
            correction = problem.correction

            def correct(*args):
                self.counts = False
                result = correction(*args)
                self.counts = True
                return result

            problem.correction = correct
            return problem

        return frozen
