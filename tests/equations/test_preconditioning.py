"""Preconditioners of DEAL's systems: right on easy systems, harmless on all."""

import deepinv as dinv
import pytest
import torch
from problems import (
    DOUBLE,
    generator,
    images,
    random_model,
    random_prior,
    relative_error,
)

from deepinv_deal import SolverOptions
from deepinv_deal.operators import MultiConv
from deepinv_deal.problems import AttentiveQuadratic, Preconditioning, operator_term
from deepinv_deal.problems.options import PRECONDITIONERS


def preconditioning(choice, data, weight, W):
    return Preconditioning(choice, data, weight, AttentiveQuadratic(W, torch.ones_like))


@pytest.fixture(scope="module")
def filters():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return MultiConv((1, 2, 3), kernel_size=3).double().operator()


def identity(x):
    return x


def blurred(x):
    """A circular convolution."""
    y = x
    for dim in (-2, -1):
        y = 0.5 * y + 0.25 * (y.roll(1, dim) + y.roll(-1, dim))
    return y


def in_the_middle(channels, size=24):
    """An image whose filtered versions do not meet the border."""
    x = torch.zeros(2, channels, size, size, dtype=DOUBLE)
    middle = slice(size // 2 - 3, size // 2 + 3)
    x[:, :, middle, middle] = torch.randn(
        2, channels, 6, 6, generator=generator(), dtype=DOUBLE
    )
    return x


def test_a_symbol_that_misfits_has_no_small_eigenvalues(filters):
    x = torch.zeros(2, 1, 24, 24, dtype=DOUBLE)
    window = torch.linspace(0.5, 1, 24, dtype=DOUBLE)
    data = operator_term(x, lambda v: window * blurred(window * v))
    assert data.H is not None
    values, misfit = data.H.transfer
    used = preconditioning("circulant", data, torch.ones(2), filters).symbol
    mean = values.mean((1, 2, 3))
    assert (misfit > 0.1).all()
    assert (used.amin((1, 2, 3)) >= misfit * mean).all()


@pytest.mark.parametrize("channels", [1, 2])
def test_circulant_inverts_a_convolutional_system_exactly(filters, channels):
    x = in_the_middle(channels)
    weight = torch.tensor([0.5, 3.0], dtype=DOUBLE)
    # Masks that are constant over the image, another constant for every filter.
    level = torch.tensor([0.2, 0.9, 0.5], dtype=DOUBLE).view(1, 3, 1, 1)
    squared = level.expand(2 * channels, 3, *x.shape[2:])

    def regularizer(v):
        parts = v.reshape(-1, 1, *v.shape[2:])
        return filters.adjoint(squared * filters(parts)).view_as(v)

    data = operator_term(x, blurred)
    P = preconditioning("circulant", data, weight, filters).at(squared)[0]
    image = blurred(x) + weight.view(2, 1, 1, 1) * regularizer(x)
    assert relative_error(P(image), x) < 1e-10


def test_circulant_wraps_kernels_larger_than_the_image(filters):
    # The symbol at the frequencies of a 6 x 5 image is a subset of that of 12 x 10.
    squared = torch.ones(1, 3, 1, 1, dtype=DOUBLE)
    symbols = []
    for size in ((12, 10), (6, 5)):
        b = torch.zeros(1, 1, *size, dtype=DOUBLE)
        weight = torch.ones(1, dtype=DOUBLE)
        own = preconditioning("circulant", operator_term(b, identity), weight, filters)
        symbols.append(own.regularizer.symbol(squared.expand(1, 3, *size), 1))
    torch.testing.assert_close(symbols[0][..., ::2, ::2], symbols[1])


def test_diagonal_is_that_of_the_system(filters):
    # With masks that are constant over the image, away from the border.
    x = torch.zeros(1, 1, 24, 24, dtype=DOUBLE)
    x[..., 12, 12] = 1
    mask = torch.rand(1, 1, 24, 24, generator=generator(), dtype=DOUBLE)
    weight = torch.tensor([2.0], dtype=DOUBLE)
    squared = torch.full((1, 3, 24, 24), 0.3, dtype=DOUBLE)
    data = operator_term(x, lambda v: mask * v)
    P = preconditioning("diagonal", data, weight, filters).at(squared)[0]
    entry = mask[..., 12, 12] + 2 * (filters.adjoint(squared * filters(x)) * x).sum()
    torch.testing.assert_close(1 / P(x)[..., 12, 12], entry)


@pytest.mark.parametrize(
    ("H", "circulant", "kept"),
    [(identity, True, False), (blurred, True, True), (lambda x: 0 * x, True, False)],
)
def test_auto_considers_what_fits(filters, H, circulant, kept):
    b = torch.zeros(2, 1, 12, 12, dtype=DOUBLE)
    weight = torch.ones(2, dtype=DOUBLE)
    own = preconditioning("auto", operator_term(b, H), weight, filters)
    assert own.solver.candidates.tolist() == [kept, kept]
    if kept:
        assert (own.use_circulant == circulant).all()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(
    ("name", "replaced"),
    [("blur", True), ("nearly a blur", False), ("identity", False), ("mask", False)],
)
def test_a_convolution_is_applied_by_its_fourier_transform(
    filters, name, replaced, dtype
):
    x = torch.randn(2, 1, 12, 13, generator=generator(), dtype=dtype)
    calls = []

    def H(v):
        calls.append(v)
        if name in ("mask", "identity"):
            return (1 - (name == "mask") * (x > 0).to(v)) * v
        return blurred(v) + (name == "nearly a blur") * 1e-3 * (x > 0) * v

    data, weight = operator_term(x, H), torch.ones(2, dtype=dtype)
    own = preconditioning("auto", data, weight, filters.to(dtype))
    # Two random images tell a convolution; others take four, and four for the diagonal.
    assert len(calls) == (2 if name in ("blur", "identity") else 8)
    assert (own.H is not data.H) == replaced
    assert relative_error(own.H(x), H(x)) < (1e-6 if dtype == torch.float32 else 1e-13)


def test_auto_prefers_the_diagonal_for_masks(filters):
    mask = torch.rand(2, 1, 12, 12, generator=generator(), dtype=DOUBLE).round()
    weight = torch.ones(2, dtype=DOUBLE)
    data = operator_term(mask, lambda x: mask * x)
    own = preconditioning("auto", data, weight, filters)
    assert own.solver.candidates.all() and not own.use_circulant.any()


@pytest.mark.parametrize("H", [identity, blurred])
def test_the_first_system_needs_few_iterations_if_masks_are_flat(filters, H):
    b = torch.randn(2, 1, 24, 24, generator=generator(), dtype=DOUBLE)
    weight = torch.tensor([40.0, 60.0], dtype=DOUBLE)
    rtol, everyone = torch.full_like(weight, 0.1), torch.ones(2, dtype=torch.bool)
    flat = torch.full((2, 3, 24, 24), 0.5, dtype=DOUBLE)
    varying = flat.clone()
    varying[1, :, ::2] = 1.0

    def iterations(choice, squared, n_solves=1):
        def A(v):
            return H(v) + weight.view(2, 1, 1, 1) * filters.adjoint(
                squared * filters(v)
            )

        own = preconditioning(choice, operator_term(b, H), weight, filters)
        for _ in range(n_solves):
            result = own.solve(A, b, rtol, 100, squared, everyone)
            assert result.converged.all()
            assert relative_error(A(result.x), b) < 0.1
        return result.n_iter

    plain = iterations("none", flat)
    assert (2 * iterations("auto", flat) < plain).all()
    # Only the first system is known to have flat masks, and only such masks count.
    assert torch.equal(iterations("auto", flat, 2), plain)
    mixed, rough = iterations("auto", varying), iterations("none", varying)
    assert 2 * mixed[0] < rough[0] and mixed[1] == rough[1]


def test_the_first_system_is_plain_where_the_model_is_not_exact(filters):
    mask = torch.rand(1, 1, 12, 12, generator=generator(), dtype=DOUBLE).round()
    weight = torch.ones(1, dtype=DOUBLE)
    squared = torch.ones(1, 3, 12, 12, dtype=DOUBLE)

    def H(x):
        return mask * x

    def A(v):
        return H(v) + 50 * filters.adjoint(squared * filters(v)) + 0.1 * v

    results = [
        preconditioning(choice, operator_term(mask, H), weight, filters).solve(
            A, mask, 0.1 * weight, 100, squared, weight > 0
        )
        for choice in ("auto", "none", "circulant")
    ]
    assert torch.equal(results[0].x, results[1].x)
    assert not torch.equal(results[0].x, results[2].x)


PHYSICS = {
    "inpainting": lambda: dinv.physics.Inpainting(
        (1, 12, 11), mask=0.3 + 0.7 * images(1, 1, 12, 11)[0].round()
    ),
    "blur": lambda: dinv.physics.Blur(
        torch.tensor([[[[1.0, 2, 1], [2, 9, 2], [1, 2, 3]]]], dtype=DOUBLE) / 23,
        padding="circular",
    ),
}


@pytest.mark.parametrize("name", PHYSICS)
def test_the_solution_does_not_depend_on_the_preconditioner(name):
    physics, prior = PHYSICS[name](), random_prior()
    y = physics(images(2, 1, 12, 11))
    answers = []
    for choice in PRECONDITIONERS:
        model = random_model(prior, solver=SolverOptions(preconditioner=choice))
        with torch.no_grad():
            answers.append(model(y, physics, lambda_reg=0.5, return_info=True))
    for x_hat, info in answers:
        assert info.converged.all()
        assert relative_error(x_hat, answers[-1][0]) < 1e-7
    work = {int(info.inner_iter.sum()) for _, info in answers}
    assert len(work) >= 3  # none, circulant and diagonal differ


def test_gradients_do_not_depend_on_the_preconditioner():
    physics, prior = PHYSICS["blur"](), random_prior()
    y = physics(images(2, 1, 12, 11))
    gradients = []
    for choice in ("none", "circulant"):
        model = random_model(prior, solver=SolverOptions(preconditioner=choice))
        weight = torch.full((2,), 0.5, dtype=DOUBLE, requires_grad=True)
        model(y, physics, lambda_reg=weight).square().sum().backward()
        gradients.append(weight.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-7
