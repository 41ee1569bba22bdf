"""
Everything gives on an accelerator what it gives on the CPU.

The device is that of the environment variable ``DEEPINV_DEAL_DEVICE``, else the CUDA
device that torch finds, else one that only pretends, see ``pretend_accelerator.py``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import threading
from functools import cache

import deepinv as dinv
import numpy as np
import pretend_accelerator
import pytest
import torch
from deepinv.physics.functional.blur import gaussian_blur
from PIL import Image
from problems import DOUBLE, MODELS, generator, images, random_prior, relative_error
from torch import Tensor
from trainers import KINDS, take, weights_after

from deepinv_deal import (
    DEAL,
    MMR,
    SAFI,
    AdjointOptions,
    PatchSynthesis,
    SmoothPlusSparse,
    SolverOptions,
    tune,
)
from deepinv_deal.solvers import conjugate_gradient
from deepinv_deal.solvers.precision import (
    rough_solvers,
    solver_precision,
    tf32_convolutions,
)
from deepinv_deal.training.data import DenoisingSampler, Prefetched

FOUND = "cuda" if torch.cuda.is_available() else ""
NAME = os.environ.get("DEEPINV_DEAL_DEVICE", FOUND)
REAL = bool(NAME)

pytestmark = pytest.mark.skipif(
    not REAL and not pretend_accelerator.AVAILABLE,
    reason="no accelerator, and torch before 2.9 has no devices in Python",
)

SIZE = (16, 17)

#: Largest relative difference from the CPU in double precision.
TOLERANCE = {DOUBLE: 1e-5, torch.float32: 1e-3}
GRADIENT_TOLERANCE = {DOUBLE: 1e-4, torch.float32: 2e-2}

DTYPES = [DOUBLE, torch.float32] if REAL else [DOUBLE]


@pytest.fixture(scope="module")
def device():
    return torch.device(NAME) if REAL else pretend_accelerator.register()


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32, whose rounding is a thousand times that of 32 bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def fourier_mask(dtype) -> Tensor:
    mask = torch.rand(1, 1, 1, SIZE[1], generator=generator(3)) < 0.5
    mask[..., 7:10] = True
    return mask.to(dtype).expand(1, 2, *SIZE).contiguous()


def multi_coil(dtype) -> dinv.physics.LinearPhysics:
    parts = torch.randn(2, 1, 3, *SIZE, generator=generator(4), dtype=DOUBLE).to(dtype)
    maps = torch.complex(*parts)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    mask = fourier_mask(dtype)
    return dinv.physics.MultiCoilMRI(mask, coil_maps=maps, img_size=SIZE)


def inpainting(dtype) -> dinv.physics.LinearPhysics:
    mask = (images(1, 1, *SIZE, seed=5)[0] > 0.5).to(dtype)
    return dinv.physics.Inpainting((1, *SIZE), mask=mask)


def blur(dtype, padding: str) -> dinv.physics.LinearPhysics:
    kernel = gaussian_blur(sigma=(1.0, 1.0)).to(dtype)
    return dinv.physics.Blur(kernel, padding=padding)


#: Image channels, and the physics as a function of the dtype; nothing for denoising.
TASKS = {
    "denoising": (1, lambda dtype: None),
    "circular blur": (1, lambda dtype: blur(dtype, "circular")),
    "valid blur": (1, lambda dtype: blur(dtype, "valid")),
    "inpainting": (1, inpainting),
    "MRI": (2, lambda dtype: dinv.physics.MRI(fourier_mask(dtype), img_size=SIZE)),
    "multi-coil MRI": (2, multi_coil),
}

#: A few iterations are enough to compare, and rounding cannot change their number.
FEW = {"max_iter": 3, "rtol": 0.0, "solver": SolverOptions(inner_max_iter=8)}
BACKWARD = AdjointOptions(rtol=1e-1, max_iter=2)
SETTINGS = {
    "DEAL": {**FEW, "warn": False, "adjoint": BACKWARD},
    **{
        # Too few inner iterations would make gradients that are not finite.
        name: {
            **FEW,
            "warn": False,
            "solver": SolverOptions(inner_max_iter=100),
            "adjoint": AdjointOptions(jacobian_free=True, rtol=1e-1, max_iter=2),
        }
        for name in ("SAFI", "MMR")
    },
    **{
        name: {"max_iter": 4, "warn": False, "adjoint": BACKWARD}
        for name in ("CPR", "NCPR", "two-step", "PatchSynthesis")
    },
}


def problem(task: str, dtype=DOUBLE):
    """Measurements of two images, and the physics."""
    channels, make = TASKS[task]
    x, physics = images(2, channels, *SIZE).to(dtype), make(dtype)
    y = x if physics is None else physics.A(x)
    noise = torch.randn(y.shape, generator=generator(1), dtype=DOUBLE)
    return y + 0.05 * noise.to(dtype), physics


def answer(name: str, task: str, device, dtype):
    """The image and the gradient in the weights, on the CPU."""
    y, physics = problem(task, dtype)
    model = MODELS[name](**SETTINGS[name]).to(dtype).to(device)
    physics = None if physics is None else physics.to(device)
    settings = {} if physics is None else {"lambda_reg": 0.05}
    if isinstance(model, DEAL):
        settings["sigma"] = 0.1
    x, info = model(y.to(device), physics, return_info=True, **settings)
    assert x.device == info.converged.device == y.to(device).device
    x.square().sum().backward()
    weights = [p for p in model.prior.parameters() if p.grad is not None]
    assert weights
    return x.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in weights])


@cache
def expectation(name: str, task: str):
    return answer(name, task, "cpu", DOUBLE)


def quick(name: str, task: str) -> bool:
    """Whether it takes no more than some seconds; others with ``-m slow``."""
    if name == "DEAL":
        return REAL or task != "MRI"
    if not REAL:
        return task == "denoising" and name in ("SAFI", "CPR")
    few = ("denoising", "circular blur", "multi-coil MRI")
    return task == "denoising" or name == "CPR" or (name == "SAFI" and task in few)


@pytest.mark.filterwarnings("ignore::deepinv_deal.ConvergenceWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "task"),
    [
        pytest.param(n, t, marks=[pytest.mark.slow] * (not quick(n, t)))
        for n in MODELS
        for t in TASKS
    ],
)
def test_images_and_gradients_are_those_of_the_cpu(device, name, task, dtype):
    x, gradient = answer(name, task, device, dtype)
    expected, expected_gradient = expectation(name, task)
    assert relative_error(x, expected) < TOLERANCE[dtype]
    # The gradients of these have jumps, which rounding in 32 bits finds.
    if dtype == DOUBLE or name not in ("SAFI", "MMR"):
        assert relative_error(gradient, expected_gradient) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        *((name, "denoising") for name in ("DEAL", "SAFI", "CPR")),
        ("DEAL", "inpainting"),
        ("DEAL", "MRI"),
    ],
)
@pytest.mark.filterwarnings("ignore::deepinv_deal.ConvergenceWarning")
def test_double_precision_is_not_needed(device, name, task):
    if REAL:
        pytest.skip("only the device that pretends can do without")
    with pretend_accelerator.without_float64():
        x, gradient = answer(name, task, device, torch.float32)
        with pytest.raises(TypeError, match="no torch.float64"):
            torch.ones(2).to(device).double()
    assert x.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("counts", ["Poisson", "transmission"])
def test_counts_need_no_double_precision(device, counts):
    if REAL:
        pytest.skip("only the device that pretends can do without")
    x, physics = images(1, 1, *SIZE).float(), blur(torch.float32, "circular")
    if counts == "Poisson":
        y = (physics.A(x) * 40).round() / 40
        fit = dinv.optim.PoissonLikelihood(gain=1 / 40)
    else:
        y, fit = physics.A(x), dinv.optim.LogPoissonLikelihood(N0=1e3, mu=1.0)
    with pretend_accelerator.without_float64():
        model = DEAL(data_fidelity=fit, max_iter=3, warn=False).to(device)
        x_hat = model(y.to(device), physics.to(device))
    assert x_hat.isfinite().all()


def test_tuning_needs_no_double_precision(device):
    if REAL:
        pytest.skip("only the device that pretends can do without")
    x = images(1, 1, *SIZE).float()
    y = x + 0.05 * torch.randn(x.shape, generator=generator(1))
    model = MODELS["DEAL"](max_iter=9, rtol=0.5).float().to(device)
    with pretend_accelerator.without_float64():
        result = tune(model, None, [(x.to(device), y.to(device))], sigma=0.05)
    assert result.lambda_reg > 0


@pytest.mark.parametrize("form", [DEAL, SAFI, MMR, SmoothPlusSparse, PatchSynthesis])
def test_a_model_leaves_a_given_prior_where_it_is(device, form):
    size = {"num_filters": 2} if form in (DEAL, SAFI, MMR) else {}
    prior = form(pretrained=None, **size).prior.to(device)
    model = form(prior=prior)
    assert next(prior.parameters()).device.type == device.type
    assert model.prior is prior
    form(prior=prior, device="cpu")
    assert next(prior.parameters()).device.type == "cpu"


def test_inner_solves_in_bfloat16(device):
    y, _ = problem("denoising")
    prior = random_prior(dtype=torch.float32)
    solver = SolverOptions(inner_dtype=torch.bfloat16)
    settings = {"pretrained": None, "solver": solver, "warn": False}
    y = y.float()
    expected = DEAL(prior=copy.deepcopy(prior), **settings)(y, sigma=0.1)
    x = DEAL(prior=prior.to(device), **settings)(y.to(device), sigma=0.1)
    assert relative_error(x.cpu(), expected) < 5e-3


def test_default_devices_do_not_reach_the_random_numbers(device):
    y, physics = problem("inpainting")
    model, expected = (
        MODELS["DEAL"](),
        MODELS["DEAL"]()(y, physics, 0.1, lambda_reg=0.1),
    )
    model, physics, y = model.to(device), physics.to(device), y.to(device)
    context = device if REAL else contextlib.nullcontext()  # the other has no factories
    with context:
        x = model(y, physics, 0.1, lambda_reg=0.1)
    assert relative_error(x.cpu(), expected) < TOLERANCE[DOUBLE]


# -- training --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(3):
        image = np.kron(rng.integers(0, 255, (6, 8)), np.ones((5, 5))).astype(np.uint8)
        Image.fromarray(image).save(path / f"{i}.png")
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[pytest.mark.slow] * (not REAL and k != "deal"))
        for k in KINDS
    ],
)
def test_two_steps_of_a_training_are_those_of_the_cpu(device, folder, tmp_path, kind):
    here = KINDS[kind].start(folder, tmp_path / "cpu")
    there = KINDS[kind].start(folder, tmp_path / "there", device=str(device))
    before = weights_after(here, 0)
    losses = take(here, 2), take(there, 2)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    here, there = weights_after(here, 0), weights_after(there, 0).cpu()
    # Adam divides by the size of the gradient, so rounding counts where that is small.
    assert relative_error(there - before, here - before) < 0.1


def test_a_training_validates_and_resumes(device, folder, tmp_path):
    settings = {"steps": 2, "val_every": 2, "device": str(device)}
    whole = KINDS["deal"].start(folder, tmp_path / "whole", **settings)
    best = whole.train()
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2]
    assert best == pytest.approx(json.loads(log[0])["psnr_mean"], abs=1e-3)
    half = KINDS["deal"].start(folder, tmp_path / "half", **settings)
    take(half, 1)
    half.save()
    rest = KINDS["deal"].start(folder, tmp_path / "half", resume=True, **settings)
    assert rest.step == 1
    rest.train()
    whole, rest = (weights_after(t, 0).cpu() for t in (whole, rest))
    assert relative_error(rest, whole) < 1e-3


def test_a_training_step_reads_one_value_beside_those_of_the_solver(
    device, folder, tmp_path
):
    if REAL:
        pytest.skip("only the device that pretends counts")
    trainer = KINDS["deal"].start(folder, tmp_path, device=str(device), steps=9)
    take(trainer, 3)
    with pretend_accelerator.counting() as counts:
        take(trainer, 1)
    lines = [line for kind, line in counts.where if "engine.py" in line]
    assert len(lines) <= 1, counts.where


def test_batches_drawn_in_the_background_are_those_of_the_sampler(device):
    pictures = [(255 * images(1, 1, 20, 21)[0]).byte()]
    sampler = DenoisingSampler(pictures, 12, 0.2, seed=3)
    batches = Prefetched(sampler, 2, device)
    for index, prepared in ((0, 1), (1, 5), (3, 4), (5, None), (4, None)):
        batch, expected = batches.batch(index), sampler.batch(index, 2)
        for part, wanted in zip(
            vars(batch).values(), vars(expected).values(), strict=True
        ):
            assert torch.equal(part, wanted)
        if prepared is not None:
            batches.prepare(prepared)
    threads = [t for t in threading.enumerate() if t.name.startswith("batches")]
    assert len(threads) >= 1


def test_conjugate_gradients_look_every_eight_iterations(device):
    if REAL:
        pytest.skip("only the device that pretends counts")
    scale = torch.linspace(1, 9, 64, dtype=DOUBLE)[None].to(device)
    b = torch.ones(1, 64, dtype=DOUBLE).to(device)
    with pretend_accelerator.counting() as counts:
        result = conjugate_gradient(lambda v: scale * v, b, rtol=1e-12)
    assert bool(result.converged.all())
    assert counts.waits <= int(result.n_iter) / 8 + 4


def test_steps_of_a_training_may_round_and_validations_may_not():
    """The switches of torch can be read without a GPU."""
    device = torch.device("cuda")

    def allowed() -> bool:
        matrix = torch.backends.cuda.matmul
        if hasattr(matrix, "fp32_precision"):
            return matrix.fp32_precision == "tf32"
        return matrix.allow_tf32

    before = allowed()
    for tf32 in (True, False):
        with rough_solvers(tf32), tf32_convolutions(device, tf32):
            with solver_precision(device):
                assert allowed() == tf32
            assert allowed() == tf32
        with solver_precision(device):
            assert not allowed()
    assert allowed() == before
