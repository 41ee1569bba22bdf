"""Regularizers whose filters share masks in groups, and solves that use them."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from problems import DOUBLE, generator, images, relative_error
from skimage.data import camera

from deepinv_deal import DEAL, DEALPrior, SolverOptions
from deepinv_deal._batch import norm
from deepinv_deal.operators import MultiConv
from deepinv_deal.problems import AttentiveQuadratic
from deepinv_deal.problems.grouped import (
    GROUPS,
    GroupedQuadratic,
    cholesky,
    group_masks,
)
from deepinv_deal.problems.preconditioning import LEAST_FILTERS
from deepinv_deal.problems.quadratic import FIRST_RTOL, FIRST_SQUARED_MASK


def filters(channels=1, number=12):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return MultiConv((channels, 4, number), kernel_size=3).double().operator()


def in_the_middle(n, channels, size=25):
    """Images whose filtered versions do not meet the border."""
    x = torch.zeros(n, channels, size, size + 1, dtype=DOUBLE)
    part = torch.randn(n, channels, 6, 6, generator=generator(), dtype=DOUBLE)
    x[..., 10:16, 9:15] = part
    return x


def levels(*shape, seed=3):
    return 0.1 + torch.rand(shape, generator=generator(seed), dtype=DOUBLE)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_it_is_exact_for_masks_that_do_not_vary(channels):
    W = filters(channels)
    # But for the tails of its convolutions at the border.
    squared = levels(2, 12, 1, 1).expand(2, 12, 25, 26)
    x = in_the_middle(2, channels)
    R = AttentiveQuadratic(W, torch.ones_like)
    assert relative_error(R.grouped(squared)(x), R.normal(x, squared)) < 3e-3


def test_masks_made_in_blocks_of_rows_are_those_of_all_rows(monkeypatch):
    squared, correlations = levels(2, 12, 9, 10), filters().correlations().detach()
    whole = GroupedQuadratic.of(squared, correlations)
    monkeypatch.setattr("deepinv_deal.problems.grouped.BLOCK_BYTES", 1)
    blocks = GroupedQuadratic.of(squared, correlations)
    torch.testing.assert_close(blocks.masks, whole.masks, rtol=1e-13, atol=0)


def test_masks_too_small_for_a_quotient_are_none():
    squared = torch.full((1, 12, 9, 10), 1e-42)
    correlations = filters().correlations().detach().float()
    R = GroupedQuadratic.of(squared, correlations)
    assert R(torch.ones(1, 1, 9, 10)).isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_one_mask_for_all_is_the_same_without_groups(channels):
    W = filters(channels)
    with torch.no_grad():
        correlations = W.correlations()
        x = torch.randn(2, channels, 25, 26, generator=generator(), dtype=DOUBLE)
        one = GroupedQuadratic.uniform(0.4, correlations, 25, 26)(x)
        squared = torch.full((1, 12, 25, 26), 0.4, dtype=DOUBLE)
        assert relative_error(GroupedQuadratic.of(squared, correlations)(x), one) < 1e-6


def test_real_and_imaginary_parts_have_masks_of_their_own():
    squared = levels(4, 12, 1, 1).expand(4, 12, 25, 26)
    x = in_the_middle(2, 2)
    R = AttentiveQuadratic(filters(), torch.ones_like)
    assert relative_error(R.grouped(squared)(x), R.normal(x, squared)) < 3e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("together", [1, 2**30])
def test_it_is_symmetric_and_not_negative_with_any_mask(
    channels, together, monkeypatch
):
    monkeypatch.setattr("deepinv_deal.problems.grouped.TOGETHER", together)
    squared = levels(1, 12, 9, 8)
    R = AttentiveQuadratic(filters(channels), torch.ones_like).grouped(squared)
    basis = torch.eye(72 * channels, dtype=DOUBLE).view(-1, channels, 9, 8)
    dense = torch.cat([R(v[None]) for v in basis]).flatten(1)
    assert (dense - dense.T).abs().max() < 1e-12 * dense.abs().max()
    assert torch.linalg.eigvalsh(dense)[0] > -1e-10 * dense.abs().max()


def test_masks_of_few_patterns_are_found_whatever_their_strength():
    patterns = levels(1, GROUPS, 20, 21)
    names = torch.tensor([0, 3, 1, 1, 2, 0, 3, 2, 2, 0, 1, 3])
    strength = levels(1, 12, 1, 1, seed=4)
    group = group_masks(strength * patterns[:, names])
    found = group.to(torch.int64).argmax(2)[0]
    assert (group.sum(2) == 1).all()
    same = found[:, None] == found
    assert torch.equal(same, names[:, None] == names)
    # The sample of another image changes nothing.
    pair = torch.cat([levels(1, 12, 20, 21, seed=8), strength * patterns[:, names]])
    assert torch.equal(group_masks(pair)[1], group[0])


def test_masks_that_are_zero_do_no_harm():
    W, x = filters(), in_the_middle(1, 1)
    found = GroupedQuadratic.of(x.new_zeros(1, 12, 25, 26), W.correlations())(x)
    assert torch.equal(found, torch.zeros_like(x))


def test_factors_are_those_of_cholesky():
    A = torch.randn(2, 3, 3, 5, 4, generator=generator(), dtype=torch.complex128)
    M = torch.einsum("ncfhw,ndfhw->ncdhw", A, A.conj())[:, None]
    L = cholesky(M)
    expected = torch.linalg.cholesky(M.movedim((2, 3), (4, 5))).movedim((4, 5), (2, 3))
    torch.testing.assert_close(L, expected)
    # A matrix of rank one, as of a group of one filter.
    A = A[:, :, :1]
    M = torch.einsum("ncfhw,ndfhw->ncdhw", A, A.conj())[:, None]
    L = cholesky(M)
    product = torch.einsum("nkcfhw,nkdfhw->nkcdhw", L, L.conj())
    torch.testing.assert_close(product, M, rtol=1e-6, atol=1e-6)


# -- in models -----------------------------------------------------------------


def prior(channels=1, number=LEAST_FILTERS):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made = DEALPrior(in_channels=channels, num_filters=number)
        made.kappa.coefficients.fill_(3.0)
    return made.double()


def make(choice, channels=1, number=LEAST_FILTERS, **settings):
    solver = SolverOptions(preconditioner=choice)
    settings = {"rtol": 1e-8, "max_iter": 200, "lambda_reg": 0.3} | settings
    return DEAL(prior=prior(channels, number), solver=solver, **settings)


def mask_of(*shape):
    return (torch.rand(shape, generator=generator(5)) < 0.6).double()


KERNEL = torch.tensor([[[[1.0, 2, 1], [2, 9, 2], [1, 2, 3]]]], dtype=DOUBLE) / 23
PHYSICS = {
    "denoising": lambda: None,
    "inpainting": lambda: dinv.physics.Inpainting((1, 18, 17), mask=mask_of(1, 18, 17)),
    "circular blur": lambda: dinv.physics.Blur(KERNEL, padding="circular"),
    "valid blur": lambda: dinv.physics.Blur(KERNEL, padding="valid"),
    "MRI": lambda: dinv.physics.MRI(mask=mask_of(18, 17), img_size=(18, 17)),
    "downsampling": lambda: dinv.physics.Downsampling(
        (1, 18, 16), filter=KERNEL, factor=2
    ),
}


def measured(name):
    physics = PHYSICS[name]()
    x = images(2, 2 if name == "MRI" else 1, 18, 16 if name == "downsampling" else 17)
    return (x if physics is None else physics.A(x)), physics


@pytest.mark.parametrize("name", PHYSICS)
def test_the_solution_is_the_same_with_fewer_iterations(name):
    y, physics = measured(name)
    found = {}
    for choice in ("none", "grouped", "auto"):
        with torch.no_grad():
            x_hat, info = make(choice)(y, physics, sigma=0.1, return_info=True)
        assert info.converged.all()
        found[choice] = x_hat, info.inner_iter
    for choice in ("grouped", "auto"):
        assert relative_error(found[choice][0], found["none"][0]) < 1e-6
    if name != "denoising":  # which is easy at such a weight
        assert (found["grouped"][1] < 0.7 * found["none"][1]).all()
    # Of what is no convolution, nor diagonal, something better may be found.
    if name not in ("valid blur", "downsampling"):
        assert torch.equal(found["auto"][1], found["grouped"][1])


@pytest.mark.parametrize("settings", [{"slices": "mean"}, {"bounds": (0.2, 0.8)}])
def test_volumes_and_bounds(settings):
    y, results = images(6, 1, 11, 10).movedim(1, 0)[None], []
    if "bounds" in settings:
        y = y[:, :, 0]
    for choice in ("none", "grouped"):
        with torch.no_grad():
            x_hat, info = make(choice, **settings)(y, sigma=0.1, return_info=True)
        assert info.converged.all()
        results.append(x_hat)
    assert relative_error(results[1], results[0]) < 1e-6


def test_trained_colour_filters_are_factored_in_single_precision():
    # They pass no mean, and rounding makes matrices of low frequencies indefinite.
    W = DEAL(in_channels=3).prior.W.operator()
    number, size = W.out_channels, (40, 41)
    R = AttentiveQuadratic(W, torch.ones_like)
    x = 1 + 0.1 * torch.randn(1, 3, *size, generator=generator())
    squared = levels(1, number, *size).float()
    with torch.no_grad():
        grouped = GroupedQuadratic.of(squared, W.correlations())
        assert all(part.isfinite().all() for part in grouped.factors)
        energy, exact = (grouped(x) * x).sum(), (R.normal(x, squared) * x).sum()
    assert 0.5 * exact < energy < 2 * exact


def test_colour():
    y = images(1, 3, 14, 15)
    physics = dinv.physics.Inpainting((3, 14, 15), mask=mask_of(3, 14, 15))
    results = []
    for choice in ("none", "grouped"):
        with torch.no_grad():
            results.append(make(choice, 3)(y, physics, sigma=0.1, return_info=True))
    assert relative_error(results[1][0], results[0][0]) < 1e-6
    assert (results[1][1].inner_iter < results[0][1].inner_iter).all()


def test_a_batch_is_solved_as_its_samples():
    y, physics = measured("valid blur")
    model = make("grouped")
    with torch.no_grad():
        x_hat, info = model(y, physics, sigma=0.1, return_info=True)
        for i in range(2):
            alone, own = model(y[i : i + 1], physics, sigma=0.1, return_info=True)
            assert relative_error(alone, x_hat[i : i + 1]) < 1e-9
            assert torch.equal(own.inner_iter, info.inner_iter[i : i + 1])


def test_gradients_are_the_same():
    y, physics = measured("inpainting")
    gradients = []
    for choice in ("none", "grouped"):
        weight = torch.full((2,), 0.3, dtype=DOUBLE, requires_grad=True)
        model = make(choice, rtol=1e-9)
        model(y, physics, sigma=0.1, lambda_reg=weight).square().sum().backward()
        gradients.append(weight.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_few_filters_are_not_grouped_by_themselves():
    y, physics = measured("inpainting")
    number = LEAST_FILTERS - 1
    counts = []
    for choice in ("grouped", "auto"):
        model = make(choice, number=number)
        with torch.no_grad():
            info = model(y, physics, sigma=0.1, return_info=True)[1]
        counts.append(info.inner_iter)
    assert (counts[0] < counts[1]).all()


# -- the first image in denoising ------------------------------------------------------


@pytest.mark.parametrize("form", ["gray", "complex", "colour", "volume"])
def test_the_first_image_is_about_the_solution_for_equal_masks(form):
    channels = {"complex": 2, "colour": 3}.get(form, 1)
    # Not zero at the border, which the Fourier transforms continue otherwise.
    y = in_the_middle(2, channels)
    settings = {"slices": "mean"} if form == "volume" else {}
    if form == "volume":
        y = y[:, :, 6:20, None].expand(-1, -1, -1, 14, -1)
    model = make("auto", 3 if form == "colour" else 1, **settings)
    problem = model.pose(y, sigma=0.1, lambda_reg=torch.tensor([0.5, 20.0]))
    equation = problem.equation
    x = problem.start()
    square = torch.full_like(equation.regularizer.squared_mask(x), FIRST_SQUARED_MASK)
    residual = equation.data.b - x - equation.force(x, square)
    assert (norm(residual) < 3 * FIRST_RTOL * norm(equation.data.b)).all()
    assert problem.init is None and not x.requires_grad


def test_from_it_fewer_iterations_lead_to_the_same_image():
    x = torch.from_numpy(camera()[62:110, 190:238] / 255).float()[None, None]
    y = x + 25 / 255 * torch.randn(x.shape, generator=generator())
    model = DEAL(rtol=1e-3)
    results = []
    for init in (None, "zero"):
        with torch.no_grad():
            results.append(model(y, sigma=25 / 255, init=init, return_info=True))
    (near, info), (far, other) = results
    assert info.history[0] < 0.5 and other.history[0] == 1
    assert info.n_iter < other.n_iter
    assert relative_error(near, far) < 1e-3
