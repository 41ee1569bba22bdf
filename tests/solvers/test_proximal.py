"""Proximal maps, proximal gradients and ADMM against generic solvers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from helpers import batched_map, random
from torch import Tensor

from deepinv_deal import _batch
from deepinv_deal._batch import inner
from deepinv_deal.solvers import (
    ADMMState,
    LocalProx,
    SolverResult,
    Status,
    admm,
    project_linf,
    proximal,
    proximal_gradient,
    relative_change,
    soft_threshold,
)
from deepinv_deal.solvers.proximal import extrapolated

DOUBLE = torch.float64


# -- proximal maps -------------------------------------------------------------


def test_soft_threshold_is_the_proximal_map_of_the_weighted_l1_norm(rng):
    x, t = 2 * random(rng, 50), random(rng, 50).abs()
    grid = torch.linspace(-8, 8, 160001, dtype=DOUBLE)[:, None]
    best = grid[(0.5 * (grid - x) ** 2 + t * grid.abs()).argmin(0), 0]
    torch.testing.assert_close(soft_threshold(x, t), best, rtol=0, atol=3e-4)
    assert torch.equal(
        soft_threshold(x, 0.7), soft_threshold(x, torch.tensor(0.7, dtype=DOUBLE))
    )


def test_proximal_maps_are_differentiable(rng):
    x = (3 * random(rng, 4, 3, 5)).requires_grad_()
    t = random(rng, 4, 1, 5).abs().requires_grad_()
    for f in (soft_threshold, project_linf):
        assert torch.autograd.gradcheck(f, (x, t))


def test_projection_is_what_soft_thresholding_removes(rng):
    x, t = random(rng, 30), random(rng, 30).abs()
    projected = project_linf(x, t)
    assert (projected.abs() <= t).all()
    torch.testing.assert_close(projected + soft_threshold(x, t), x)


# -- lasso problems ------------------------------------------------------------


class Lasso:
    r"""
    :math:`\tfrac12 \|A x - y\|^2 + \lambda \|x\|_1` for one matrix per sample.

    All arithmetic is done sample by sample, such that batches round as singles.
    """

    def __init__(self, A: Tensor, y: Tensor, weight: float):
        self.A, self.y, self.weight = A, y, weight
        self.L = torch.linalg.matrix_norm(A, 2).square()[:, None]
        self.apply, self.adjoint = batched_map(A), batched_map(A.mT)

    @classmethod
    def draw(cls, rng, n_samples=3, m=20, n=10, weight=3.0):
        return cls(random(rng, n_samples, m, n), random(rng, n_samples, m), weight)

    def sample(self, i: int) -> Lasso:
        return Lasso(self.A[i : i + 1], self.y[i : i + 1], self.weight)

    def value(self, x: Tensor) -> Tensor:
        r = self.apply(x) - self.y
        return 0.5 * r.square().sum(1) + self.weight * x.abs().sum(1)

    def step(self, v: Tensor, _blocks=None) -> Tensor:
        gradient = self.adjoint(self.apply(v) - self.y)
        return soft_threshold(v - gradient / self.L, self.weight / self.L)

    def gap(self, x: Tensor) -> Tensor:
        """Duality gap with the residual scaled into the dual ball."""
        r = self.y - self.apply(x)
        u = r * (self.weight / self.adjoint(r).abs().amax(1, keepdim=True)).clamp(max=1)
        return self.value(x) - 0.5 * (self.y.square() - (self.y - u).square()).sum(1)

    def solve(self, **kwargs) -> SolverResult:
        init = [torch.zeros(len(self.y), self.A.shape[2], dtype=self.y.dtype)]
        return proximal_gradient([self.step], init, **kwargs)

    def solve_generically(self) -> Tensor:
        """Minimisers by a smooth solver for the positive and the negative part."""
        solutions = []
        for A, y in zip(self.A.numpy(), self.y.numpy(), strict=True):
            B = np.hstack([A, -A])

            def objective(p, B=B, y=y):
                r = B @ p - y
                return 0.5 * r @ r + self.weight * p.sum(), B.T @ r + self.weight

            best = scipy.optimize.minimize(
                objective,
                np.zeros(B.shape[1]),
                jac=True,
                bounds=[(0, None)] * B.shape[1],
                method="L-BFGS-B",
                options={"ftol": 1e-16, "gtol": 1e-11, "maxiter": 10000},
            )
            positive, negative = np.split(best.x, 2)
            solutions.append(torch.from_numpy(positive - negative))
        return torch.stack(solutions)


SETTINGS = [
    pytest.param({"inertia": "none"}, id="ista"),
    pytest.param({"inertia": "fista"}, id="fista"),
    pytest.param({"inertia": "palm"}, id="palm"),
    pytest.param({"inertia": "fista", "restart": True}, id="restart"),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_minimises_the_lasso(setting, rng):
    problem = Lasso.draw(rng)
    result = problem.solve(rtol=1e-9, max_iter=20000, **setting)
    assert result.converged.all()
    expected = problem.solve_generically()
    torch.testing.assert_close(result.x, expected, rtol=0, atol=2e-5)
    assert (problem.value(result.x) <= problem.value(expected) + 1e-9).all()
    assert (result.x == 0).any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_batch_gives_what_its_samples_give_alone(setting, rng):
    problem = Lasso.draw(rng)
    batch = problem.solve(rtol=1e-6, max_iter=5000, **setting)
    assert len(batch.n_iter.unique()) > 1, "samples must stop at different times"
    for i in range(3):
        single = problem.sample(i).solve(rtol=1e-6, max_iter=5000, **setting)
        assert torch.equal(single.x[0], batch.x[i])
        for name in ("n_iter", "status", "residual"):
            assert getattr(single, name)[0] == getattr(batch, name)[i]


def test_inertia_and_restart_change_the_iterates_and_accelerate(rng):
    problem = Lasso.draw(rng, m=12, n=20, weight=0.02)
    runs = [problem.solve(rtol=0, max_iter=60, **p.values[0]) for p in SETTINGS]
    for i, run in enumerate(runs):
        assert all(not torch.equal(run.x, other.x) for other in runs[:i])
    plain, *accelerated = [problem.value(run.x) for run in runs]
    assert all((values < plain).all() for values in accelerated)


def fista_by_hand(step, x, n, weights):
    previous = x
    for w in weights[:n]:
        x, previous = step(x + w * (x - previous)), x
    return x


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("inertia", ["fista", "palm"])
def test_iterates_are_those_of_the_papers(n, inertia, rng):
    t = [1.0]
    for _ in range(8):
        t.append((1 + (1 + 4 * t[-1] ** 2) ** 0.5) / 2)
    weights = {
        "fista": [(a - 1) / b for a, b in zip(t, t[1:], strict=False)],
        "palm": [(k - 1) / (k + 2) for k in range(1, 9)],
    }[inertia]
    problem = Lasso.draw(rng)
    init = random(rng, 3, 10)
    before = init.clone()
    result = proximal_gradient(
        [problem.step], [init], inertia=inertia, rtol=0, max_iter=n
    )
    expected = fista_by_hand(problem.step, init, n, weights)
    torch.testing.assert_close(result.x, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(init, before)
    assert (result.n_iter == n).all() and (result.status == Status.MAX_ITER).all()


def test_restart_forgets_the_momentum_of_single_samples(rng):
    # A quadratic with strong overshooting in the first sample only.
    L = torch.tensor([[1.0, 1e-3], [1.0, 1.0]], dtype=DOUBLE)
    init = [torch.ones(2, 2, dtype=DOUBLE)]

    def step(v, _):
        return v - 0.5 * L * v

    plain = proximal_gradient([step], init, rtol=0, max_iter=400)
    restarted = proximal_gradient([step], init, restart=True, rtol=0, max_iter=400)
    assert (restarted.x.norm(dim=1) < 1e-3 * plain.x.norm(dim=1))[0]


def test_small_changes_after_a_restart_are_not_taken_for_convergence():
    # The second sample restarts every few iterations.
    L = torch.tensor([[1.0, 1e-3], [1.0, 0.5]], dtype=DOUBLE)
    init = [torch.zeros(2, 2, dtype=DOUBLE)]

    def run(settle):
        result = proximal_gradient(
            [lambda v, _: v - 0.9 * L * (v - 1)],
            init,
            restart=True,
            settle=settle,
            rtol=1e-3,
        )
        assert result.converged.all() and (result.residual <= 1e-3).all()
        return (result.x - 1).norm(dim=1), result.n_iter

    (hasty, _), (patient, n_iter) = run(0), run(5)
    assert hasty[0] > 0.9 and patient[0] < 0.01
    assert patient[1] < 0.01 and n_iter[1] < 20


def test_a_linear_image_that_is_extrapolated_too_changes_nothing_but_the_work(rng):
    W = random(rng, 7, 5) / 4
    b, init = random(rng, 2, 7), random(rng, 2, 5)

    def step(v, _):
        return soft_threshold(v - (v @ W.T - b) @ W, 0.01)

    def joint(blocks, previous, w):
        v, Wv = map(extrapolated, blocks, previous, (w, w))
        new = soft_threshold(v - (Wv - b) @ W, 0.01)
        return (new, new @ W.T), inner(v - new, new - blocks[0])

    for restart in (False, True):
        one = proximal_gradient([step], [init], restart=restart, rtol=0, max_iter=200)
        two = proximal_gradient(
            joint, [init, init @ W.T], restart=restart, rtol=0, max_iter=200
        )
        torch.testing.assert_close(two.x, one.x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(two.state[1], two.x @ W.T)
    # The restarts changed something.
    slow = proximal_gradient(joint, [init, init @ W.T], rtol=0, max_iter=20)
    fast = proximal_gradient(
        joint, [init, init @ W.T], restart=True, rtol=0, max_iter=20
    )
    assert (slow.x - fast.x).abs().max() > 1e-6


# -- stopping ------------------------------------------------------------------


def test_the_duality_gap_may_stop_the_iteration(rng):
    problem = Lasso.draw(rng)
    result = problem.solve(
        measure=lambda new, old: problem.gap(new[0]), rtol=1e-3, max_iter=5000
    )
    assert result.converged.all()
    best = problem.value(problem.solve_generically())
    error = problem.value(result.x) - best
    assert (error <= 1e-3 + 1e-9).all() and (result.residual <= 1e-3).all()
    torch.testing.assert_close(result.residual, problem.gap(result.x))


def test_tolerances_differ_by_sample(rng):
    problem = Lasso.draw(rng)
    rtol = torch.tensor([1e-2, 1e-6, 1e-4], dtype=DOUBLE)
    result = problem.solve(rtol=rtol, max_iter=5000)
    assert (result.residual <= rtol).all()
    for i in range(3):
        single = problem.sample(i).solve(rtol=float(rtol[i]), max_iter=5000)
        assert torch.equal(single.x[0], result.x[i])


def test_the_measure_is_looked_at_every_few_iterations_only(rng):
    problem = Lasso.draw(rng)
    looks = []

    def measure(new, old):
        looks.append(1)
        return relative_change(new, old)

    rare = problem.solve(measure=measure, rtol=1e-5, check_every=7, max_iter=5000)
    assert (rare.n_iter % 7 == 0).all()
    assert len(looks) == int(rare.n_iter.max()) // 7
    often = problem.solve(rtol=1e-5, max_iter=5000)
    assert (often.n_iter <= rare.n_iter).all()
    last = problem.solve(measure=measure, rtol=0, check_every=7, max_iter=9)
    assert (last.n_iter == 9).all() and last.residual.isfinite().all()


def test_failures_are_told_per_sample(rng):
    problem = Lasso.draw(rng, n_samples=2)

    def step(v, _):
        return problem.step(v) * torch.tensor([[1.0], [torch.nan]], dtype=DOUBLE)

    init = random(rng, 2, 10)
    result = proximal_gradient([step], [init], rtol=1e-5, max_iter=5000)
    assert result.status.tolist() == [Status.CONVERGED, Status.NON_FINITE]
    assert torch.equal(result.x[1], init[1])
    few = problem.solve(rtol=1e-8, max_iter=3)
    assert (few.status == Status.MAX_ITER).all() and (few.n_iter == 3).all()


def test_a_zero_sample_has_not_changed():
    zero = torch.zeros(2, 3)
    assert torch.equal(relative_change((zero,), (zero,)), torch.zeros(2))
    assert torch.equal(relative_change((zero,), (zero + 1,)), torch.ones(2))


def test_unrolled_iterations_are_differentiable(rng):
    A, y = random(rng, 1, 5, 4), random(rng, 1, 5).requires_grad_()

    def unrolled(y):
        return Lasso(A, y, 0.1).solve(rtol=0, max_iter=5).x

    assert torch.autograd.gradcheck(unrolled, (y,))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"inertia": "heavy"},
        {"rtol": -1.0},
        {"rtol": float("nan")},
        {"max_iter": -1},
        {"check_every": 0},
    ],
    ids=str,
)
def test_bad_settings_are_refused(kwargs, rng):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        Lasso.draw(rng).solve(**kwargs)


def test_steps_and_blocks_must_agree_in_number():
    with pytest.raises(ValueError, match="as many steps as blocks"):
        proximal_gradient([], [torch.zeros(1, 1)])
    steps = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    with pytest.raises(ValueError, match="got 2 and 1"):
        proximal_gradient(steps, [torch.zeros(1, 1)])


def test_steps_may_be_a_list_of_modules():
    class Halve(torch.nn.Module):
        def forward(self, v, _):
            return v / 2

    steps = torch.nn.ModuleList([Halve()])
    result = proximal_gradient(steps, [torch.ones(1, 1)], rtol=0, max_iter=3)
    assert result.x.abs() < 1


def test_blocks_restart_together():
    with pytest.raises(TypeError, match="restart must be True or False"):
        proximal_gradient([lambda v, _: v], [torch.zeros(1, 1)], restart=[0])


# -- several blocks ------------------------------------------------------------


class Coupled:
    r"""
    :math:`\tfrac12 \|x - y\|^2 + \tfrac12 \|x - D a\|^2 + \lambda \|a\|_1`,
    :math:`x \geq 0`: two blocks, as in synthesis models.
    """

    def __init__(self, rng):
        self.D, self.y = random(rng, 6, 9) / 3, random(rng, 2, 6)
        self.L = float(torch.linalg.matrix_norm(self.D, 2)) ** 2

    def step_a(self, v, blocks):
        gradient = (v @ self.D.T - blocks[1]) @ self.D
        return soft_threshold(v - gradient / self.L, 0.1 / self.L)

    def step_x(self, v, blocks):
        gradient = 2 * v - self.y - blocks[0] @ self.D.T
        return (v - gradient / 2).clamp_min(0)

    def value(self, a, x):
        smooth = (x - self.y).square() + (x - a @ self.D.T).square()
        return 0.5 * smooth.sum(1) + 0.1 * a.abs().sum(1)


@pytest.mark.parametrize("inertia", ["none", "palm"])
def test_blocks_are_updated_one_after_the_other(inertia, rng):
    problem = Coupled(rng)
    init = [torch.zeros(2, 9, dtype=DOUBLE), torch.zeros(2, 6, dtype=DOUBLE)]
    steps = [problem.step_a, problem.step_x]
    result = proximal_gradient(steps, init, inertia=inertia, rtol=1e-10, max_iter=20000)
    assert result.converged.all() and result.x is result.state[0]
    a, x = result.state

    # The x that belongs to a is known: eliminate it and compare with one block.
    def eliminated(v, _):
        x = ((problem.y + v @ problem.D.T) / 2).clamp_min(0)
        return problem.step_a(v, (v, x))

    expected = proximal_gradient([eliminated], init[:1], rtol=1e-10, max_iter=20000)
    torch.testing.assert_close(a, expected.x, rtol=0, atol=1e-7)
    assert (problem.value(a, x) <= problem.value(*init)).all()
    # Gauss-Seidel by hand, two iterations (no inertia in the first).
    a0, x0 = init
    a1 = problem.step_a(a0, (a0, x0))
    x1 = problem.step_x(x0, (a1, x0))
    w = 0.25 if inertia == "palm" else 0.0
    a2 = problem.step_a(a1 + w * (a1 - a0), (a1, x1))
    x2 = problem.step_x(x1 + w * (x1 - x0), (a2, x1))
    two = proximal_gradient(steps, init, inertia=inertia, rtol=0, max_iter=2)
    torch.testing.assert_close(two.state[0], a2)
    torch.testing.assert_close(two.state[1], x2)


# -- ADMM ----------------------------------------------------------------------


class Analysis:
    r"""
    :math:`\tfrac12 \|x - y\|^2 + \|m \odot W x\|_1` on a box, with both as splits.
    """

    def __init__(self, W: Tensor, y: Tensor, m: Tensor, rho=(1.0, 1.0)):
        self.W, self.y, self.m, self.rho = W, y, m, rho
        n = W.shape[1]
        eye = torch.eye(n, dtype=y.dtype)
        self.inverse = torch.linalg.inv(eye + rho[0] * W.T @ W + rho[1] * eye)

    @classmethod
    def draw(cls, rng, n_samples=3, n=8, p=14):
        y = 0.5 + 0.6 * random(rng, n_samples, n)
        return cls(random(rng, p, n) / 2, y, random(rng, n_samples, p).abs() / 20)

    def replace(self, **changes) -> Analysis:
        fields = {"W": self.W, "y": self.y, "m": self.m, "rho": self.rho}
        return Analysis(**{**fields, **changes})

    def sample(self, i: int) -> Analysis:
        return self.replace(y=self.y[i : i + 1], m=self.m[i : i + 1])

    def apply(self, x):  # row by row: batches round as singles
        return torch.stack([self.W @ v for v in x])

    def solve_x(self, targets, x, Kx):
        torch.testing.assert_close(Kx, (self.apply(x), x))
        z, s = targets
        adjoint = torch.stack([self.W.T @ v for v in z])
        rhs = self.y + self.rho[0] * adjoint + self.rho[1] * s
        x = torch.stack([self.inverse @ v for v in rhs])
        return x, (self.apply(x), x)

    @property
    def prox(self):
        limit = self.m / self.rho[0]
        return LocalProx(soft_threshold, (limit,)), LocalProx(lambda v: v.clamp(0, 1))

    def start(self) -> ADMMState:
        x = torch.zeros_like(self.y)
        splits = (torch.zeros_like(self.m), x)
        return ADMMState(x, splits, splits, splits)

    def solve(self, init=None, **kwargs) -> SolverResult:
        return admm(
            self.solve_x,
            self.prox,
            init or self.start(),
            rho=self.rho,
            **kwargs,
        )

    def solve_generically(self) -> Tensor:
        """Minimises over (x, t) with -t <= W x <= t, 0 <= x <= 1."""
        W = self.W.numpy()
        p, n = W.shape
        solutions = []
        for y, m in zip(self.y.numpy(), self.m.numpy(), strict=True):
            constraint = scipy.optimize.LinearConstraint(
                np.block([[W, -np.eye(p)], [W, np.eye(p)]]),
                np.r_[np.full(p, -np.inf), np.zeros(p)],
                np.r_[np.zeros(p), np.full(p, np.inf)],
            )
            start = np.r_[np.full(n, 0.5), np.abs(W @ np.full(n, 0.5)) + 1]
            best = scipy.optimize.minimize(
                lambda q, y=y, m=m: 0.5 * np.sum((q[:n] - y) ** 2) + m @ q[n:],
                start,
                jac=lambda q, y=y, m=m: np.r_[q[:n] - y, m],
                bounds=[(0, 1)] * n + [(0, None)] * p,
                constraints=[constraint],
                method="SLSQP",
                options={"ftol": 1e-13, "maxiter": 1000},
            )
            # Status 8: rounding hides any further descent; 0: the same by "ftol".
            assert best.status in (0, 8), best.message
            solutions.append(torch.from_numpy(best.x[:n]))
        return torch.stack(solutions)


@pytest.mark.parametrize("relaxation", [1.0, 1.7])
@pytest.mark.parametrize("rho", [(1.0, 1.0), (0.3, 2.0)], ids=str)
def test_admm_minimises_an_analysis_problem_on_a_box(relaxation, rho, rng):
    problem = Analysis.draw(rng).replace(rho=rho)
    result = problem.solve(relaxation=relaxation, rtol=1e-9, max_iter=5000)
    assert result.converged.all()
    expected = problem.solve_generically()
    torch.testing.assert_close(result.x, expected, rtol=0, atol=1e-6)
    assert ((expected < 1e-6) | (expected > 1 - 1e-6)).any(), "the box must matter"
    # The multipliers certify the solution: x - y + W^T w is 0 inside the box.
    w = rho[0] * result.state.u[0]
    assert (w.abs() <= problem.m + 1e-12).all()
    inside = (expected > 1e-3) & (expected < 1 - 1e-3)
    gradient = result.x - problem.y + w @ problem.W
    assert gradient[inside].abs().max() < 1e-6


def test_admm_treats_samples_alone(rng):
    problem = Analysis.draw(rng)
    batch = problem.solve(rtol=1e-6, max_iter=5000)
    assert len(batch.n_iter.unique()) > 1
    for i in range(3):
        single = problem.sample(i).solve(rtol=1e-6, max_iter=5000)
        assert torch.equal(single.x[0], batch.x[i])
        assert single.n_iter[0] == batch.n_iter[i]
        assert single.residual[0] == batch.residual[i]


def test_admm_goes_on_where_it_stopped(rng):
    problem = Analysis.draw(rng)
    whole = problem.solve(relaxation=1.5, rtol=0, max_iter=11)
    half = problem.solve(relaxation=1.5, rtol=0, max_iter=5)
    rest = problem.solve(half.state, relaxation=1.5, rtol=0, max_iter=6)
    assert torch.equal(rest.x, whole.x)


def test_admm_does_not_depend_on_the_parts_in_which_splits_are_evaluated(
    rng, monkeypatch
):
    problem = Analysis.draw(rng)
    whole = problem.solve(relaxation=1.5, rtol=1e-6, max_iter=5000)
    monkeypatch.setattr(_batch, "PART", 3)
    with torch.no_grad():
        parts = problem.solve(relaxation=1.5, rtol=1e-6, max_iter=5000)
    assert torch.equal(parts.n_iter, whole.n_iter)
    torch.testing.assert_close(parts.x, whole.x, rtol=0, atol=1e-13)


def test_admm_profits_from_its_state_after_a_change_of_the_weights(rng):
    first = Analysis.draw(rng)
    second = first.replace(m=1.02 * first.m)
    warm = second.solve(first.solve(rtol=1e-8).state, rtol=1e-6, max_iter=5000)
    cold = second.solve(rtol=1e-6, max_iter=5000)
    torch.testing.assert_close(warm.x, cold.x, rtol=0, atol=1e-4)
    assert int(warm.n_iter.sum()) < 0.8 * int(cold.n_iter.sum())


def test_relaxation_and_penalty_change_the_path_not_the_end(rng):
    problem = Analysis.draw(rng)
    variants = [(problem, 1.0), (problem, 1.6), (problem.replace(rho=(0.5, 0.5)), 1.0)]
    short = [p.solve(relaxation=a, rtol=0, max_iter=5).x for p, a in variants]
    long = [p.solve(relaxation=a, rtol=1e-10, max_iter=9000).x for p, a in variants]
    for i in range(1, 3):
        assert (short[i] - short[0]).abs().max() > 1e-3
        torch.testing.assert_close(long[i], long[0], rtol=0, atol=1e-7)


def test_admm_stops_on_primal_and_dual_residuals(rng):
    problem = Analysis.draw(rng, n_samples=1).replace(rho=(0.5, 2.0))
    before = problem.solve(rtol=0, max_iter=8).state
    result = problem.solve(rtol=0, max_iter=9)
    x, z, u = result.state.x, result.state.z, result.state.u
    weights = (0.5, 2.0)

    def size(*blocks):
        total = sum(w * v.square().sum() for w, v in zip(weights, blocks, strict=True))
        return total.sqrt()

    Kx = (problem.apply(x), x)
    primal = size(Kx[0] - z[0], Kx[1] - z[1]) / max(size(*Kx), size(*z))
    dual = size(z[0] - before.z[0], z[1] - before.z[1]) / size(*u)
    torch.testing.assert_close(result.residual[0], torch.maximum(primal, dual))


def test_admm_stops_where_the_regularizer_is_inactive(rng):
    problem = Analysis.draw(rng)
    inside = problem.y.clamp(0.1, 0.9)
    free = problem.replace(m=torch.zeros_like(problem.m), y=inside)
    result = free.solve(rtol=1e-6, max_iter=5000)
    assert result.converged.all()
    torch.testing.assert_close(result.x, inside, rtol=0, atol=1e-5)


def test_admm_takes_a_measure_of_the_caller(rng):
    problem = Analysis.draw(rng)
    expected = problem.solve_generically()

    def distance(state, _old=None):
        return torch.linalg.vector_norm(state.x - expected, dim=1)

    result = problem.solve(measure=distance, rtol=1e-3, max_iter=5000, check_every=3)
    assert result.converged.all() and (result.n_iter % 3 == 0).all()
    torch.testing.assert_close(result.residual, distance(result.state))


def test_admm_refuses_bad_settings(rng):
    problem = Analysis.draw(rng)
    for relaxation in (0.0, 2.0):
        with pytest.raises(ValueError, match="relaxation"):
            problem.solve(relaxation=relaxation)
    with pytest.raises(ValueError, match="one entry per split"):
        problem.replace().solve(ADMMState(problem.y, *[(problem.y,)] * 3))


# -- looks and callbacks -------------------------------------------------------


def both_solvers(rng):
    lasso, analysis = Lasso.draw(rng), Analysis.draw(rng)
    settings = [setting.values[0] for setting in SETTINGS]
    return [partial(lasso.solve, **s) for s in settings] + [analysis.solve]


@pytest.mark.parametrize("check_every", [1, 3])
def test_looking_rarely_changes_nothing_but_the_waits(check_every, rng):
    for solve in both_solvers(rng):
        options = {"rtol": 1e-5, "max_iter": 5000, "check_every": check_every}
        often, rare = solve(**options), solve(**options, look_every=8)
        assert len(often.n_iter.unique()) > 1
        for name in ("x", "n_iter", "status", "residual"):
            assert torch.equal(getattr(often, name), getattr(rare, name))


def test_looking_rarely_finds_the_same_failures(rng):
    problem = Lasso.draw(rng)

    def solve(look_every):
        calls = []

        def step(v, _):
            calls.append(1)
            v = problem.step(v)
            if len(calls) > 5:
                v[1, 3] = torch.nan
            return v

        init = torch.zeros(3, 10, dtype=DOUBLE)
        return proximal_gradient([step], [init], rtol=1e-6, look_every=look_every)

    often, rare = solve(1), solve(8)
    assert often.status.tolist() == [0, Status.NON_FINITE, 0]
    for name in ("x", "n_iter", "status"):
        assert torch.equal(getattr(often, name), getattr(rare, name))


def test_the_host_waits_once_per_look(rng, monkeypatch):
    reads, read = [], proximal.read_counts
    monkeypatch.setattr(proximal, "read_counts", lambda f: reads.append(1) or read(f))
    for solve in both_solvers(rng):
        reads.clear()
        n = int(solve(rtol=1e-5, max_iter=5000, look_every=8).n_iter.max())
        assert len(reads) == -(-n // 8)


def test_the_callback_sees_what_the_measure_sees(rng):
    seen, measured = [], []
    problem = Analysis.draw(rng)

    def measure(new, old):
        measured.append((new, old))
        return relative_change((new.x,), (old.x,))

    def callback(k, old, new):
        assert isinstance(old, ADMMState) and isinstance(new, ADMMState)
        seen.append((k, old, new))

    start = problem.start()
    result = problem.solve(start, rtol=1e-3, measure=measure, callback=callback)
    assert [k for k, *_ in seen] == list(range(int(result.n_iter.max())))
    assert torch.equal(seen[0][1].x, start.x)
    assert torch.equal(seen[-1][2].x, result.x)
    for (_, old, new), (measured_new, measured_old) in zip(seen, measured, strict=True):
        assert torch.equal(new.x, measured_new.x)
        assert torch.equal(old.x, measured_old.x)

    blocks = []
    lasso = Lasso.draw(rng)
    result = lasso.solve(rtol=1e-3, callback=lambda *args: blocks.append(args))
    assert [k for k, *_ in blocks] == list(range(int(result.n_iter.max())))
    assert all(len(old) == len(new) == 1 for _, old, new in blocks)
    for (_, _, (x,)), (_, (before,), _) in zip(blocks, blocks[1:], strict=False):
        assert torch.equal(x, before)


def test_a_tensor_of_tolerances_must_not_be_negative_either(rng):
    with pytest.raises(ValueError, match="rtol must not be negative"):
        Lasso.draw(rng).solve(rtol=torch.tensor([1e-3, -1.0, 1e-3]))
