"""Filters, masks, splines, paths, dictionaries and ablations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from problems import (
    DOUBLE,
    generator,
    images,
    random_l1_prior,
    random_model,
    random_prior,
    relative_error,
)

from deepinv_deal import (
    DEAL,
    MMR,
    SAFI,
    MMRPrior,
    PatchSynthesis,
    PatchSynthesisPrior,
    SAFIPrior,
    SmoothPlusSparse,
    SmoothPlusSparsePrior,
)
from deepinv_deal.interpret import (
    atom_usage,
    decompose,
    effective_filters,
    learned_splines,
    mask_curves,
    masked_responses,
    normal_response,
    plot_atoms,
    plot_decomposition,
    plot_filters,
    plot_masked_responses,
    plot_normal_response,
    plot_path,
    solution_path,
    with_filters,
    without_mask,
)


def l1_model(form, kind, **settings):
    return form(prior=random_l1_prior(kind), rtol=1e-4, **settings)


@pytest.fixture(params=["deal", "safi", "mmr"])
def model(request):
    if request.param == "deal":
        return random_model(rtol=1e-6)
    kinds = {"safi": (SAFI, SAFIPrior), "mmr": (MMR, MMRPrior)}
    return l1_model(*kinds[request.param])


# -- filters ------------------------------------------------------------


def test_filtering_with_the_kernels_is_the_operator_away_from_the_border(model):
    kernels = effective_filters(model).detach()
    size = kernels.shape[-1]
    x = images(1, 1, 3 * size, 3 * size + 1)
    bound = model.prior.bind(*((0.1, x) if isinstance(model, DEAL) else ()))
    # The true kernels are impulse responses: conv2d does not flip.
    pad = size // 2
    found = torch.nn.functional.conv2d(x, kernels.flip(-2, -1), padding=pad)
    inner = (..., slice(size, -size), slice(size, -size))
    assert relative_error(found[inner], bound.analyse(x)[inner]) < 1e-10


def test_the_kernels_of_the_mask_are_those_of_its_first_layer():
    model = random_model()
    kernels = effective_filters(model, "mask").detach()
    assert kernels.shape == (4, 1, 25, 25)
    assert relative_error(kernels, effective_filters(model)) > 0.1
    with pytest.raises(TypeError, match="branch='mask'"):
        effective_filters(SAFI(num_filters=2), "mask")
    with pytest.raises(ValueError, match="branch must be"):
        effective_filters(model, "both")


def test_the_spectrum_is_that_of_the_normal_operator(model):
    impulse, spectrum = (t.detach() for t in normal_response(model, 64))
    kernels = effective_filters(model).detach()[:, 0]
    transform = torch.fft.fft2(kernels, s=(64, 64)).abs().square().sum(0)
    assert relative_error(spectrum, torch.fft.fftshift(transform)) < 1e-10
    assert spectrum[32, 32] < 1e-10  # constants are free
    assert impulse.abs().max() == impulse[len(impulse) // 2, len(impulse) // 2]


def test_models_without_filters_are_refused():
    with pytest.raises(TypeError, match="PatchSynthesis, which has no mask"):
        effective_filters(PatchSynthesis(num_atoms=4, patch_size=3))


def test_colour_filters_can_be_drawn():
    model = random_model(random_prior(3))
    filters = effective_filters(model)
    assert filters.shape == (4, 3, 25, 25)
    assert plot_filters(filters.detach(), 3, columns=2).axes
    assert plot_normal_response(*normal_response(model)).axes


# -- masks ------------------------------------------------------------


def test_responses_and_masks_are_those_of_the_reconstruction(model):
    y = images(2, 1, 16, 17)
    settings = {"sigma": 0.05} if isinstance(model, DEAL) else {}
    with torch.no_grad():
        x_hat, info = model(y, return_info=True, **settings)
    found = masked_responses(model, x_hat, **settings)
    assert relative_error(found.mask, info.mask) < 1e-12
    assert relative_error(found.masked, found.mask * found.response) == 0
    energy = found.masked.square().sum((-2, -1)) / found.response.square().sum((-2, -1))
    assert relative_error(found.saved, 1 - energy) < 1e-10


def test_the_noise_level_and_the_channels_are_checked():
    model = random_model()
    with pytest.raises(ValueError, match="sigma is missing"):
        masked_responses(model, images(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"x must be images \(B, 1, H, W\)"):
        masked_responses(model, images(1, 3, 8, 8), 0.1)


# -- splines ------------------------------------------------------------


def test_curves_are_the_values_of_the_splines(model):
    curves = learned_splines(model)
    splines = model.prior.splines()
    assert len(curves) == len(splines)
    for curve, spline in zip(curves, splines, strict=True):
        channels = len(curve.values)
        t = curve.t.expand(1, channels, -1)
        assert relative_error(curve.values, spline(t)[0]) < 1e-12


def test_mask_curves_are_the_last_layer_of_the_mask():
    model = random_model()
    (curve,) = mask_curves(model, [0.1], t_max=0.5, num_points=11)
    assert curve.values.shape == (4, 11)
    assert float(curve.t[-1]) == 0.5
    bound = model.prior.mask_network.bind(torch.tensor([25.5], dtype=DOUBLE))
    t = curve.t.view(1, 1, 1, -1).expand(1, 4, 1, -1)
    expected = bound.phi[2](bound.alpha * t).clamp(0.01, 1)[0, :, 0]
    assert relative_error(curve.values, expected) < 1e-12
    with pytest.raises(TypeError, match="mask_curves needs DEAL"):
        mask_curves(SAFI(num_filters=2), [0.1])


# -- paths ------------------------------------------------------------


def test_a_path_applies_the_map_again_and_again():
    model = random_model()
    y = images(2, 1, 12, 13)
    path = solution_path(
        model, y, sigma=0.05, num_iter=3, inner_rtol=1e-10, init="zero"
    )
    assert path.x.shape == (4, 2, 1, 12, 13)
    assert path.mask.shape == (4, 2, 1, 12, 13)
    assert path.residual.shape == (4, 2)
    assert path.x[0].abs().max() == 0
    equation = model.pose(y, sigma=0.05).equation
    with torch.no_grad():
        for before, after in zip(path.x[:-1], path.x[1:], strict=True):
            residual = equation(after, equation.mask(before))
            assert float(residual.abs().max()) < 1e-8
        mask = equation.mask(path.x[2]).mean(1, keepdim=True)
    assert relative_error(path.mask[2], mask) < 1e-12


def test_paths_from_all_starts_meet():
    model, y = random_model(), images(1, 1, 12, 13)
    noise = torch.rand(y.shape, generator=generator(4), dtype=DOUBLE)
    zero, data, random = (
        solution_path(model, y, sigma=0.05, init=init, num_iter=25, inner_rtol=1e-6)
        for init in ("zero", "adjoint", noise)
    )
    assert relative_error(random.x[0], noise) == 0
    for path in (data, random):
        assert relative_error(path.x[0], zero.x[0] + 1e-9) > 0.5
        assert relative_error(path.x[-1], zero.x[-1]) < 1e-6


def test_paths_of_attentive_l1_models_end_at_the_solution():
    model = l1_model(SAFI, SAFIPrior)
    y = images(1, 1, 12, 13)
    path = solution_path(model, y, num_iter=5)
    with torch.no_grad():
        assert relative_error(path.x[-1], model(y)) < 1e-2


def test_complex_images_have_paths():
    y = images(1, 2, 12, 13)
    y = torch.complex(y[:, :1], y[:, 1:])
    path = solution_path(random_model(), y, sigma=0.05, num_iter=2)
    assert path.x.is_complex()
    assert path.mask.shape == (3, 1, 1, 12, 13)


# -- dictionaries ------------------------------------------------------------


def dictionary(form, boundary="circular", **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if form is PatchSynthesis:
            prior = PatchSynthesisPrior(8, 3, lambda_reg=0.02, boundary=boundary)
        else:
            prior = SmoothPlusSparsePrior(
                form, 8, 4, 3, lambda_reg=0.02, boundary=boundary
            )
    model = PatchSynthesis if form is PatchSynthesis else SmoothPlusSparse
    return model(prior=prior.double(), **settings)


@pytest.mark.parametrize("boundary", ["circular", "valid"])
@pytest.mark.parametrize("form", ["group", "weakly_convex", PatchSynthesis])
def test_the_parts_are_averages_of_patches_and_add_up(form, boundary):
    model = dictionary(form, boundary)
    model.rtol = 1e-2  # the parts add up wherever the solver stops
    y = images(2, 1, 10, 12)
    with torch.no_grad():
        x_hat, info = model(y, return_info=True)
    parts = decompose(model, x_hat, info)
    assert relative_error(parts.image, x_hat) < 1e-12
    # The smooth part by explicit patches.
    frame = model.prior.dictionary.frame()
    n = frame.features.patch_size
    if boundary == "circular":
        before, after = (n - 1) // 2, n // 2
        pad = (before, after, before, after)
        padded = torch.nn.functional.pad(x_hat, pad, mode="circular")
    else:
        padded = x_hat
    P = frame.free.detach()
    patches = torch.nn.functional.unfold(padded, n)
    smooth = P.T @ (P @ patches)
    folded = torch.nn.functional.fold(smooth, padded.shape[-2:], n)
    count = torch.nn.functional.fold(torch.ones_like(smooth), padded.shape[-2:], n)
    if boundary == "valid":
        assert relative_error(parts.smooth, folded / count) < 1e-12
    else:  # wrap the padding back
        rows, columns = x_hat.shape[-2:]
        wrapped = torch.zeros_like(x_hat)
        for i in range(folded.shape[-2]):
            for j in range(folded.shape[-1]):
                target = ((i - before) % rows, (j - before) % columns)
                wrapped[..., target[0], target[1]] += folded[..., i, j]
        assert relative_error(parts.smooth, wrapped / n**2) < 1e-12
    assert parts.sparse.abs().max() > 1e-3


def test_atoms_are_sorted_by_their_share():
    model = dictionary("group")
    with torch.no_grad():
        x_hat, info = model(images(2, 1, 10, 12), return_info=True)
    usage = atom_usage(model, info)
    total = info.coefficients.unflatten(1, (-1, 8)).abs().sum((0, 1, 3, 4))
    torch.testing.assert_close(usage.use, total[usage.order] / total.sum())
    assert bool((usage.use.diff() <= 0).all())
    torch.testing.assert_close(
        usage.atoms.square().sum((1, 2)), torch.ones(8, dtype=DOUBLE)
    )
    free = usage.free_atoms.flatten(1)
    torch.testing.assert_close(free @ free.T, torch.eye(4, dtype=DOUBLE))
    assert float((usage.atoms.flatten(1) @ free.T).abs().max()) < 1e-10
    assert float(usage.free_atoms[0].std()) < 1e-10


def test_the_numbers_of_atoms_count_equal_coefficients():
    model = dictionary("group")
    x = images(1, 1, 10, 12)
    with torch.no_grad():
        x_hat, info = model(x, return_info=True)
    info.coefficients = torch.zeros_like(info.coefficients)
    assert float(decompose(model, x_hat, info).num_atoms.max()) == 0
    info.coefficients[:, :3] = 0.7
    found = decompose(model, x_hat, info).num_atoms
    torch.testing.assert_close(found, torch.full_like(x, 3.0))


def test_wrong_models_and_reports_are_refused():
    model = dictionary("group")
    x = images(1, 1, 10, 12)
    with pytest.raises(TypeError, match="model must be PatchSynthesis"):
        atom_usage(random_model(), None)
    with pytest.raises(TypeError, match="info must be"):
        atom_usage(model, None)
    with torch.no_grad():
        x_hat, info = model(x, return_info=True)
    with pytest.raises(TypeError, match="x_hat must be real"):
        decompose(model, torch.complex(x_hat, x_hat), info)


# -- ablations ------------------------------------------------------------


def test_without_mask_deal_is_one_linear_system():
    model = random_model()
    y = images(1, 1, 12, 13)
    with torch.no_grad():
        x_hat, info = without_mask(model)(y, sigma=0.05, return_info=True)
        W = model.prior.W.operator()
        rest = x_hat + info.lambda_reg * W.normal(x_hat) - y
        assert float(rest.abs().max()) < 1e-8
        assert bool((info.mask == 1).all())
        assert relative_error(model(y, sigma=0.05), x_hat) > 1e-3


@pytest.mark.parametrize(("form", "kind"), [(SAFI, SAFIPrior), (MMR, MMRPrior)])
def test_attentive_l1_models_can_lose_their_mask(form, kind):
    model = l1_model(form, kind)
    with torch.no_grad():
        _, info = without_mask(model)(images(1, 1, 12, 13), return_info=True)
    assert bool((info.mask == 1).all())


def test_all_filters_are_the_model_and_none_leave_the_data_alone():
    model = random_model()
    y = images(1, 1, 12, 13)
    with torch.no_grad():
        whole = with_filters(model, range(4))(y, sigma=0.05)
        assert relative_error(whole, model(y, sigma=0.05)) < 1e-8
        assert relative_error(with_filters(model, [])(y, sigma=0.05), y) < 1e-8
        two = with_filters(model, [0, 2])(y, sigma=0.05, return_info=True)[1]
    assert bool((two.mask[:, [1, 3]] == 0).all())
    assert bool((two.mask[:, [0, 2]] > 0).all())
    with pytest.raises(IndexError, match="between 0 and 3"):
        with_filters(model, [4])


def test_usage_of_atoms_for_one_patch_but_not_for_three_orientations():
    model = dictionary("group", boundary="valid")
    n = model.prior.dictionary.patch_size
    with torch.no_grad():
        info = model(images(1, 1, n, n), return_info=True)[1]
    assert info.coefficients.shape[2:] == (1, 1)
    shares = info.coefficients.abs().flatten()
    found = atom_usage(model, info).use
    torch.testing.assert_close(found, shares.sort(descending=True)[0] / shares.sum())
    mean = dictionary("group", boundary="valid", slices="mean")
    with torch.no_grad():
        info = mean(images(n, 1, n, n).movedim(1, 0)[None], return_info=True)[1]
    with pytest.raises(ValueError, match="three orientations"):
        atom_usage(mean, info)


# -- figures ------------------------------------------------------------


def test_every_figure_has_the_expected_axes():
    model = random_model(rtol=1e-4)
    x = images(1, 1, 14, 15)
    with torch.no_grad():
        x_hat, info = model(x, sigma=0.05, return_info=True)
    filters = effective_filters(model)
    responses = masked_responses(model, x_hat, 0.05)
    path = solution_path(model, x, sigma=0.05, num_iter=4)
    patch_model = dictionary("group")
    with torch.no_grad():
        patched, patch_info = patch_model(x, return_info=True)
    parts = decompose(patch_model, patched, patch_info)
    usage = atom_usage(patch_model, patch_info)
    synthesis = dictionary(PatchSynthesis)
    only_constants = atom_usage(synthesis, synthesis(x, return_info=True)[1])
    figures = [
        (plot_filters, (filters, 3), 1),
        (plot_normal_response, normal_response(model), 3),
        (plot_masked_responses, (responses, filters, [0, 1], x), 10),
        (plot_masked_responses, (responses, filters, [0, 1]), 8),
        (plot_masked_responses, (responses, filters), 16),
        (partial(plot_path, num_columns=3), (path, x), 8),
        (partial(plot_path, num_columns=2), (path,), 6),
        (partial(plot_atoms, columns=3), (usage, 6, 4), 3),
        (partial(plot_atoms, columns=3), (only_constants,), 2),
        (plot_decomposition, (parts,), 5),
    ]
    for plot, arguments, number in figures:
        figure = plot(*arguments)
        assert isinstance(figure, Figure)
        assert len(figure.axes) == number
        figure.draw_without_rendering()
