"""
Times of single operations and whole reconstructions, with the bundled weights.

    python -m pytest tests/benchmarks/times.py --benchmark-only

Not part of the tests. ``benchmarks/speed.py`` compares solvers until the same accuracy.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("_common", reason="the scripts are not part of this distribution")

from _common import SPEED_TASKS, deepinv_model

from deepinv_deal import DEAL
from deepinv_deal.operators.multi_conv import Convolution

SIZE = 128


@pytest.fixture(scope="module")
def model():
    return DEAL(warn=False)


@pytest.fixture(scope="module")
def image():
    from skimage.data import camera
    from skimage.transform import resize

    x = resize(camera() / 255.0, (SIZE, SIZE), anti_aliasing=True)
    return torch.from_numpy(255 * x)[None].round().byte()


@pytest.mark.benchmark(group="one application of W^T M^2 W")
@pytest.mark.parametrize("implementation", ["deepinv_deal", "deepinv.models.DEAL"])
def test_application(benchmark, model, implementation):
    x = torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        regularizer = model.prior.bind(25 / 255, x)
        squared_mask = regularizer.squared_mask(x)
        inner = deepinv_model(model.prior).model
        inner.W1.spectral_norm()
        inner.mask = squared_mask.sqrt()
        if implementation == "deepinv_deal":
            found = benchmark(regularizer.normal, x, squared_mask)
        else:
            found = benchmark(lambda: inner.Lt(inner.L(x, [0]), [0]))
        torch.testing.assert_close(
            found, regularizer.normal(x, squared_mask), rtol=1e-3, atol=1e-5
        )


@pytest.mark.benchmark(group="one convolution of 321 x 481 pixels")
@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "direct"])
@pytest.mark.parametrize(
    ("c_in", "c_out", "k"), [(48, 48, 7), (24, 96, 9), (96, 24, 9), (32, 8, 9)]
)
def test_convolution(benchmark, c_in, c_out, k, tiled):
    rng = torch.Generator().manual_seed(0)
    kernel = torch.randn(c_out, c_in, k, k, generator=rng)
    x = torch.randn(1, c_in, 321, 481, generator=rng)
    x = x.contiguous(memory_format=torch.channels_last)
    convolution = Convolution(kernel)
    if not tiled:
        convolution.tiles = None
    with torch.no_grad():
        out = benchmark(convolution, x)
        expected = torch.nn.functional.conv2d(x, kernel, padding=k // 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * expected.abs().max())


@pytest.mark.benchmark(group="one mask")
def test_mask(benchmark, model):
    x = torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        benchmark(model.prior.bind(25 / 255, x).squared_mask, x)


@pytest.mark.benchmark(group="reconstruction at the default tolerance")
@pytest.mark.parametrize("name", SPEED_TASKS)
def test_reconstruction(benchmark, model, image, name):
    task = SPEED_TASKS[name]
    x = task.ground_truth(image)
    (condition,) = task.conditions
    y, physics = condition.measure(x)
    settings = {"sigma": (task.sigma or condition.noise) / 255}
    if task.sigma is not None:
        settings["lambda_reg"] = condition.lambda_reg
    model = DEAL(prior=model.prior, pretrained=None, complex_mode="real", warn=False)
    with torch.no_grad():
        benchmark.pedantic(model, (y, physics), settings, rounds=2, warmup_rounds=1)


@pytest.mark.benchmark(group="denoising with gradient")
@pytest.mark.parametrize("max_iter", [10, 100])
def test_gradient(benchmark, model, image, max_iter):
    task = SPEED_TASKS["denoising"]
    y, _ = task.conditions[0].measure(task.ground_truth(image))
    limited = DEAL(prior=model.prior, pretrained=None, max_iter=max_iter, rtol=1e-9)
    limited.warn = False

    def step() -> None:
        limited.zero_grad()
        limited(y, sigma=25 / 255).square().sum().backward()

    benchmark.pedantic(step, rounds=1)
