"""Uncertainty, samples and averaging kernels against a dense inverse."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from linearized import SIZE, small_problem
from matplotlib.figure import Figure
from problems import (
    DOUBLE,
    dense,
    generator,
    images,
    random_model,
    random_prior,
    relative_error,
)

from deepinv_deal.interpret import (
    averaging_kernels,
    calibrate,
    linearize,
    plot_averaging_kernels,
    plot_uncertainty,
    posterior_samples,
    posterior_variance,
)

N = 16


@pytest.fixture(scope="module")
def at():
    return linearize(random_model(), images(1, 1, N, N), sigma=0.05, rtol=1e-10)


@pytest.fixture(scope="module")
def inverse(at):
    equation = at.problem.equation
    squared = equation.mask(at.x).square()
    H, force = equation.data.normal, equation.force
    B = dense(lambda v: H(v) + force(v, squared), (1, N, N))
    return torch.linalg.inv(B.detach())


def test_the_variance_is_the_exact_diagonal_for_a_spacing_as_large_as_the_image(
    at, inverse
):
    found = posterior_variance(at, 0.1, spacing=N, batch_size=64)
    expected = 0.01 * inverse.diagonal().view(1, 1, N, N)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_estimate_of_the_variance_improves_with_spacing_and_probes(at, inverse):
    exact = 0.01 * inverse.diagonal().view(1, 1, N, N)

    def error(**settings):
        estimate = posterior_variance(
            at, 0.1, batch_size=32, generator=generator(1), **settings
        )
        return relative_error(estimate, exact)

    rough = error(spacing=1, num_probes=1)
    assert error(spacing=4, num_probes=1) < 0.5 * rough
    assert error(spacing=1, num_probes=16) < 0.5 * rough


def test_samples_have_the_covariance_of_the_posterior(at, inverse):
    samples = posterior_samples(at, 0.1, 300, batch_size=150, generator=generator(2))
    assert samples.shape == (300, 1, N, N)
    mean_error = (samples.mean(0) - at.image[0]).square().mean().sqrt()
    std = 0.1 * inverse.diagonal().mean().sqrt()
    assert float(mean_error) < 3 * float(std) / 300**0.5
    found = torch.cov(samples.flatten(1).T)
    assert relative_error(found.diagonal(), 0.01 * inverse.diagonal()) < 0.12
    neighbours = found.diagonal(1).mean() / found.diagonal().mean()
    expected = inverse.diagonal(1).mean() / inverse.diagonal().mean()
    assert float(neighbours) == pytest.approx(float(expected), abs=0.03)


def test_samples_of_other_physics_have_the_right_variance():
    problem = small_problem("inpainting")
    samples = posterior_samples(problem.at, 0.1, 200, batch_size=200)
    variance = 0.01 * torch.linalg.inv(problem.B).diagonal()
    found = samples.flatten(1).var(0)
    assert float(found.mean()) == pytest.approx(float(variance.mean()), rel=0.08)


def test_samples_exist_for_stacked_physics_and_complex_images():
    x = images(1, 1, SIZE, SIZE)
    stacked = dinv.physics.StackedLinearPhysics(
        [dinv.physics.Denoising(), dinv.physics.Denoising()]
    )
    model = random_model(rtol=1e-6)
    at = linearize(model, stacked.A(x), stacked, lambda_reg=0.5)
    assert posterior_samples(at, 0.1, 2).shape == (2, 1, SIZE, SIZE)
    pair = images(1, 2, SIZE, SIZE)
    at = linearize(model, torch.complex(pair[:, :1], pair[:, 1:]), sigma=0.05)
    samples = posterior_samples(at, 0.1, 2)
    assert samples.is_complex()
    assert samples.shape == (2, 1, SIZE, SIZE)


def test_samples_and_variance_are_in_the_units_of_the_data():
    model, y = random_model(rtol=1e-8), images(1, 1, SIZE, SIZE)
    small = linearize(model, y, sigma=0.05, rtol=1e-8)
    large = linearize(model, 1000 * y, sigma=50.0, rtol=1e-8)
    assert float(large.problem.data.intensity) == 1000
    a, b = (posterior_variance(at, s) for at, s in ((small, 0.1), (large, 100.0)))
    torch.testing.assert_close(1e6 * a, b, rtol=1e-5, atol=0)
    a, b = (posterior_samples(at, s, 2) for at, s in ((small, 0.1), (large, 100.0)))
    torch.testing.assert_close(1000 * a, b, rtol=1e-5, atol=0)


def test_colour_images_have_a_variance_per_channel():
    model = random_model(random_prior(3))
    at = linearize(model, images(1, 3, 6, 6), sigma=0.05, rtol=1e-8)
    exact = posterior_variance(at, 0.1, spacing=6, batch_size=64)
    B = dense(lambda v: at.normal(v), (3, 6, 6))
    expected = 0.01 * torch.linalg.inv(B).diagonal().view(1, 3, 6, 6)
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["noise", "spacing", "num_probes"])
def test_numbers_that_are_not_positive_are_refused(at, name):
    settings = {"noise": 0.1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        posterior_variance(at, **settings)


def test_calibration_recovers_a_factor_and_the_coverage():
    std = torch.linspace(0.5, 2, 20000, dtype=DOUBLE)
    noise = torch.randn(20000, generator=generator(1), dtype=DOUBLE)
    found = calibrate(std.square(), 3 * std * noise)
    assert found.factor == pytest.approx(3, rel=0.02)
    assert found.coverage == pytest.approx(0.9, abs=0.01)
    torch.testing.assert_close(found.predicted, found.observed, rtol=0.08, atol=0)
    assert 0 < found.correlation < 1
    fixed = calibrate(std.square(), 3 * std * noise, factor=1.0, num_bins=5)
    assert fixed.factor == 1
    assert len(fixed.predicted) == 5
    assert fixed.coverage < 0.5


def test_bad_variances_are_refused():
    variance = torch.ones(4)
    with pytest.raises(ValueError, match="one shape"):
        calibrate(variance, torch.ones(5))
    variance[0] = 0
    with pytest.raises(ValueError, match="variance must be positive"):
        calibrate(variance, torch.ones(4))


# -- averaging kernels ---------------------------------------------------------------


def test_kernels_are_rows_of_the_inverse_and_average_the_data(at, inverse):
    pixels = [(3, 5), (0, 15)]
    kernels = averaging_kernels(at, pixels)
    for kernel, (row, column) in zip(kernels, pixels, strict=True):
        expected = inverse[row * N + column].view(1, N, N)
        assert relative_error(kernel, expected) < 1e-6
        average = (kernel * at.problem.data.b[0]).sum()
        assert float(average) == pytest.approx(float(at.image[0, 0, row, column]))
    with pytest.raises(IndexError, match=r"16 x 16, got \(16, 0\)"):
        averaging_kernels(at, [(16, 0)])


def test_figures_have_the_expected_axes(at):
    x = images(1, 1, N, N, seed=1)
    pixels = [(3, 5), (0, 15)]
    kernels = averaging_kernels(at, pixels)
    figure = plot_averaging_kernels(kernels, pixels, x, at.image, radius=4)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 8  # colour bars are insets
    variance = posterior_variance(at, 0.1, spacing=4)
    figure = plot_uncertainty(at.image, variance, x)
    assert len(figure.axes) == 4
    assert "correlation" in figure.axes[2].get_title()
    figure.draw_without_rendering()
