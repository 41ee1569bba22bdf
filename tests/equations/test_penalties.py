"""Sparsity penalties against brute force, quadrature and finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import dense_matrix, random
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from deepinv_deal._batch import inner
from deepinv_deal.problems import GroupPenalty, L1Penalty, WeaklyConvexPenalty

DOUBLE = torch.float64
THRESHOLD = torch.tensor([0.3, 0.7], dtype=DOUBLE).view(1, 2, 1, 1)
PENALTIES = [
    pytest.param(L1Penalty(THRESHOLD), id="l1"),
    pytest.param(GroupPenalty(THRESHOLD), id="group"),
    pytest.param(WeaklyConvexPenalty(THRESHOLD, 1.8), id="order-1.8"),
    pytest.param(WeaklyConvexPenalty(THRESHOLD, 2.0), id="order-2"),
]


@pytest.mark.parametrize("r", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_proximal_map_minimises(penalty, r, rng):
    v = random(rng, 1, 2, 4, 4)
    z = penalty.prox(v, r)

    def energy(z):
        return 0.5 * r * inner(z - v, z - v) + penalty.value(z)

    lowest = energy(z)
    for scale in (1e-3, 1e-1, 1.0, 10.0):
        for _ in range(10):
            assert energy(z + scale * random(rng, 1, 2, 4, 4)) > lowest - 1e-11
    assert energy(v) > lowest
    assert energy(torch.zeros_like(v)) > lowest


@pytest.mark.parametrize("name", ["l1", "group", "order-1.8", "order-2"])
@given(
    seed=st.integers(0, 2**32 - 1),
    log_threshold=st.floats(-6, 6),
    log_size=st.floats(-3, 3),
    r=st.floats(0.3, 10.0),
)
def test_proximal_maps_of_any_size_are_resolvents(
    name, seed, log_threshold, log_size, r
):
    rng = torch.Generator().manual_seed(seed)
    t = 10**log_threshold * (0.1 + torch.rand(1, 2, 1, 1, generator=rng, dtype=DOUBLE))
    unit = {
        "l1": L1Penalty(t / t),
        "group": GroupPenalty(t / t),
        "order-1.8": WeaklyConvexPenalty(t / t, 1.8),
        "order-2": WeaklyConvexPenalty(t / t, 2.0),
    }[name]
    penalty = replace(unit, threshold=t)
    v, w = 10**log_size * t * random(rng, 2, 1, 2, 4, 5)
    z, y = penalty.prox(v, r), penalty.prox(w, r)
    # Scaling: coefficients in units of their threshold have thresholds 1.
    torch.testing.assert_close(z / t, unit.prox(v / t, r), rtol=1e-9, atol=1e-12)
    # Odd, never beyond its argument, never across zero.
    assert torch.equal(penalty.prox(-v, r), -z)
    assert (z.abs() <= v.abs() * (1 + 1e-12)).all() and (z * v >= 0).all()
    # The resolvent of a monotone operator less its weak convexity.
    smallest = (1 - penalty.weak_convexity / r) * inner(z - y, z - y)
    assert inner(z - y, v - w) >= smallest - 1e-9 * inner(v - w, v - w)
    # Moreau: what is taken away lies in the dual ball, on its rim where z is not 0.
    taken = r * (v - z) / t
    if name == "l1":
        assert (taken.abs() <= 1 + 1e-9).all()
        torch.testing.assert_close(taken[z != 0].abs(), torch.ones_like(taken[z != 0]))
    if name == "group":
        size, kept = GroupPenalty(t / t).value(taken[:, :, :2, :2]), z[:, :, :2, :2]
        assert size <= 2 + 1e-9  # two channels, so two blocks
        if kept.flatten(2).any(2).all():
            assert size >= 2 - 1e-9


@pytest.mark.parametrize("penalty", PENALTIES)
def test_derivative_of_the_proximal_map_and_its_root(penalty, rng):
    v = random(rng, 1, 2, 4, 5)
    S = penalty.jacobian(v)
    matrix = dense_matrix(lambda e: S(e, 1.0), v.shape[1:])
    expected = torch.autograd.functional.jacobian(penalty.prox, v).view(40, 40)
    torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-12)
    root = dense_matrix(lambda e: S(e, 0.5), v.shape[1:])
    torch.testing.assert_close(root @ root, matrix, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [1.5, 1.8, 2.0])
def test_weakly_convex_value_equals_quadrature_of_its_proximal_map(order):
    penalty = WeaklyConvexPenalty(torch.tensor(0.4, dtype=DOUBLE), order)
    v = torch.tensor([1e-3, 0.05, 0.4, 2.0, 30.0, 1e4], dtype=DOUBLE)
    z = penalty.prox(v)
    envelope = [
        quad(lambda w: w / (1 + (w / 0.4) ** order), 0, b, limit=500, epsabs=0)[0]
        for b in v.tolist()
    ]
    expected = torch.tensor(envelope, dtype=DOUBLE) - 0.5 * (v - z).square()
    actual = torch.cat([penalty.value(a.view(1, 1, 1, 1)) for a in z])
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", [1.8, 2.0])
def test_weakly_convex_value_is_differentiable_in_everything(order, rng):
    a = random(rng, 1, 2, 3, 3).requires_grad_()
    t = THRESHOLD.clone().requires_grad_()

    def value(a, t):
        return WeaklyConvexPenalty(t, order).value(a)

    assert torch.autograd.gradcheck(value, (a, t), eps=1e-5, atol=1e-6)
    # R'(T(v)) = v - T(v), with any step
    penalty = WeaklyConvexPenalty(THRESHOLD, order)
    for r in (0.2, 1.0, 3.0):
        z = penalty.prox(a.detach(), r).requires_grad_()
        (slope,) = torch.autograd.grad(penalty.value(z).sum(), z)
        torch.testing.assert_close(slope, r * (a - z).detach(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("order", (1.2, 1.7, 2.0))
def test_tiny_coefficients_have_preimages(order):
    """They lie many orders of magnitude above: bisection does not get there."""
    penalty = WeaklyConvexPenalty(torch.tensor(0.03), order)
    size = 0.03 * torch.logspace(-28, 4, 200)
    a = torch.cat([-size, torch.zeros(1), size])[None, None, None]
    v = penalty._invert(a, 0.0)
    torch.testing.assert_close(penalty.prox(v), a, rtol=1e-5, atol=0)
    assert v[..., 200] == 0


@pytest.mark.parametrize("order", [1.3, 1.8, 2.0])
def test_modulus_of_weak_convexity_is_sharp(order):
    penalty = WeaklyConvexPenalty(torch.ones(1, dtype=DOUBLE), order)
    u = torch.linspace(0.01, 50, 200001, dtype=DOUBLE)
    steepest = penalty.jacobian(u)(torch.ones_like(u), 1.0).max()
    # T' = 1 / (1 + R'')
    np.testing.assert_allclose(1 - 1 / steepest, penalty.weak_convexity, rtol=1e-6)


def test_zero_coefficients_are_harmless():
    zero = torch.zeros(2, 2, 4, 4, dtype=DOUBLE, requires_grad=True)
    for parameter in PENALTIES:
        penalty = parameter.values[0]
        assert penalty.value(zero).max() < 1e-25
        assert not penalty.prox(zero).any()
        (gradient,) = torch.autograd.grad(penalty.prox(zero).sum(), zero)
        assert not gradient.any()
        assert not penalty.jacobian(zero.detach())(torch.ones(2, 2, 4, 4), 0.5).any()


def test_groups_at_odd_borders_are_those_of_coefficients_continued_by_zeros(rng):
    a = random(rng, 2, 2, 5, 7)
    padded = torch.nn.functional.pad(a, (0, 1, 0, 1))
    penalty = GroupPenalty(THRESHOLD)
    torch.testing.assert_close(penalty.value(a), penalty.value(padded))
    torch.testing.assert_close(penalty.prox(a), penalty.prox(padded)[..., :5, :7])


def test_a_group_is_a_block_of_two_by_two(rng):
    a = torch.zeros(1, 2, 4, 4, dtype=DOUBLE)
    a[0, 1, 2:, :2] = torch.tensor([[1.0, 2.0], [2.0, 4.0]])  # norm 5
    penalty = GroupPenalty(THRESHOLD)
    torch.testing.assert_close(penalty.value(a), torch.tensor([3.5], dtype=DOUBLE))
    torch.testing.assert_close(penalty.prox(a), a * (1 - 0.7 / 5))
