"""Conjugate gradients against dense solves and SciPy, and each sample on its own."""

from __future__ import annotations

import pytest
import scipy.sparse.linalg
import torch
from helpers import Counted, batched_map, random, spd_matrix, spd_system
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from deepinv_deal.solvers import ConvergenceWarning, SolverResult, Status
from deepinv_deal.solvers import conjugate_gradient as cg

CONDS = (3.0, 1.0, 300.0, 30.0)  # samples that need different numbers of iterations


def relative_residual(A, b, x) -> torch.Tensor:
    return torch.linalg.vector_norm(b - A(x), dim=1) / torch.linalg.vector_norm(
        b, dim=1
    )


def assert_same(actual: SolverResult, expected: SolverResult) -> None:
    """The same numbers, bit by bit."""
    assert torch.equal(actual.n_iter, expected.n_iter)
    assert torch.equal(actual.status, expected.status)
    assert torch.equal(actual.x, expected.x)
    assert torch.equal(actual.residual, expected.residual)


def cat(results: list[SolverResult]) -> SolverResult:
    fields = ("x", "status", "n_iter", "residual")
    return SolverResult(*(torch.cat([getattr(r, f) for r in results]) for f in fields))


# -- the solution --------------------------------------------------------------


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    conds=st.lists(st.floats(1, 1e4), min_size=1, max_size=5),
    log_scale=st.sampled_from([-8, -4, 0, 3, 8]),
)
def test_solves_random_systems_of_any_scale(seed, n, conds, log_scale):
    rng = torch.Generator().manual_seed(seed)
    matrices, b = spd_system(rng, n, tuple(conds))
    b = b * 10.0**log_scale

    def A(v):
        return (matrices @ v[..., None])[..., 0]

    result = cg(A, b, rtol=1e-10, max_iter=3000)
    assert result.converged.all()
    assert relative_residual(A, b, result.x).max() <= 1.01e-10
    # Eigenvalues lie in [1, cond]: the error is at most the residual, b at most cond x.
    expected = torch.linalg.solve(matrices, b)
    error = torch.linalg.vector_norm(result.x - expected, dim=1)
    assert (error <= 2e-10 * torch.linalg.vector_norm(b, dim=1)).all()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    conds=st.lists(st.floats(1, 1e4), min_size=1, max_size=5),
    log_scale=st.sampled_from([-8, 0, 8]),
)
def test_float32_is_as_accurate_as_its_rounding_allows(seed, n, conds, log_scale):
    rng = torch.Generator().manual_seed(seed)
    matrices, b = spd_system(rng, n, tuple(conds), dtype=torch.float32)
    b = b * 10.0**log_scale

    def A(v):
        return (matrices @ v[..., None])[..., 0]

    result = cg(A, b, rtol=1e-6, max_iter=150)
    expected = torch.linalg.solve(matrices.double(), b.double())
    error = torch.linalg.vector_norm(result.x - expected, dim=1)
    error = error / torch.linalg.vector_norm(expected, dim=1)
    eps = torch.finfo(torch.float32).eps
    assert (error <= 20 * eps * torch.tensor(conds)).all()
    # The status agrees with the true residual, up to the rounding of that.
    residual = relative_residual(A, b, result.x)
    assert torch.equal(result.converged, result.residual <= 1e-6)
    assert ((residual - result.residual).abs() <= 10 * eps * torch.tensor(conds)).all()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize(
    "preconditioned", [False, True], ids=["plain", "preconditioned"]
)
def test_iterates_are_those_of_scipy(k, start, preconditioned, rng):
    A, b = spd_matrix(rng, 12, 50.0), random(rng, 12)
    M = spd_matrix(rng, 12, 5.0) if preconditioned else None
    x0 = random(rng, 12) if start == "random" else None
    expected, info = scipy.sparse.linalg.cg(
        A.numpy(),
        b.numpy(),
        x0=None if x0 is None else x0.numpy(),
        rtol=0,
        maxiter=k,
        M=None if M is None else M.numpy(),
    )
    result = cg(
        lambda v: v @ A,
        b[None],
        init=None if x0 is None else x0[None],
        rtol=0,
        max_iter=k,
        preconditioner=None if M is None else lambda v: v @ M,
    )
    assert info == k == result.n_iter
    expected = torch.from_numpy(expected)
    torch.testing.assert_close(result.x[0], expected, rtol=1e-10, atol=1e-12)


def test_a_good_preconditioner_saves_iterations_but_keeps_the_solution(rng):
    matrices, b = spd_system(rng, 30, (1e3, 1e3))
    approximate_inverse = torch.linalg.inv(matrices + 0.01 * torch.eye(30))
    A = batched_map(matrices)
    plain = cg(A, b, rtol=1e-10, max_iter=500)
    fast = cg(
        A, b, rtol=1e-10, max_iter=500, preconditioner=batched_map(approximate_inverse)
    )
    assert fast.converged.all() and plain.converged.all()
    assert (2 * fast.n_iter < plain.n_iter).all()
    torch.testing.assert_close(fast.x, plain.x, rtol=1e-6, atol=1e-8)


def test_hermitian_systems_are_solved(rng):
    factor = torch.complex(random(rng, 8, 8), random(rng, 8, 8))
    matrix = torch.eye(8) + factor @ factor.mH / 8
    b = torch.complex(random(rng, 2, 8), random(rng, 2, 8))
    result = cg(lambda v: v @ matrix.T, b, rtol=1e-12)
    assert result.converged.all() and not result.residual.is_complex()
    expected = torch.linalg.solve(matrix, b.T).T
    torch.testing.assert_close(result.x, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 3, 5, 4), (3, 7)], ids=str)
def test_samples_may_have_any_shape(shape, rng):
    b = random(rng, *shape)
    result = cg(lambda v: 4 * v, b)
    assert result.x.shape == shape and result.residual.shape == shape[:1]
    torch.testing.assert_close(result.x, b / 4)


def test_an_empty_batch_is_solved():
    result = cg(lambda v: 2 * v, torch.zeros(0, 3))
    assert result.x.shape == (0, 3) and result.status.shape == (0,)


# -- samples are independent ---------------------------------------------------


@pytest.mark.parametrize("verify", [True, False], ids=["verify", "trust"])
@pytest.mark.parametrize(
    "preconditioned", [False, True], ids=["plain", "preconditioned"]
)
def test_a_batch_gives_what_its_samples_give_alone(preconditioned, verify, rng):
    matrices, b = spd_system(rng, 20, CONDS)
    inverses = torch.stack([torch.diag(1 / m.diagonal()) for m in matrices])

    def solve(rows):
        return cg(
            batched_map(matrices[rows]),
            b[rows],
            rtol=1e-8,
            preconditioner=batched_map(inverses[rows]) if preconditioned else None,
            verify=verify,
        )

    together = solve(slice(None))
    assert together.converged.all() and len(together.n_iter.unique()) > 2
    assert_same(together, cat([solve([i]) for i in range(len(b))]))


@pytest.mark.parametrize("max_iter", [40, 120])
@pytest.mark.parametrize("check_every", [1, 7])
def test_samples_stay_independent_at_the_limit_of_float32(max_iter, check_every, rng):
    # The recursion is too optimistic here: samples restart after the slowest is done.
    for _ in range(2):
        matrices, b = spd_system(rng, 40, (3.0, 100.0, 1e3, 1e4), dtype=torch.float32)

        def solve(rows, check_every, matrices=matrices, b=b):
            return cg(
                batched_map(matrices[rows]),
                b[rows],
                rtol=1e-6,
                max_iter=max_iter,
                check_every=check_every,
            )

        together = solve(slice(None), check_every)
        assert_same(together, cat([solve([i], 1) for i in range(4)]))
        assert (together.n_iter <= max_iter).all()


def test_permuting_the_batch_permutes_the_result(rng):
    matrices, b = spd_system(rng, 20, CONDS)
    order = torch.tensor([2, 0, 3, 1])
    straight = cg(batched_map(matrices), b)
    permuted = cg(batched_map(matrices[order]), b[order])
    assert torch.equal(permuted.x, straight.x[order])
    assert torch.equal(permuted.n_iter, straight.n_iter[order])


@pytest.mark.parametrize("scale", [2.0**-27, 2.0**27], ids=["tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_result_scales_with_the_right_hand_side(scale, dtype, rng):
    matrices, b = spd_system(rng, 20, CONDS, dtype=dtype)
    A, init = batched_map(matrices), random(rng, 4, 20, dtype=dtype)
    for start in (None, init):
        expected = cg(A, b, init=start)
        actual = cg(A, scale * b, init=None if start is None else scale * start)
        assert torch.equal(actual.n_iter, expected.n_iter)
        assert torch.equal(actual.x, scale * expected.x)  # powers of two: no rounding


def test_a_zero_sample_costs_nothing_and_stays_zero(rng):
    matrices, b = spd_system(rng, 20, CONDS)
    b[1] = 0
    for init in (None, random(rng, 4, 20)):
        result = cg(batched_map(matrices), b, init=init)
        assert result.n_iter[1] == 0 and result.residual[1] == 0
        assert result.x[1].abs().max() == 0
        assert result.converged.all() and (result.n_iter > 0).tolist().count(True) == 3


# -- start, stop and cost ------------------------------------------------------


def test_solved_at_the_start_means_no_iterations(rng):
    matrices, b = spd_system(rng, 20, CONDS)
    init = torch.linalg.solve(matrices, b)
    result = cg(batched_map(matrices), b, init=init)
    assert result.n_iter.tolist() == [0, 0, 0, 0] and result.converged.all()
    torch.testing.assert_close(result.x, init, rtol=1e-14, atol=0)


def test_init_and_right_hand_side_are_not_modified(rng):
    matrices, b = spd_system(rng, 20, CONDS)
    init = random(rng, 4, 20)
    before = init.clone(), b.clone()
    result = cg(batched_map(matrices), b, init=init)
    assert torch.equal(init, before[0]) and torch.equal(b, before[1])
    assert result.x.data_ptr() != init.data_ptr()


@pytest.mark.parametrize(
    "init, verify, extra",
    [(False, False, 0), (False, True, 1), (True, False, 1), (True, True, 2)],
)
def test_the_operator_is_applied_once_per_iteration(init, verify, extra, rng):
    matrices, b = spd_system(rng, 20, CONDS)
    A = Counted(batched_map(matrices))
    result = cg(A, b, init=random(rng, 4, 20) if init else None, verify=verify)
    assert result.converged.all()
    assert A.calls == result.n_iter.max() + extra


def test_a_zero_system_does_not_apply_the_operator():
    A = Counted(lambda v: v)
    result = cg(A, torch.zeros(2, 5))
    assert A.calls == 0 and result.converged.all()


@pytest.mark.parametrize("check_every", [2, 3, 7, 100])
def test_check_every_does_not_change_results(check_every, rng):
    matrices, b = spd_system(rng, 20, CONDS)
    A = batched_map(matrices)
    for max_iter in (10, 11, 100):
        actual = cg(A, b, max_iter=max_iter, check_every=check_every)
        assert_same(actual, cg(A, b, max_iter=max_iter))


def test_stops_at_the_first_iterate_within_the_tolerance(rng):
    matrices, b = spd_system(rng, 20, CONDS)
    A = batched_map(matrices)
    result = cg(A, b, rtol=1e-4)
    assert (result.residual <= 1e-4).all()
    for i, n in enumerate(result.n_iter.tolist()):
        earlier = cg(A, b, rtol=0, max_iter=n - 1)
        assert relative_residual(A, b, earlier.x)[i] > 1e-4


def test_tolerance_may_differ_between_samples(rng):
    matrices, b = spd_system(rng, 20, (100.0,))
    A = batched_map(matrices.expand(3, 20, 20))
    rtol = torch.tensor([1e-2, 1e-9, 1e-5])
    result = cg(A, b.expand(3, 20), rtol=rtol)
    assert result.converged.all() and (result.residual <= rtol).all()
    assert result.n_iter[0] < result.n_iter[2] < result.n_iter[1]
    alone = cg(A, b.expand(3, 20), rtol=1e-5)
    assert torch.equal(alone.x[2], result.x[2])


def test_rtol_zero_runs_max_iter_iterations(rng):
    matrices, b = spd_system(rng, 20, (30.0, 300.0))
    A = Counted(batched_map(matrices))
    result = cg(A, b, rtol=0, max_iter=9)
    assert result.n_iter.tolist() == [9, 9] and A.calls == 10


@pytest.mark.parametrize("verify", [True, False], ids=["verify", "trust"])
def test_a_residual_that_vanishes_is_no_breakdown(verify, rng):
    # In float32 the curvature of a small operator underflows before the residual does.
    matrices, b = spd_system(rng, 10, (3.0,), dtype=torch.float32)
    A = batched_map(1e-3 * matrices)
    result = cg(A, b, rtol=0, max_iter=100, verify=verify)
    assert result.status < Status.BREAKDOWN
    assert relative_residual(A, b, result.x) < 1e-6


@pytest.mark.parametrize("verify", [True, False], ids=["verify", "trust"])
@pytest.mark.parametrize("max_iter", [3, 100])
def test_the_reported_residual_is_the_true_one(max_iter, verify, rng):
    matrices, b = spd_system(rng, 20, CONDS)
    A = batched_map(matrices)
    result = cg(A, b, max_iter=max_iter, verify=verify)
    expected = relative_residual(A, b, result.x)
    torch.testing.assert_close(result.residual, expected, rtol=1e-8, atol=1e-14)


def test_verification_corrects_a_recursion_that_was_too_optimistic(rng):
    # Close to the limit of float32, where the residual itself is known to 20 %.
    matrices, b = spd_system(rng, 40, (1e3,) * 8, dtype=torch.float32)
    A, rtol = batched_map(matrices), 2e-5

    def true_residual(result):
        exact = batched_map(matrices.double())
        return relative_residual(exact, b.double(), result.x.double())

    trusting = cg(A, b, rtol=rtol, max_iter=500, verify=False)
    verified = cg(A, b, rtol=rtol, max_iter=500)
    assert trusting.converged.all() and (true_residual(trusting) > 1.2 * rtol).any()
    assert verified.converged.any()
    assert (true_residual(verified)[verified.converged] <= 1.2 * rtol).all()
    assert true_residual(verified).max() < true_residual(trusting).max()
    assert (verified.n_iter >= trusting.n_iter).all()


# -- samples that fail ---------------------------------------------------------


def test_too_few_iterations_are_flagged_for_those_samples_only(rng):
    matrices, b = spd_system(rng, 20, CONDS)
    result = cg(batched_map(matrices), b, max_iter=12)
    expected = [Status.CONVERGED, Status.CONVERGED, Status.MAX_ITER, Status.MAX_ITER]
    assert result.status.tolist() == expected
    assert result.n_iter[2:].tolist() == [12, 12]


def test_no_iterations_return_the_start(rng):
    matrices, b = spd_system(rng, 20, CONDS)
    init = random(rng, 4, 20)
    result = cg(batched_map(matrices), b, init=init, max_iter=0)
    torch.testing.assert_close(result.x, init, rtol=1e-14, atol=0)
    assert result.status.tolist() == [Status.MAX_ITER] * 4


@pytest.mark.parametrize("verify", [True, False], ids=["verify", "trust"])
def test_an_indefinite_sample_breaks_down_alone(verify, rng):
    matrices, b = spd_system(rng, 20, CONDS)
    clean = cg(batched_map(matrices), b, verify=verify)
    matrices[1] = -torch.eye(20)
    result = cg(batched_map(matrices), b, verify=verify)
    assert result.status.tolist() == [0, Status.BREAKDOWN, 0, 0]
    assert result.n_iter[1] == 0 and result.x[1].isfinite().all()
    keep = [0, 2, 3]
    assert torch.equal(result.x[keep], clean.x[keep])
    assert torch.equal(result.n_iter[keep], clean.n_iter[keep])


def test_a_singular_direction_is_a_breakdown():
    b = torch.tensor([[0.0, 1.0]])
    result = cg(lambda v: v * torch.tensor([1.0, 0.0]), b)
    assert result.status.tolist() == [Status.BREAKDOWN]


def test_a_consistent_singular_system_is_solved():
    b = torch.tensor([[3.0, 0.0, 1.0]])
    result = cg(lambda v: v * torch.tensor([1.0, 0.0, 2.0]), b)
    assert result.converged.all()
    torch.testing.assert_close(result.x, torch.tensor([[3.0, 0.0, 0.5]]))


@pytest.mark.parametrize("where", ["b", "init"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_input_is_flagged_on_that_sample_only(where, value, rng):
    matrices, b = spd_system(rng, 20, CONDS)
    init = random(rng, 4, 20)
    clean = cg(batched_map(matrices), b, init=init)
    (b if where == "b" else init)[2, 5] = value
    result = cg(batched_map(matrices), b, init=init)
    assert result.status.tolist() == [0, 0, Status.NON_FINITE, 0]
    keep = [0, 1, 3]
    assert torch.equal(result.x[keep], clean.x[keep])
    assert torch.equal(result.n_iter[keep], clean.n_iter[keep])


@pytest.mark.parametrize("verify", [True, False], ids=["verify", "trust"])
@pytest.mark.parametrize("lasting", [True, False], ids=["for-good", "once"])
def test_nan_from_the_operator_midway_is_flagged_on_that_sample_only(
    lasting, verify, rng
):
    matrices, b = spd_system(rng, 20, CONDS)
    clean = cg(batched_map(matrices), b, verify=verify)

    def faulty(v):
        q = batched_map(matrices)(v)
        if A.calls == 3 or lasting and A.calls > 3:
            q[2, 0] = torch.nan
        return q

    A = Counted(faulty)
    result = cg(A, b, verify=verify)
    assert result.status.tolist() == [0, 0, Status.NON_FINITE, 0]
    assert result.n_iter[2] == 2 and result.x.isfinite().all()
    keep = [0, 1, 3]
    assert torch.equal(result.x[keep], clean.x[keep])
    assert torch.equal(result.n_iter[keep], clean.n_iter[keep])


def test_bad_arguments_are_refused():
    b = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"init must have the shape of b, \(2, 3\)"):
        cg(lambda v: v, b, init=torch.ones(2, 4))
    with pytest.raises(ValueError, match="rtol must not be negative, got -1"):
        cg(lambda v: v, b, rtol=-1)
    with pytest.raises(ValueError, match="max_iter must not be negative, got -2"):
        cg(lambda v: v, b, max_iter=-2)


# -- the result ----------------------------------------------------------------


def test_a_warning_names_the_worst_sample():
    result = SolverResult(
        torch.zeros(4, 2),
        torch.tensor([Status.CONVERGED, Status.MAX_ITER, 0, Status.MAX_ITER]),
        torch.tensor([3, 50, 4, 40]),
        torch.tensor([1e-6, 2e-3, 1e-6, 4e-2]),
    )
    assert result.converged.tolist() == [True, False, True, False]
    message = (
        r"Denoising did not converge for 2 of 4 samples \(index 1, 3\). Worst: "
        r"MAX_ITER after 40 iterations, relative residual 4.0e-02, asked for 1.0e-05. "
        r"Wait longer."
    )
    with pytest.warns(ConvergenceWarning, match=message):
        result.report("Denoising", 1e-5, "Wait longer.")


def test_a_warning_takes_nan_for_the_worst_and_abbreviates_long_lists():
    n = 12
    residual = torch.full((n,), 0.5)
    residual[4] = torch.nan
    status = torch.full((n,), Status.MAX_ITER)
    status[4] = Status.NON_FINITE
    result = SolverResult(torch.zeros(n, 2), status, torch.ones(n), residual)
    with pytest.warns(ConvergenceWarning, match=r"6, 7, \.\.\.\). Worst: NON_FINITE"):
        result.report("It", 0.1, "")


def test_a_converged_result_does_not_warn():
    cg(lambda v: v, torch.ones(2, 3)).report("It", 1e-5, "")


# -- cost on an accelerator ----------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations that are launches on an accelerator, and waits for results."""

    views = ("view", "expand", "_unsafe_view", "alias", "detach", "select", "slice")

    def __init__(self):
        super().__init__()
        self.launches, self.waits, self.paused = 0, 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not self.paused and name not in self.views:
            self.waits += name == "_local_scalar_dense"
            self.launches += name != "_local_scalar_dense"
        return function(*args, **(kwargs or {}))

    def without(self, A):
        """The operator ``A``, whose own operations do not count."""

        def uncounted(v):
            self.paused = True
            q = A(v)
            self.paused = False
            return q

        return uncounted


def operations(matrices, b, **options) -> Operations:
    with Operations() as counted:
        cg(counted.without(batched_map(matrices)), b, **options)
    return counted


def test_the_vector_work_of_a_step_is_few_operations(rng):
    matrices, b = spd_system(rng, 20, CONDS)
    few, many = (
        operations(matrices, b, rtol=0, max_iter=n, verify=False) for n in (4, 9)
    )
    assert (many.launches - few.launches) / 5 <= 20


@pytest.mark.parametrize("verify", [True, False], ids=["verify", "trust"])
def test_a_fixed_number_of_iterations_waits_for_nothing(verify, rng):
    matrices, b = spd_system(rng, 20, CONDS)
    counted = operations(matrices, b, rtol=0, max_iter=9, verify=verify)
    assert counted.waits == 0


def test_the_host_waits_once_per_check(rng):
    matrices, b = spd_system(rng, 20, CONDS)
    n = int(cg(batched_map(matrices), b).n_iter.max())
    counted = operations(matrices, b, check_every=8, verify=False)
    assert n > 16 and counted.waits == -(-n // 8)


# -- preconditioners that change -----------------------------------------------


def varying(matrices):
    """About the inverse, by a solve that stops early."""
    calls = []

    def apply(r):
        calls.append(r)
        return cg(batched_map(matrices), r, rtol=0.5, verify=False).x

    return apply, calls


def test_flexible_directions_bear_a_preconditioner_that_varies():
    matrices, b = spd_system(torch.Generator().manual_seed(0), 60, (1e3, 1e2))
    counts = []
    for flexible in (True, False):
        M, _ = varying(matrices)
        result = cg(
            batched_map(matrices),
            b,
            rtol=1e-8,
            max_iter=2000,
            preconditioner=M,
            flexible=flexible,
        )
        counts.append(result.n_iter)
        if flexible:
            assert result.converged.all()
            assert relative_residual(batched_map(matrices), b, result.x).max() < 1.1e-8
    assert (1.5 * counts[0] < counts[1]).all()


def test_flexible_directions_are_the_same_for_a_preconditioner_that_does_not_vary():
    matrices, b = spd_system(torch.Generator().manual_seed(1), 30, (1e3, 10))
    inverse = 1 / matrices.diagonal(dim1=1, dim2=2)
    results = [
        cg(
            batched_map(matrices),
            b,
            rtol=1e-9,
            preconditioner=lambda r: inverse * r,
            flexible=flexible,
        )
        for flexible in (True, False)
    ]
    torch.testing.assert_close(results[0].x, results[1].x, rtol=1e-7, atol=1e-9)


def test_a_sample_that_has_stopped_gives_a_flexible_preconditioner_nothing_to_do():
    matrices, b = spd_system(torch.Generator().manual_seed(2), 30, (1.0, 1e3))
    M, calls = varying(matrices)
    result = cg(batched_map(matrices), b, rtol=1e-8, preconditioner=M, flexible=True)
    assert result.n_iter[0] < result.n_iter[1]
    assert all(bool((r[0] == 0).all()) for r in calls[int(result.n_iter[0]) :])
