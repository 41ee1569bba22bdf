"""Models of operators from probes, and preconditioners that must earn their place."""

import pytest
import torch
from problems import DOUBLE, generator

from deepinv_deal.solvers.preconditioner import (
    FAILING,
    FLOOR,
    TRIALS,
    TRUST,
    Fourier,
    InnerSolve,
    Kind,
    PreconditionedSolver,
    bounded,
    convolve,
    diagonal,
    probe,
    transfer_function,
)

SHAPE = (3, 2, 6, 7)


def circular(symbol, complex_pair=False):
    return lambda x: convolve(symbol, x, Fourier(complex_pair))


def symmetric_symbol(*shape, seed=0):
    """Eigenvalues of a circular convolution with a real symmetric kernel."""
    kernel = torch.rand(shape, generator=generator(seed), dtype=DOUBLE)
    return torch.fft.fft2(kernel).abs().square()


@pytest.mark.parametrize("complex_pair", [False, True])
def test_a_probe_has_a_flat_spectrum_and_is_the_same_for_all_samples(complex_pair):
    fourier = Fourier(complex_pair)
    v = probe(torch.empty(SHAPE, dtype=DOUBLE), 0, fourier)
    size = fourier.spectrum(v).abs()
    torch.testing.assert_close(size, size[0, 0, 0, 0].expand_as(size))
    assert torch.equal(v[0], v[2])
    assert not torch.equal(v, probe(v, 1, fourier))


def test_a_circular_convolution_is_recognised_sample_by_sample():
    symbol = symmetric_symbol(*SHAPE)
    values, misfit = transfer_function(circular(symbol), torch.empty(SHAPE).double())
    torch.testing.assert_close(values, symbol)
    assert (misfit < 1e-12).all()
    assert (diagonal(circular(symbol), torch.empty(SHAPE).double())[1] > 0.5).all()


def test_a_masked_fourier_transform_is_recognised():
    # Not symmetric: it acts on complex images only.
    mask = (torch.rand(3, 1, 6, 7, generator=generator()) < 0.5).double()
    values, misfit = transfer_function(
        circular(mask, True), torch.empty(SHAPE).double(), Fourier(True)
    )
    torch.testing.assert_close(values, mask)
    assert (misfit < 1e-12).all()


def test_a_diagonal_operator_is_recognised():
    mask = torch.rand(SHAPE, generator=generator(), dtype=DOUBLE).round()
    values, misfit = diagonal(lambda x: mask * x, torch.empty(SHAPE).double())
    torch.testing.assert_close(values, mask)
    assert (misfit == 0).all()
    symbol, misfit = transfer_function(lambda x: mask * x, torch.empty(SHAPE).double())
    assert (misfit > 0.3).all() and symbol.shape == SHAPE


def test_no_eigenvalue_of_a_preconditioner_explodes():
    values = bounded(torch.tensor([[0.0, 5.0], [0.0, 1e-3]], dtype=DOUBLE))
    assert values.tolist() == [[5 * FLOOR, 5.0], [1e-3 * FLOOR, 1e-3]]


# -- trials --------------------------------------------------------------------

#: Two samples with eigenvalues over four decades: the inverse diagonal helps a lot.
SPREAD = torch.logspace(0, 4, 40, dtype=DOUBLE).expand(2, 40)


def run(solver, M, solves=4, rtol=1e-6, active=(True, True), max_iter=500):
    rng = generator(1)
    results = []
    for _ in range(solves):
        b = torch.randn(2, 40, generator=rng, dtype=DOUBLE)
        results.append(
            solver.solve(
                lambda x: SPREAD * x,
                b,
                torch.full((2,), rtol, dtype=DOUBLE),
                max_iter,
                lambda used: (M, None),
                torch.tensor(active),
            )
        )
    return results


def everywhere():
    return torch.ones(2, dtype=torch.bool)


def kinds(kind):
    return torch.full((2,), kind, dtype=torch.int64)


def test_a_good_preconditioner_is_tried_third_and_kept():
    solver = PreconditionedSolver(kinds(Kind.NONE), everywhere())
    results = run(solver, lambda r: r / SPREAD)
    assert (solver.kept == Kind.DIRECT).all()
    assert [bool((r.n_iter == 1).all()) for r in results] == [False, False, True, True]
    assert all(r.converged.all() for r in results)


def test_a_bad_preconditioner_costs_at_most_two_solves():
    solver = PreconditionedSolver(kinds(Kind.NONE), everywhere())
    results = run(solver, lambda r: r * SPREAD, solves=6)
    assert not solver.kept.any()
    assert (results[2].n_iter <= 1.5 * results[1].n_iter).all()
    assert [bool(r.converged.all()) for r in results] == [
        number not in TRIALS for number in range(6)
    ]


def test_a_trial_on_easy_right_hand_sides_is_repeated():
    solver = PreconditionedSolver(kinds(Kind.NONE), everywhere())
    easy = torch.eye(40, dtype=DOUBLE)[[7, 7]]  # one iteration, whatever is done
    hard = torch.randn(2, 40, generator=generator(1), dtype=DOUBLE)
    counts = []
    for b in (easy, easy, easy, hard, hard):
        result = solver.solve(
            lambda x: SPREAD * x,
            b,
            torch.full((2,), 1e-6, dtype=DOUBLE),
            500,
            lambda used: (lambda r: r / SPREAD, None),
            everywhere(),
        )
        counts.append(int(result.n_iter.max()))
    assert counts[:3] == [1, 1, 1] and counts[3] > 20 and counts[4] == 1
    assert (solver.kept == Kind.DIRECT).all()


def test_samples_decide_for_themselves():
    good_for_the_first = torch.stack([1 / SPREAD[0], SPREAD[1]])
    solver = PreconditionedSolver(kinds(Kind.NONE), everywhere())
    run(solver, lambda r: r * good_for_the_first)
    assert solver.kept.tolist() == [Kind.DIRECT, Kind.NONE]


def test_samples_that_rest_do_not_try():
    solver = PreconditionedSolver(kinds(Kind.NONE), everywhere())
    run(solver, lambda r: r / SPREAD, active=(True, False))
    assert solver.kept.tolist() == [Kind.DIRECT, Kind.NONE]
    assert solver.solves.tolist() == [4, 0]


def test_unusable_samples_go_without():
    solver = PreconditionedSolver(kinds(Kind.NONE), torch.tensor([True, False]))
    run(solver, lambda r: r / SPREAD)
    assert solver.kept.tolist() == [Kind.DIRECT, Kind.NONE]


def test_without_trial_a_preconditioner_is_used_from_the_start():
    solver = PreconditionedSolver(kinds(Kind.DIRECT))
    results = run(solver, lambda r: r / SPREAD, solves=2)
    assert all((r.n_iter == 1).all() for r in results)


def test_solves_without_activity_leave_the_trial_alone():
    solver = PreconditionedSolver(kinds(Kind.NONE), everywhere())
    b = torch.ones(2, 40, dtype=DOUBLE)
    rtol = torch.full((2,), 1e-6, dtype=DOUBLE)
    for _ in range(4):
        solver.solve(
            lambda x: SPREAD * x,
            b,
            rtol,
            500,
            lambda used: (lambda r: r / SPREAD, None),
        )
    assert not solver.kept.any() and (solver.solves == 0).all()


def inner_solves(cost, accuracy=0.1, model=SPREAD):
    """Makes an inner solve with a model of the operator, as accurately as told."""
    made = []

    def preconditioner(used):
        rtol = torch.full((2,), accuracy, dtype=DOUBLE).where(used == 2, torch.inf)
        costs = torch.full((2,), cost, dtype=DOUBLE)
        made.append(InnerSolve(lambda x: model * x, rtol, costs, lambda r: r))

        def apply(r):
            direct = (used == Kind.DIRECT)[:, None]
            return torch.where(direct, r / SPREAD**0.8, made[-1](r))

        return apply, made[-1]

    return preconditioner, made


def solve_once(solver, preconditioner, b=None, n=2):
    if b is None:
        b = torch.randn(2, 40, generator=generator(1), dtype=DOUBLE)
    return solver.solve(
        lambda x: SPREAD[:n] * x,
        b[:n],
        torch.full((n,), 1e-6, dtype=DOUBLE),
        500,
        preconditioner,
        torch.ones(n, dtype=torch.bool),
    )


def test_an_inner_solve_replaces_iterations_of_the_outer_one():
    counts = []
    for kind in (Kind.NONE, Kind.INNER):
        preconditioner, made = inner_solves(0.1)
        result = solve_once(PreconditionedSolver(kinds(kind)), preconditioner)
        assert result.converged.all()
        counts.append(result.n_iter)
    assert (8 * counts[1] < counts[0]).all()
    torch.testing.assert_close(made[0].work, 0.1 * made[0].n_iter.double())


@pytest.mark.parametrize(("cost", "kept"), [(0.0, Kind.INNER), (1.0, Kind.DIRECT)])
def test_the_work_of_an_inner_solve_counts_in_a_trial(cost, kept):
    # Exact, but the formula takes less time than forty inner iterations.
    solver = PreconditionedSolver(kinds(Kind.INNER), everywhere())
    preconditioner, _ = inner_solves(cost, accuracy=1e-8)
    for _ in range(3):
        solve_once(solver, preconditioner)
    assert (solver.kept == kept).all()


def test_the_work_of_a_sample_does_not_depend_on_its_batch():
    b = torch.randn(2, 40, generator=generator(1), dtype=DOUBLE)
    b[0, 20:] = 0  # the first sample is solved sooner
    work = []
    for n in (1, 2):
        made = []

        def preconditioner(used, made=made, n=n):
            costs, rtol = torch.ones(2, n, dtype=DOUBLE)
            model = SPREAD[:n].square()
            made.append(InnerSolve(lambda x: model * x, 0.5 * rtol, costs, lambda r: r))
            return made[0], made[0]

        solver = PreconditionedSolver(kinds(Kind.INNER)[:n])
        result = solve_once(solver, preconditioner, b, n)
        work.append((int(result.n_iter[0]), float(made[0].work[0])))
        if n == 2:
            assert result.n_iter[1] > result.n_iter[0]
    assert work[0] == work[1]


def test_the_operator_gets_samples_in_memory_of_their_own():
    def H(v):
        assert v.is_contiguous() and v.stride(0) > 0
        return 2 * v

    values, error = diagonal(H, torch.zeros(3, 1, 4, 5))
    assert (values == 2).all() and not error.any()


def trusting(model, sizes, n=2, rtol=0.5):
    """Solves a sequence; returns the results and how often the operator was applied."""
    solver = PreconditionedSolver(torch.full((n,), Kind.DIRECT))
    b = torch.randn(2, 40, generator=generator(1), dtype=DOUBLE)[:n]
    calls, results = [], []

    def A(x):
        calls[-1] += 1
        return SPREAD[:n] * x

    for size in sizes:
        calls.append(0)
        results.append(
            solver.solve(
                A,
                torch.as_tensor(size, dtype=DOUBLE).expand(n)[:, None] * b,
                torch.full((n,), rtol, dtype=DOUBLE),
                500,
                lambda used: (lambda r: r / model[:n], None),
                torch.ones(n, dtype=torch.bool),
            )
        )
    return results, calls


def test_a_good_preconditioner_is_trusted_once_seen():
    results, calls = trusting(1.1 * SPREAD, [1.0, 0.5, 0.25])
    assert calls == [1, 0, 0]
    for result, size in zip(results[1:], (0.5, 0.25), strict=True):
        assert result.converged.all() and (result.n_iter == 0).all()
        assert (result.residual < 0.5 / TRUST).all()
        torch.testing.assert_close(result.x, size * results[0].x / 1.1)


def test_a_poor_preconditioner_is_not_trusted():
    results, calls = trusting(torch.ones_like(SPREAD), [1.0, 0.5, 0.25])
    assert min(calls) > 0
    assert all((r.n_iter > 0).all() for r in results)


def test_trust_in_one_preconditioner_is_not_trust_in_another():
    solver = PreconditionedSolver(torch.tensor([Kind.INNER]))
    b = torch.randn(1, 40, generator=generator(1), dtype=DOUBLE)
    calls = []

    def A(x):
        calls[-1] += 1
        return SPREAD[:1] * x

    for at_first in (lambda: torch.tensor([True]), None, None):
        calls.append(0)
        solver.kept.fill_(Kind.NONE if at_first else Kind.INNER)
        solver.solve(
            A,
            0.5 ** len(calls) * b,
            torch.full((1,), 0.5, dtype=DOUBLE),
            500,
            lambda used: (lambda r: r / SPREAD[:1], None),
            torch.ones(1, dtype=torch.bool),
            at_first,
        )
    assert calls == [1, 1, 0]


def test_an_inner_solve_that_is_as_hard_as_the_outer_one_is_given_up():
    # It stops after 30 iterations and has reached little.
    preconditioner, _ = inner_solves(0.01, accuracy=1e-9, model=SPREAD**2)
    solver = PreconditionedSolver(kinds(Kind.INNER))
    result = solve_once(solver, preconditioner)
    assert (result.residual ** (1 / result.n_iter) > FAILING).any()
    assert (solver.kept == Kind.NONE).any()
    good = PreconditionedSolver(kinds(Kind.INNER))
    solve_once(good, inner_solves(0.01)[0])
    assert (good.kept == Kind.INNER).all()


def test_trust_is_lost_where_the_right_hand_side_grew():
    _, calls = trusting(1.1 * SPREAD, [1.0, 0.5, 0.6, 0.5])
    assert calls == [1, 0, 1, 0]


def test_trust_is_a_matter_of_samples():
    model = torch.stack([1.1 * SPREAD[0], torch.ones(40, dtype=DOUBLE)])
    both, _ = trusting(model, [1.0, 0.5])
    one, _ = trusting(model, [1.0, 0.5], n=1)
    assert both[1].n_iter[0] == 0 and both[1].n_iter[1] > 0
    torch.testing.assert_close(both[1].x[:1], one[1].x, rtol=1e-14, atol=0)
    torch.testing.assert_close(both[1].residual[:1], one[1].residual)
