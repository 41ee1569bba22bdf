"""Linear splines against NumPy and finite differences."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import central_difference, random
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from deepinv_deal import splines
from deepinv_deal.splines import BoundSpline, LinearSpline, linear_spline

# Knots and step are binary fractions: no argument below falls beside its knot.
X_MIN, STEP = -1.0, 0.25

values = st.floats(-10, 10, allow_nan=False)
tables = st.lists(values, min_size=2, max_size=9)
arguments = st.lists(st.floats(-5, 5, allow_nan=False), min_size=1, max_size=12)


def reference(x, c, x_min=X_MIN, step=STEP):
    """One spline by numpy.interp, with its outer pieces continued."""
    knots = x_min + step * np.arange(len(c))
    inside = np.interp(x, knots, c)
    left = c[0] + (x - knots[0]) * (c[1] - c[0]) / step
    right = c[-1] + (x - knots[-1]) * (c[-1] - c[-2]) / step
    return np.where(x < knots[0], left, np.where(x > knots[-1], right, inside))


def tensor(data) -> torch.Tensor:
    return torch.tensor(data, dtype=torch.float64)


# -- values --------------------------------------------------------------------


@given(tables, arguments)
def test_values_are_interpolated_inside_and_extended_linearly_outside(c, x):
    actual = linear_spline(tensor([x]), tensor([c]), X_MIN, STEP)
    expected = reference(np.array(x), np.array(c))
    np.testing.assert_allclose(actual[0].numpy(), expected, rtol=1e-12, atol=1e-11)


@given(tables)
def test_values_at_the_knots_are_the_coefficients(c):
    knots = X_MIN + STEP * torch.arange(len(c), dtype=torch.float64)
    actual = linear_spline(knots[None], tensor([c]), X_MIN, STEP)
    torch.testing.assert_close(actual[0], tensor(c), rtol=1e-14, atol=1e-14)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in different orders in memory."""
    return {
        "contiguous": x,
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.mT.contiguous().mT,
        "sliced": torch.stack([x, x], -1)[..., 0],
    }


@pytest.mark.parametrize("n_splines", [pytest.param(1, id="shared"), 3])
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels-last", "transposed", "sliced"]
)
def test_values_and_gradients_do_not_depend_on_the_memory_layout(
    layout, n_splines, rng
):
    c = random(rng, n_splines, 7).requires_grad_()
    x = layouts(2 * random(rng, 2, 3, 4, 5))[layout].requires_grad_()
    cotangent = random(rng, 2, 3, 4, 5)
    y = linear_spline(x, c, X_MIN, STEP)
    for channel in range(3):
        row = c[channel % n_splines].detach().numpy()
        expected = reference(x[:, channel].detach().numpy(), row)
        np.testing.assert_allclose(y[:, channel].detach().numpy(), expected, rtol=1e-12)
    grads = torch.autograd.grad(y, (x, c), cotangent)
    plain = x.detach().contiguous().requires_grad_()
    expected = torch.autograd.grad(
        linear_spline(plain, c, X_MIN, STEP), (plain, c), cotangent
    )
    torch.testing.assert_close(grads, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n_splines", [pytest.param(1, id="shared"), 3])
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels-last", "transposed", "sliced"]
)
def test_without_gradients_large_arguments_are_evaluated_in_parts(
    layout, n_splines, rng, monkeypatch
):
    parts = []
    evaluate = splines._evaluate

    def count(x, *args):
        parts.append(x.numel())
        return evaluate(x, *args)

    monkeypatch.setattr(splines, "_evaluate", count)
    monkeypatch.setattr(splines, "PART", 16)
    c = random(rng, n_splines, 7).requires_grad_()
    x = layouts(2 * random(rng, 2, 3, 4, 5))[layout]
    expected = linear_spline(x, c, X_MIN, STEP).detach()
    assert parts == [120], "at once, for the gradient"
    with torch.no_grad():
        y = linear_spline(x, c, X_MIN, STEP)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    if layout == "channels-last" or (layout == "contiguous" and n_splines == 1):
        largest = 16 * torch.get_num_threads()
        assert sum(parts[1:]) == 120 and max(parts[1:]) <= largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_the_dtype_of_the_values_is_that_of_the_coefficients(layout, dtype, rng):
    c = random(rng, 1, 7).requires_grad_()
    x = layouts((2 * random(rng, 2, 3, 4, 5)).to(dtype))[layout]
    with torch.no_grad():
        y = linear_spline(x, c, X_MIN, STEP)
    expected = linear_spline(x, c, X_MIN, STEP)
    assert y.dtype == expected.dtype == torch.float64 and torch.equal(y, expected)


def test_channels_last_in_gives_channels_last_out(rng):
    x = random(rng, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    y = linear_spline(x, random(rng, 3, 5), X_MIN, STEP)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_argument_is_not_modified(rng):
    x = random(rng, 2, 3, 4)
    before = x.clone()
    linear_spline(x, random(rng, 3, 5), X_MIN, STEP)
    assert torch.equal(x, before)


@pytest.mark.parametrize("n_splines", [1, 4])
def test_in_place_gives_the_same_values_and_spares_the_argument_of_gradients(
    n_splines, rng
):
    bound = spline(rng, n_splines).bind()
    for x in layouts(random(rng, 2, 4, 9, 7)).values():
        kept = x.clone()
        expected = bound(x)
        with torch.enable_grad():
            assert torch.equal(bound.in_place(x), expected)
            assert torch.equal(x, kept)
        with torch.no_grad():
            assert torch.equal(bound.in_place(x), expected.detach())


def test_in_place_takes_no_new_memory_where_the_type_stays(rng):
    bound = spline(rng, 4).bind()
    x = random(rng, 1, 4, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        single = bound.in_place(x.float())
        assert bound.in_place(x).data_ptr() == x.data_ptr()
        with pytest.raises(ValueError, match="3 channels"):
            bound.in_place(x[:, :3])
    assert single.dtype == bound.coefficients.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("x", [1e12, -1e12, 3e9, -3e9])
def test_huge_arguments_are_extended_correctly(x, dtype):
    c = torch.tensor([[3.0, 1.0, 2.0, -1.0]], dtype=dtype)
    y = linear_spline(torch.tensor([[x]], dtype=dtype), c, X_MIN, STEP)
    expected = float(reference(np.array([x]), c[0].double().numpy())[0])
    assert y.item() == pytest.approx(expected, rel=1e-6)


def test_infinity_is_extended_to_infinity():
    c = tensor([[3.0, 1.0, 2.0, 4.0]])
    y = linear_spline(tensor([[torch.inf, -torch.inf]]), c, X_MIN, STEP)
    assert y.tolist() == [[torch.inf, torch.inf]]


@pytest.mark.parametrize("n_splines", [pytest.param(1, id="shared"), 3])
def test_nan_gives_nan_at_that_place_only(n_splines, rng):
    x, c = random(rng, 2, 3, 4), random(rng, n_splines, 5)
    clean = linear_spline(x, c, X_MIN, STEP)
    x[1, 2, 3] = torch.nan
    y = linear_spline(x, c, X_MIN, STEP)
    assert y[1, 2, 3].isnan() and y.isnan().sum() == 1
    assert torch.equal(y[~y.isnan()], clean[~y.isnan()])


# -- derivatives ---------------------------------------------------------------


def test_the_derivative_at_a_knot_is_the_right_slope():
    c = tensor([[0.0, 1.0, 4.0, 2.0]])  # slopes 4, 12, -8
    knots = X_MIN + STEP * torch.arange(4.0, dtype=torch.float64)
    x = torch.cat([knots, tensor([-3.0, 3.0])])[None].requires_grad_()
    linear_spline(x, c, X_MIN, STEP).sum().backward()
    assert x.grad.tolist() == [[4, 12, -8, -8, 4, -8]]


@pytest.mark.parametrize("n_splines", [pytest.param(1, id="shared"), 3])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 2, 2)], ids=str)
def test_gradients_are_finite_differences(shape, n_splines, rng):
    # Away from the knots, where no difference quotient straddles two pieces.
    piece = torch.randint(-6, 8, shape, generator=rng)
    offset = 0.1 + 0.8 * torch.rand(shape, generator=rng, dtype=torch.float64)
    x = (X_MIN + STEP * (piece + offset)).requires_grad_()
    c = random(rng, n_splines, 5).requires_grad_()
    assert gradcheck(lambda x, c: linear_spline(x, c, X_MIN, STEP), (x, c))


def test_gradients_are_only_computed_where_needed(rng):
    x, c = random(rng, 2, 3), random(rng, 1, 5)
    y = linear_spline(x.clone().requires_grad_(), c, X_MIN, STEP)
    y.sum().backward()
    assert c.grad is None
    c.requires_grad_()
    linear_spline(x, c, X_MIN, STEP).sum().backward()
    assert x.grad is None and c.grad is not None


@given(tables, st.floats(-3, 3), st.floats(-3, 3))
def test_the_largest_slope_is_a_lipschitz_constant(c, a, b):
    y = linear_spline(tensor([[a, b]]), tensor([c]), X_MIN, STEP)[0]
    bound = np.abs(np.diff(c)).max() / STEP * abs(a - b)
    assert abs(y[0] - y[1]) <= bound * (1 + 1e-12) + 1e-10


# -- the module ----------------------------------------------------------------


def spline(rng, n_splines=2, num_knots=6, **options) -> LinearSpline:
    """A spline on [-1, 1] in float64 with random coefficients."""
    module = LinearSpline(num_knots, -1, 1, num_splines=n_splines, **options).double()
    with torch.no_grad():
        module.coefficients.copy_(random(rng, n_splines, num_knots))
    return module


BOUNDS = [
    pytest.param(dict(slope_min=0.0), id="increasing"),
    pytest.param(dict(slope_max=0.5), id="slope-at-most-0.5"),
    pytest.param(dict(slope_min=-1.0, slope_max=1.0), id="nonexpansive"),
]


def test_a_new_spline_is_the_identity():
    x = torch.linspace(-3, 3, 13).view(1, 1, -1)
    torch.testing.assert_close(LinearSpline(9, -1, 1)(x), x)


def test_init_is_sampled_at_the_knots_for_every_spline():
    module = LinearSpline(5, 0, 2, num_splines=3, init=torch.square)
    assert module.coefficients.shape == (3, 5)
    expected = torch.tensor([0, 0.25, 1, 2.25, 4]).expand(3, 5)
    torch.testing.assert_close(module.coefficients.detach(), expected)


def test_slopes_and_tv2_agree_with_numpy(rng):
    module = spline(rng)
    c = module.coefficients.detach().numpy()
    slopes = np.diff(c, axis=1) / 0.4
    np.testing.assert_allclose(module.slopes().detach().numpy(), slopes, rtol=1e-12)
    tv2 = np.abs(np.diff(slopes, axis=1)).sum()
    np.testing.assert_allclose(module.tv2().item(), tv2, rtol=1e-12)


def test_slopes_are_finite_differences_of_the_values(rng):
    module, h = spline(rng), 1e-4
    knots = torch.linspace(-1, 1, module.coefficients.shape[1], dtype=torch.float64)
    middles = (knots[1:] + knots[:-1]) / 2
    t = middles.expand(1, len(module.coefficients), -1)
    slopes = (module(t + h) - module(t - h))[0] / (2 * h)
    torch.testing.assert_close(module.slopes(), slopes, rtol=1e-8, atol=1e-10)
    jumps = slopes.diff(dim=1).abs().sum()
    torch.testing.assert_close(module.tv2(), jumps, rtol=1e-8, atol=1e-10)


def test_tv2_of_an_affine_function_is_zero():
    module = LinearSpline(8, -1, 1, init=lambda t: 3 * t - 1).double()
    assert module.tv2() < 1e-5


def test_values_of_the_module_are_those_of_the_function(rng):
    x = random(rng, 2, 2, 5)
    for options in ({}, dict(slope_min=0.0)):
        module = spline(rng, **options)
        expected = linear_spline(x, module.constrained_coefficients(), -1, 0.4)
        torch.testing.assert_close(module(x), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(module.bind()(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_slope_bounds_hold_after_a_gradient_step_and_the_mean_is_kept(bounds, rng):
    module = spline(rng, **bounds)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (module(random(rng, 4, 2, 9)) * random(rng, 4, 2, 9)).sum().backward()
        optimizer.step()
        slopes = module.slopes().detach()
        assert slopes.min() >= bounds.get("slope_min", -torch.inf) - 1e-12
        assert slopes.max() <= bounds.get("slope_max", torch.inf) + 1e-12
        torch.testing.assert_close(
            module.constrained_coefficients().mean(1),
            module.coefficients.mean(1),
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize("bounds", BOUNDS)
def test_slope_bounds_change_infeasible_splines_only(bounds, rng):
    module = spline(rng, **bounds)
    raw = module.coefficients
    assert not torch.allclose(module.constrained_coefficients(), raw)
    with torch.no_grad():
        raw.copy_(module.constrained_coefficients())
    torch.testing.assert_close(module.constrained_coefficients(), raw)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_gradients_flow_through_the_constraint(bounds, rng):
    module, x = spline(rng, **bounds), random(rng, 3, 2, 4)
    cotangent, direction = random(rng, 3, 2, 4), random(rng, 2, 6)
    (module(x) * cotangent).sum().backward()

    def function(c):
        shadow = copy.deepcopy(module)
        shadow.coefficients.copy_(c)
        return (shadow(x) * cotangent).sum()

    expected = central_difference(function, module.coefficients.detach(), direction)
    actual = (module.coefficients.grad * direction).sum()
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_unconstrained_slopes_may_be_negative(rng):
    assert spline(rng).slopes().min() < 0


def test_copies_give_the_same_values(rng):
    module, x = spline(rng, slope_min=0.0), random(rng, 2, 2, 5)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    assert list(module.state_dict()) == ["coefficients"]


def test_representation_names_the_settings():
    text = repr(LinearSpline(31, 0, 3, num_splines=4, slope_min=0.0))
    assert "4 x 31 knots on [0, 3], slopes (0.0, None)" in text


@pytest.mark.parametrize(
    "shape",
    [pytest.param((2, 5), id="wrong-count"), pytest.param((5,), id="1-D"), (1, 3, 5)],
)
def test_coefficients_that_do_not_fit_the_channels_are_refused(shape, rng):
    with pytest.raises(ValueError, match=r"\(1, K\) or \(3, K\).*3 channels"):
        linear_spline(random(rng, 2, 3, 4), random(rng, *shape), X_MIN, STEP)


@pytest.mark.parametrize("knots, x_min, x_max", [(1, 0, 1), (5, 1, 1), (5, 1, 0)])
def test_impossible_knots_are_refused(knots, x_min, x_max):
    with pytest.raises(ValueError, match="num_knots >= 2 and x_min < x_max"):
        LinearSpline(knots, x_min, x_max)


# -- anchored splines and the integral of the clipped spline -------------------


def test_an_anchored_spline_starts_at_its_anchor_and_descends(rng):
    spline = LinearSpline(9, 0, 1, num_splines=3, slope_max=0, anchor=1.0).double()
    with torch.no_grad():
        spline.coefficients.copy_(random(rng, 3, 9))
    c = spline.constrained_coefficients()
    assert (c[:, 0] == 1).all() and (c.diff(dim=1) <= 0).all()
    raw = spline.coefficients.diff(dim=1)
    torch.testing.assert_close(c.diff(dim=1), raw.clamp(max=0))
    free = LinearSpline(9, 0, 1, anchor=2.0)
    assert free.constrained_coefficients()[0, 0] == 2.0
    assert torch.allclose(free.slopes(), torch.ones(1, 8), atol=1e-5)


@pytest.mark.parametrize("n_splines", [1, 3])
def test_the_clipped_integral_is_that_of_quadrature(n_splines, rng):
    spline = LinearSpline(7, -0.5, 1, num_splines=n_splines).double()
    with torch.no_grad():
        spline.coefficients.copy_(0.5 + random(rng, n_splines, 7))
    ends = torch.tensor([-0.9, -0.5, -0.3, 0.0, 0.41, 1.0, 1.7], dtype=torch.float64)
    t = torch.linspace(0, 1, 40001, dtype=torch.float64)
    grid = -0.5 + (ends[:, None] + 0.5) * t  # (7, n)
    values = spline(grid.reshape(-1, 1).expand(-1, 3)).clamp(0, 1)
    values = values.view(*grid.shape, 3)
    expected = torch.trapezoid(values, grid[..., None], dim=1)
    actual = spline.bind().clipped_integral(ends[:, None].expand(-1, 3))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


def test_the_derivative_of_the_clipped_integral_is_the_clipped_spline(rng):
    spline = LinearSpline(7, 0, 1, num_splines=2).double()
    with torch.no_grad():
        spline.coefficients.copy_(0.5 + random(rng, 2, 7))
        spline.coefficients[0, 3] = spline.coefficients[0, 2]  # a flat piece
    x = torch.linspace(-0.41, 1.73, 60, dtype=torch.float64)[:, None].expand(-1, 2)
    x = x.contiguous().requires_grad_()
    (grad,) = torch.autograd.grad(spline.bind().clipped_integral(x).sum(), x)
    torch.testing.assert_close(grad, spline(x).clamp(0, 1).detach())
    # With respect to the coefficients: finite differences.
    assert torch.autograd.gradcheck(
        lambda c: BoundSpline(c, 0.0, 1 / 6).clipped_integral(x.detach()),
        (spline.coefficients,),
    )
