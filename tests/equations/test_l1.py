"""SAFI's and MMR's equation: convex solvers, fixed point, gradients."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import scipy.optimize
import torch
from problems import DOUBLE, dense, generator, noisy_images, random_l1_prior
from torch import Tensor

from deepinv_deal import SolverOptions
from deepinv_deal._batch import norm
from deepinv_deal.priors import MMRPrior, SAFIPrior
from deepinv_deal.problems import (
    DataTerm,
    ImageLayout,
    NormalOperator,
    operator_term,
)
from deepinv_deal.problems.l1 import FrozenL1
from deepinv_deal.solvers import (
    AdjointOptions,
    fixed_point,
)
from deepinv_deal.solvers.preconditioner import Fourier

KINDS = [pytest.param(SAFIPrior, id="safi"), pytest.param(MMRPrior, id="mmr")]
#: For what does not depend on where the mask comes from, and takes long.
ONE_KIND = [KINDS[0], pytest.param(MMRPrior, id="mmr", marks=pytest.mark.slow)]
INNER = ["admm", "fista"]


def coupled(n=72, seed=5):
    """A well-conditioned normal operator that mixes all pixels, and its matrix."""
    g = generator(seed)
    A = torch.eye(n, dtype=DOUBLE) + 0.04 * torch.randn(n, n, generator=g, dtype=DOUBLE)
    H = A.T @ A
    return lambda v: torch.stack([H @ s.flatten() for s in v]).view_as(v), H


def circular(height=26, width=25, seed=5):
    """
    A well-conditioned normal operator of a circular blur, and its matrix.

    The image has room for the kernel of the filters and their adjoint, 25 x 25.
    """
    kernel = torch.rand(5, 5, generator=generator(seed), dtype=DOUBLE)
    spectrum = torch.fft.fft2(kernel / kernel.sum(), s=(height, width)).abs().square()
    spectrum = 0.1 + 0.9 * spectrum

    def H(v):
        return torch.fft.ifft2(spectrum * torch.fft.fft2(v)).real

    return H, dense(H, (1, height, width))


def solve(equation, rtol=1e-11, **kwargs):
    settings = {"max_iter": 100, "forcing": 0.05, "damped": False, **kwargs}
    with torch.no_grad():
        result = fixed_point(
            equation.freeze, equation.start(None), rtol=rtol, **settings
        )
    assert result.converged.all(), result
    return result


# -- the frozen problem against generic solvers --------------------------------


def random_frozen(
    kind,
    seed,
    inner_solver,
    bounds=(0.0, 1.0),
    H=None,
    rtol=1e-10,
    size=(9, 8),
    weight=0.2,
):
    """A frozen problem, its solution and the matrix of its filters."""
    prior, y = random_l1_prior(kind, seed=seed), noisy_images(1, *size, seed=seed)
    y = y + 0.3 * (seed % 3 - 1)  # some touch the box
    nu = float(prior.bind().nu)
    equation = prior.equation(
        operator_term(y, H),
        lambda_reg=weight / nu,
        bounds=bounds,
        options=SolverOptions(inner_solver, inner_max_iter=20000),
    )
    with torch.no_grad():
        frozen = FrozenL1(equation, equation.pair(y, y.new_zeros(1, 3, *size)))
        result = frozen.solve(torch.full((1,), rtol), torch.ones(1, dtype=torch.bool))
        assert result.converged.all()
        matrix = dense(equation.regularizer.analyse, (1, *size))
    return equation, frozen, result, matrix


@pytest.mark.parametrize(
    "seed",
    # Twelve hold every combination of kind, box and brightness.
    [pytest.param(i, marks=[pytest.mark.slow] * (i >= 12)) for i in range(20)],
)
def test_both_inner_solvers_agree_with_a_bounded_quasi_newton_method(seed):
    bounds = None if seed % 4 == 3 else (0.0, 1.0)
    kind = (SAFIPrior, MMRPrior)[seed % 2]
    images_found = []
    for name in INNER:
        equation, frozen, result, matrix = random_frozen(kind, seed, name, bounds)
        images_found.append(equation.image(result.x))
    torch.testing.assert_close(*images_found, rtol=0, atol=1e-6)
    if seed >= 6:
        return
    # The dual: maximise min_x 1/2 |x - b|^2 + <w, W x> over |w| <= c.
    W, b = matrix.numpy(), equation.data.b.flatten().numpy()
    c = frozen.bound.flatten().numpy()

    def dual(w):
        x = b - W.T @ w
        x = x if bounds is None else np.clip(x, *bounds)
        return -(0.5 * np.sum((x - b) ** 2) + w @ W @ x), -W @ x

    best = scipy.optimize.minimize(
        dual,
        np.zeros(len(c)),
        jac=True,
        bounds=np.stack([-c, c], 1),
        method="L-BFGS-B",
        options={"ftol": 1e-18, "gtol": 1e-12, "maxiter": 50000, "maxfun": 50000},
    )
    x = b - W.T @ best.x
    x = x if bounds is None else np.clip(x, *bounds)
    found = images_found[0].flatten().numpy()
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)
    # Strong duality: the primal value at our image is the dual value at theirs.
    primal = 0.5 * np.sum((found - b) ** 2) + c @ np.abs(W @ found)
    assert abs(primal + best.fun) < 1e-7 * abs(primal)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["free", "box"])
def test_the_duality_gap_bounds_the_distance_from_the_minimum(bounds):
    equation, frozen, best, matrix = random_frozen(SAFIPrior, 1, "fista", bounds)
    W, b = matrix.numpy(), equation.data.b.flatten().numpy()
    c = frozen.bound.flatten().numpy()

    def primal(x):
        return 0.5 * np.sum((x - b) ** 2) + c @ np.abs(W @ x)

    minimum = primal(equation.image(best.x).flatten().numpy())
    assert 0 <= float(frozen.gap(best.x).detach()) < 1e-8 * minimum
    rough = frozen.solve(torch.full((1,), 0.3), torch.ones(1, dtype=torch.bool)).x
    x, w = (t.detach().flatten().numpy() for t in equation.unpair(rough))
    w = 1.5 * w  # beyond the bounds in places
    p = equation.pair(equation.image(rough), torch.from_numpy(w).view(1, 3, 9, 8))
    inside = w.clip(-c, c)
    dual = b - W.T @ inside
    dual = dual if bounds is None else dual.clip(*bounds)
    expected = primal(x) - 0.5 * np.sum((dual - b) ** 2) - inside @ W @ dual
    assert float(frozen.gap(p).detach()) == pytest.approx(expected, rel=1e-9)
    assert expected >= primal(x) - minimum > 1e-6 * minimum


def test_the_duality_gap_is_for_denoising():
    H, _ = coupled()
    _, equation = equations(SAFIPrior, H, "admm", n=1)
    p = equation.start(None)
    with pytest.raises(ValueError, match="duality gap is for denoising"):
        equation.freeze(p).gap(p)


@pytest.mark.parametrize(
    ("operator", "size", "weight"),
    [(coupled, (9, 8), 0.05), (circular, (26, 25), 0.005)],
)
def test_admm_solves_problems_with_an_operator(operator, size, weight):
    """By conjugate gradients, or one descent step where the physics is circular."""
    H, matrix_H = operator()
    equation, frozen, result, matrix = random_frozen(
        SAFIPrior, 0, "admm", H=H, size=size, weight=weight
    )
    x, w = (v.flatten() for v in equation.unpair(result.x))
    c = frozen.bound.flatten()
    # Karush-Kuhn-Tucker conditions of the dense problem.
    gradient = matrix_H @ x - equation.data.b.flatten() + matrix.T @ w
    inside = (x > 1e-9) & (x < 1 - 1e-9)
    assert 0 < int(inside.sum()) < len(x)
    assert gradient[inside].abs().max() < 1e-8
    assert (gradient[x <= 1e-9] > -1e-8).all()
    assert (gradient[x >= 1 - 1e-9] < 1e-8).all()
    assert (w.abs() <= c + 1e-12).all()
    Wx = matrix @ x
    active = Wx.abs() > 1e-7
    torch.testing.assert_close(w[active], (c * Wx.sign())[active], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("operator", "size", "least", "most"),
    [(circular, (26, 25), 1.0, 1.4), (coupled, (9, 8), 1.7, 9.0)],
)
def test_circular_physics_needs_one_application_per_iteration(
    operator, size, least, most
):
    """The preconditioner is the inverse but for the borders, so nothing is iterated."""
    H, _ = operator()
    prior, y = random_l1_prior(SAFIPrior), noisy_images(1, *size)
    weight = 0.005 / float(prior.bind().nu)
    options = SolverOptions(inner_max_iter=400)
    equation = prior.equation(operator_term(y, H), lambda_reg=weight, options=options)
    frozen = equation.freeze(equation.start(y))
    analyse, count = equation.regularizer.W.__class__.__call__, 0

    def counted(*args):
        nonlocal count
        count += 1
        return analyse(*args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(equation.regularizer.W.__class__, "__call__", counted)
        result = frozen.solve(torch.full((1,), 1e-3), torch.ones(1, dtype=torch.bool))
    assert result.converged
    assert least <= count / int(result.n_iter) <= most


@pytest.mark.parametrize("channels", [1, 2], ids=["real", "complex"])
def test_the_preconditioner_knows_circulant_physics(channels):
    """It inverts the system for images that the borders of the filters do not touch."""
    mask = (torch.rand(40, 38, generator=generator(1)) < 0.4).double()
    if channels == 1:  # real images stay real if the mask is symmetric
        mask = torch.maximum(mask, mask.flip(0, 1).roll((1, 1), (0, 1)))

    def H(v):
        z = torch.complex(v[:, :1], v[:, 1:]) if channels == 2 else v[:, :1]
        z = torch.fft.ifft2(mask * torch.fft.fft2(z))
        return torch.cat([z.real, z.imag], 1) if channels == 2 else z.real

    x = torch.zeros(1, channels, 40, 38, dtype=DOUBLE)
    size = (1, channels, 12, 10)
    x[..., 14:26, 14:24] = torch.rand(size, generator=generator(2), dtype=DOUBLE)
    prior = random_l1_prior(SAFIPrior)
    with torch.no_grad():
        b, pair = H(x) + 0.1, channels == 2
        layout = ImageLayout.of(b, 1, "real_imag")
        data = DataTerm(b, NormalOperator(H, b, (Fourier(pair),)), layout)
        equation = prior.equation(data, lambda_reg=1e-3)
        frozen = equation.freeze(equation.start(x))
        rho, rho_s = frozen.rho
        Ax = H(x) + rho * equation.regularizer.normal(x) + rho_s * x
        torch.testing.assert_close(frozen._circulant_inverse()(Ax), x)


def blind_to_the_mean(v):
    return v - v.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["free", "box"])
def test_what_neither_physics_nor_filters_see_is_found(bounds):
    """The mean: only borders tell it. And the units of the physics do not matter."""
    prior, y = random_l1_prior(SAFIPrior), noisy_images(1, 26, 25)
    y, weight = blind_to_the_mean(y), 0.02 / float(prior.bind().nu)
    n_inner = []
    for s in (1.0, 1e-3, 1e4):
        data = operator_term(s * y, lambda v, s=s: s * blind_to_the_mean(v))
        equation = prior.equation(data, lambda_reg=s * weight, bounds=bounds)
        n_inner.append(int(solve(equation, rtol=3e-2, forcing=0.5).n_inner))
    assert n_inner[1:] == pytest.approx([n_inner[0]] * 2, rel=0.3)


def test_an_unknown_inner_solver_is_refused():
    prior, y = random_l1_prior(SAFIPrior), noisy_images()
    with pytest.raises(ValueError, match="'newton'"):
        prior.equation(operator_term(y), options=SolverOptions("newton"))
    with pytest.raises(ValueError, match="denoising problems with least squares only"):
        prior.equation(operator_term(y, lambda v: v), options=SolverOptions("fista"))
    with pytest.raises(ValueError, match="leave sigma out"):
        prior.equation(operator_term(y), sigma=0.1)


# -- the fixed point -----------------------------------------------------------


def equations(kind, H, inner_solver, n=2, lambda_reg=0.3, **kwargs):
    prior, y = random_l1_prior(kind), noisy_images(n)
    nu = float(prior.bind().nu)
    options = SolverOptions(inner_solver, inner_max_iter=5000)
    return prior, prior.equation(
        operator_term(y, H), lambda_reg=lambda_reg / nu, options=options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_both_inner_solvers_reach_the_same_fixed_point(kind):
    found = [
        e.image(solve(e).x) for e in (equations(kind, None, name)[1] for name in INNER)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_refreshing_the_mask_often_reaches_the_same_fixed_point(kind):
    _, equation = equations(kind, None, "fista")
    rare = solve(equation, rtol=1e-9, forcing=1e-3)
    often = solve(equation, rtol=1e-9, forcing=0.5, max_iter=300)
    assert (often.n_iter > rare.n_iter).all()
    torch.testing.assert_close(
        equation.image(often.x), equation.image(rare.x), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner_solver", INNER)
def test_a_batch_gives_what_its_samples_give_alone(kind, inner_solver):
    prior, equation = equations(kind, None, inner_solver, n=3)
    batch = solve(equation, rtol=1e-6)
    for i in range(3):
        single = prior.equation(
            operator_term(equation.data.b[i : i + 1]),
            lambda_reg=equation.lambda_reg[i : i + 1],
            options=SolverOptions(inner_solver, inner_max_iter=5000),
        )
        alone = solve(single, rtol=1e-6)
        assert alone.n_iter[0] == batch.n_iter[i]
        assert alone.n_inner[0] == batch.n_inner[i]
        torch.testing.assert_close(alone.x[0], batch.x[i], rtol=0, atol=1e-10)


def test_the_residual_of_the_equation_is_that_of_the_frozen_problem():
    _, equation = equations(SAFIPrior, coupled()[0], "admm")
    p = equation.start(None)
    size = norm(equation(p)) / norm(equation.data.b)
    torch.testing.assert_close(equation.freeze(p).residual, size)
    _, _, equation, solution = solved(SAFIPrior, "operator")
    assert (norm(equation(solution)) <= 1e-10 * norm(equation.data.b)).all()


@cache
def solved(kind, problem):
    """A problem of one image, and its solution."""
    H, weight = (None, 0.3) if problem == "denoising" else (coupled()[0], 0.1)
    prior, equation = equations(kind, H, "admm", n=1, lambda_reg=weight)
    return prior, H, equation, solve(equation).x


def test_the_energy_of_mmr_falls_monotonically():
    prior, equation = equations(MMRPrior, None, "fista", lambda_reg=0.3)
    weight = equation.lambda_reg

    def energy(p):
        x = equation.image(p)
        data = 0.5 * norm(x - equation.data.b).square()
        return data + weight * prior(x)

    energies = []
    solve(
        equation,
        rtol=1e-9,
        forcing=1e-6,
        callback=lambda k, before, p: energies.append(energy(p)),
    )
    energies = torch.stack(energies)
    assert len(energies) > 3
    assert (energies.diff(dim=0) <= 1e-12 * energies[0]).all()
    assert (energies[-1] < energies[0] - 1e-6).all()


# -- gradients -----------------------------------------------------------------

#: Hardly rounded off, so that the derivative is that of the exact solution.
SHARP = {"rtol": 1e-9, "smoothing": 1e-6}
EXACT = AdjointOptions(max_iter=300, forcing=0.01, **SHARP)
FROZEN = AdjointOptions(jacobian_free=True, **SHARP)


def loss_of(image: Tensor) -> Tensor:
    weights = torch.randn(image.shape, generator=generator(9), dtype=DOUBLE)
    return (weights * image).sum()


def parameters_of(prior) -> dict[str, Tensor]:
    return dict(prior.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "problem", ["denoising", pytest.param("operator", marks=pytest.mark.slow)]
)
def test_exact_gradients_are_finite_differences(kind, problem):
    prior, y = random_l1_prior(kind), noisy_images(1)
    H = None if problem == "denoising" else coupled()[0]
    with torch.no_grad():
        prior.lambda_reg.fill_(0.3 / float(prior.bind().nu))

    def equation(b, inner_solver="admm"):
        options = SolverOptions(inner_solver, inner_max_iter=5000)
        return prior.equation(operator_term(b, H), options=options)

    # Both inner solvers find the same image; this one sooner, where it may be used.
    fast = "fista" if H is None else "admm"

    b = y.clone().requires_grad_()
    start = solve(equation(y, fast)).x
    e = equation(b)
    x = e.image(e.attach(start, EXACT))
    tensors = {"b": b, **parameters_of(prior)}
    gradients = torch.autograd.grad(loss_of(x), list(tensors.values()))

    @torch.no_grad()
    def value():
        e = equation(b, fast)
        result = fixed_point(
            e.freeze, start, rtol=1e-12, max_iter=100, forcing=0.02, damped=False
        )
        return loss_of(e.image(result.x))

    g = generator(11)
    h = 1e-6
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        # Short steps: some coefficients are 2e-5 from their bounds, where x has a kink.
        direction = torch.randn(tensor.shape, generator=g, dtype=DOUBLE)
        direction = direction / torch.linalg.vector_norm(direction)
        with torch.no_grad():
            tensor += h * direction
            above = value()
            tensor -= 2 * h * direction
            below = value()
            tensor += h * direction
        expected = (above - below) / (2 * h)
        actual = (gradient * direction).sum()
        assert abs(actual - expected) <= 1e-3 * max(0.2, abs(expected)), (
            name,
            float(actual),
            float(expected),
        )


@pytest.mark.parametrize("problem", ["denoising", "operator"])
@pytest.mark.parametrize("kind", ONE_KIND)
def test_jacobian_free_gradients_are_those_with_the_mask_frozen(kind, problem):
    prior, H, equation, start = solved(kind, problem)
    b, lam = noisy_images(1).requires_grad_(), equation.lambda_reg.clone()
    lam.requires_grad_()
    options = SolverOptions(inner_max_iter=5000)
    equation = prior.equation(operator_term(b, H), lambda_reg=lam, options=options)
    with torch.no_grad():
        x = equation.image(start)
        mask = equation.regularizer.mask(x, equation.regularizer.analyse(x))
    solution = equation.image(equation.attach(start, FROZEN))
    gradients = torch.autograd.grad(loss_of(solution), (b, lam))

    @torch.no_grad()
    def value(b, lam):
        options = SolverOptions(inner_max_iter=2000)
        e = prior.equation(operator_term(b, H), lambda_reg=lam, options=options)
        frozen = FrozenL1(e, start.expand(4, -1), mask.expand(4, -1, -1, -1))
        everyone = torch.ones(4, dtype=torch.bool)
        rtol = 1e-12 / frozen.residual
        images_found = e.image(frozen.solve(rtol, everyone).x)
        return torch.stack([loss_of(x[None]) for x in images_found])

    direction = torch.randn(b.shape, generator=generator(2), dtype=DOUBLE)
    direction, h = direction / torch.linalg.vector_norm(direction), 1e-6
    # One batch: two steps in b, and two in lambda.
    signs = torch.tensor([1.0, -1.0], dtype=DOUBLE).view(2, 1, 1, 1)
    values = value(
        torch.cat([b + signs * h * direction, b.expand(2, -1, -1, -1)]),
        torch.cat([lam.expand(2), lam + h * signs.flatten()]),
    )
    slopes = (gradients[0] * direction).sum(), gradients[1].sum()
    for actual, (above, below) in zip(slopes, values.view(2, 2), strict=True):
        expected = (above - below) / (2 * h)
        assert abs(actual - expected) <= 1e-3 * max(1.0, abs(expected))


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["free", "box"])
@pytest.mark.parametrize("problem", ["denoising", "operator"])
@pytest.mark.parametrize("kind", ONE_KIND)
def test_the_smoothed_equation_is_inverted_by_its_system(kind, problem, bounds):
    """With the mask frozen: -F_x^T w = v, for a rough pair and some pixels at 0."""
    prior, H, equation, start = solved(kind, problem)
    equation = prior.equation(
        operator_term(equation.data.b, H), lambda_reg=0.1, bounds=bounds
    )
    x = equation.image(start).detach() - (0.2 if bounds is None else 0.0)
    x = equation.clamp(x - 0.4 * (x < 0.3))
    smoothed = equation.smoothed(equation.pair(x, equation.unpair(start)[1]), 0.1)
    mask = smoothed.mask(x).detach()
    v = torch.randn(x.shape, generator=generator(3), dtype=DOUBLE)
    w = smoothed.adjoint_solver(x)(v, torch.full((1,), 1e-12)).x
    if bounds is not None:
        assert 0 < int((x == 0).sum()) < x.numel()
    x.requires_grad_()
    (product,) = torch.autograd.grad(smoothed(x, mask), x, w)
    torch.testing.assert_close(-product, v, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ONE_KIND)
def test_less_smoothing_is_closer_to_the_limit(kind):
    prior, H, equation, start = solved(kind, "denoising")
    b = equation.data.b.clone().requires_grad_()
    equation = prior.equation(operator_term(b), lambda_reg=equation.lambda_reg)

    def gradient(smoothing):
        options = AdjointOptions(rtol=1e-8, smoothing=smoothing)
        x = equation.image(equation.attach(start, options))
        return torch.autograd.grad(loss_of(x), b)[0]

    limit = gradient(1e-6)
    errors = [float(norm(gradient(s) - limit)) for s in (0.1, 1e-3, 1e-5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.5 * float(norm(limit)) and errors[2] < 0.01 * errors[0]


@pytest.mark.parametrize(
    ("weight", "kind"),
    [(w, k) for w in (1e-3, 0.03) for k in (SAFIPrior, MMRPrior)]
    + [(0.3, SAFIPrior), pytest.param(0.3, MMRPrior, marks=pytest.mark.slow)],
)
def test_small_and_large_weights_are_solved_too(kind, weight):
    y, prior = noisy_images(1), random_l1_prior(kind)
    weight = torch.tensor([weight], dtype=DOUBLE)
    solutions = []
    for inner_solver in INNER:
        options = SolverOptions(inner_solver)
        equation = prior.equation(operator_term(y), lambda_reg=weight, options=options)
        problem = equation.freeze(equation.start(y))
        result = problem.solve(weight.new_full((1,), 1e-6), weight > 0)
        assert result.converged.all()
        solutions.append(equation.image(result.x))
    torch.testing.assert_close(*solutions, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ONE_KIND)
def test_stiff_and_soft_samples_of_a_batch_are_solved_as_alone(kind):
    """Their systems are solved in two ways, chosen for each sample."""
    y, prior = noisy_images(2), random_l1_prior(kind)
    weights = torch.tensor([0.01, 0.25], dtype=DOUBLE)

    def first_solve(rows):
        equation = prior.equation(
            operator_term(y[rows]),
            lambda_reg=weights[rows],
            options=SolverOptions("admm"),
        )
        problem = equation.freeze(equation.start(y[rows]))
        rtol = torch.full_like(weights[rows], 1e-3)
        with torch.no_grad():
            return problem.rho[0], problem.solve(rtol, rtol > 0)

    rho, both = first_solve(slice(None))
    assert rho[0] < 250 < rho[1]
    for i in (0, 1):
        _, single = first_solve(slice(i, i + 1))
        torch.testing.assert_close(both.x[i], single.x[0], rtol=0, atol=1e-9)
        assert both.n_iter[i] == single.n_iter[0]
