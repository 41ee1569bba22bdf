"""
The first minutes on a GPU: tests, times, and a training, in one command.

Every part is fenced from the failures of the others and has a limit of time. Tables are
printed as they are made, and all results are written to a folder: ``report.txt`` (what
was printed), ``report.json`` (the numbers), and from the training
``best.safetensors``, ``last.safetensors``, ``log.jsonl``, ``curve.png`` and
``state.pt`` (without the pool of patches, so it stays small).

* ``tests``: ``tests/test_devices.py`` on the device.
* ``micro``: times of the operators of DEAL and of other ways to compute its small
  convolutions.
* ``speed``: denoising at the default settings, beside ``deepinv.models.DEAL``.
* ``steps``: steps of the training per second, and where their time goes.
* ``train``: a training with the time that is left.

    python benchmarks/gpu.py --out DIR [--data IMAGES --val IMAGES] [--device cuda]
        [--parts tests,micro,speed,steps,train] [--minutes 9] [--small]
        [--recipe '{"num_filters": 128, "init": "deal_gray_64"}']
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import deepinv_model
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deepinv_deal import DEAL, SolverOptions
from deepinv_deal._atomic import replacing
from deepinv_deal.files import as_float, load_image
from deepinv_deal.operators.multi_conv import BlockConvolution
from deepinv_deal.priors import DEALPrior
from deepinv_deal.problems import operator_term
from deepinv_deal.solvers import conjugate_gradient
from deepinv_deal.training import DEALRecipe, DEALTrainer

REPOSITORY = Path(__file__).resolve().parents[1]

#: Seconds that a part may take, and the share of the whole time if that is less.
LIMITS = {
    "tests": (120, 0.25),
    "micro": (80, 0.18),
    "speed": (70, 0.15),
    "steps": (45, 0.12),
    "train": (math.inf, 1.0),
}

#: Seconds that are kept for writing the last files.
RESERVE = 12

#: Dense operations per second of an H100 or H200, from the data sheet.
PEAK = {"fp32": 67e12, "tf32": 495e12, "bf16": 989e12}

CL = torch.channels_last

#: Files of a training that are copied while it runs.
COPIES = ("best.safetensors", "log.jsonl", "curve.png")


# -- time and fences -------------------------------------------------------------------


class OutOfTime(Exception):
    """A limit of time was reached."""


_deadlines: list[float] = []


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds; limits may be nested."""

    def arm() -> None:
        left = min(_deadlines, default=math.inf) - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3) if left < math.inf else 0)

    def stop(*_: Any) -> None:
        raise OutOfTime

    deadline = time.monotonic() + seconds
    _deadlines.append(deadline)
    signal.signal(signal.SIGALRM, stop)
    arm()
    try:
        yield
    finally:
        _deadlines.remove(deadline)
        arm()


@dataclass
class Kit:
    """Options, and what is known so far."""

    device: torch.device
    out: Path
    scratch: Path
    data: Path | None
    val: Path | None
    recipe: dict[str, Any]
    small: bool
    deadline: float
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until everything must be done."""
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line, and appends it to the report."""
        print(text, flush=True)
        with open(self.out / "report.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def note(self, part: str, **values: Any) -> None:
        """Adds a row to a part of the report, and prints it."""
        rows = self.report.setdefault(part, [])
        rows.append(values)
        shown = "  ".join(f"{k} {_short(v)}" for k, v in values.items())
        self.say(f"  {shown}")

    def write(self) -> None:
        """Writes the numbers, atomically."""
        with replacing(self.out / "report.json") as temporary:
            Path(temporary).write_text(json.dumps(self.report, indent=1))

    @contextlib.contextmanager
    def fence(self, part: str, what: str, seconds: float = math.inf) -> Iterator[None]:
        """Reports what goes wrong in the block, instead of raising it."""
        try:
            with limited(seconds) if seconds < math.inf else contextlib.nullcontext():
                yield
        except OutOfTime:
            if _deadlines and time.monotonic() > min(_deadlines):
                raise  # the limit was that of the whole part
            self.note(part, name=what, error=f"stopped after {seconds:.0f} s")
        except Exception as error:
            self.note(part, name=what, error=f"{type(error).__name__}: {error}"[:300])
            with open(self.out / "report.txt", "a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
            self.check()

    def check(self) -> None:
        """Raises if the device answers no more."""
        synchronize(self.device)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    function: Callable[[], Any], device: torch.device, budget: float = 0.1
) -> float:
    """The median time of one call, after warming up."""
    for _ in range(2):
        function()
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    once = time.perf_counter() - start
    number = int(min(30, max(3, budget / max(once, 1e-6))))
    number = number if device.type == "cuda" else min(number, 5)
    times = []
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(number + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        synchronize(device)
        times = [
            a.elapsed_time(b) for a, b in zip(events[:-1], events[1:], strict=True)
        ]
    else:
        for _ in range(number):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Convolutions and products of matrices in 32 bits, or in TF32."""
    tf32 = name == "tf32"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=tf32
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# -- tests -----------------------------------------------------------------------------


def part_tests(kit: Kit) -> None:
    """Runs the tests of devices on this one."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if kit.device.type != "cpu":
        environment["DEEPINV_DEAL_DEVICE"] = str(kit.device)
    seconds = min(LIMITS["tests"][0], kit.left - RESERVE)
    command = [sys.executable, "-m", "pytest", "-q", "--durations=8"]
    command += ["-p", "no:cacheprovider", "tests/test_devices.py"]
    log = kit.scratch / "tests.txt"
    start = time.monotonic()
    with open(log, "w") as file:
        try:
            code: Any = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
    text = log.read_text(errors="replace")
    kit.say(text[-8000:])
    kit.note("tests", code=code, seconds=time.monotonic() - start)


# -- single operations -----------------------------------------------------------------


class Blocks(BlockConvolution):
    """The convolution in blocks of the package, also for images that are not."""

    def __init__(self, kernel: Tensor, s: int):
        super().__init__(kernel, s)
        self.s = s

    def kept(self, x: Tensor) -> Tensor:
        """Convolves an image that is in blocks."""
        return super().__call__(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Convolves an image."""
        return F.pixel_shuffle(self.kept(F.pixel_unshuffle(x, self.s)), self.s)


class Strided:
    """The same by a larger kernel and a stride, as Convolution does on the CPU."""

    def __init__(self, kernel: Tensor, s: int):
        c_out, c_in, k, _ = kernel.shape
        shifted = [
            F.pad(kernel, (j, s - 1 - j, i, s - 1 - i))
            for i in range(s)
            for j in range(s)
        ]
        n = k + s - 1
        kernel = torch.stack(shifted, 1).reshape(s * s * c_out, c_in, n, n)
        self.kernel = kernel.clone(memory_format=torch.channels_last)
        self.s, self.pad = s, k // 2

    def __call__(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv2d(x, self.kernel, None, self.s, self.pad), self.s)


class Plain:
    """One call of conv2d."""

    def __init__(self, kernel: Tensor, memory_format: torch.memory_format):
        self.kernel = kernel.clone(memory_format=memory_format)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=self.kernel.shape[-1] // 2)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "contiguous": lambda k: Plain(k, torch.contiguous_format),
    "channels_last": lambda k: Plain(k, torch.channels_last),
    "stride 2": lambda k: Strided(k, 2),
    "stride 4": lambda k: Strided(k, 4),
    "blocks 2": lambda k: Blocks(k, 2),
    "blocks 4": lambda k: Blocks(k, 4),
    "blocks 4, kept": lambda k: Blocks(k, 4),
}


def layer_times(
    kit: Kit, kernel: Tensor, form: str, dtype: torch.dtype, size: tuple[int, int]
) -> dict[str, float]:
    """Milliseconds of one layer in one form, forward, and forward and backward."""
    batch, side = size
    c_out, c_in, k, _ = kernel.shape
    layer = FORMS[form](kernel.to(dtype))
    layer.kernel.requires_grad_()
    apply, inside = layer, form.endswith("kept")
    x = torch.rand(batch, c_in, side, side, device=kit.device, dtype=dtype)
    if inside:
        x, apply = F.pixel_unshuffle(x, 4), layer.kept
    # In the model the features have the layout that the layer before has chosen.
    if form != "contiguous":
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        forward = milliseconds(lambda: apply(x), kit.device)
    x.requires_grad_()
    ones = torch.ones_like(apply(x).detach())
    both = milliseconds(
        lambda: torch.autograd.grad(apply(x), (x, layer.kernel), ones), kit.device
    )
    flops = 2 * c_out * c_in * k * k * batch * side * side
    return {
        "forward_ms": forward,
        "both_ms": both,
        "tflops": flops / forward / 1e9,
        "tflops_both": 3 * flops / both / 1e9,
    }


def normal_flops(kernels: list[Tensor], pixels: int) -> int:
    """Operations of one application of W^T m^2 W."""
    return 4 * pixels * sum(kernel.numel() for kernel in kernels)


def mask_flops(prior: DEALPrior, pixels: int) -> int:
    """Operations of the mask network."""
    network = prior.mask_network
    weights = [*network.W.weight, *network.V]
    return 2 * pixels * sum(w.numel() for w in weights)


def composed(kernels: list[Tensor], s: int, last: str) -> Callable[..., Tensor]:
    """W^T m^2 W with the first layers, or all, in blocks that are kept."""
    flipped = [k.flip(-2, -1).transpose(0, 1) for k in reversed(kernels)]
    inside = len(kernels) if last == "blocks" else len(kernels) - 1
    first = [Blocks(k, s) for k in kernels[:inside]]
    final = [Blocks(k, s) for k in flipped[len(kernels) - inside :]]
    wide = [] if last == "blocks" else [Plain(kernels[-1], torch.channels_last)]
    narrow = [] if last == "blocks" else [Plain(flipped[0], torch.channels_last)]

    def normal(x: Tensor, squared_mask: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, s)
        for layer in first:
            x = layer.kept(x)
        if wide:
            x = wide[0](F.pixel_shuffle(x, s).contiguous(memory_format=CL))
        x = x * squared_mask
        if narrow:
            x = F.pixel_unshuffle(narrow[0](x), s).contiguous(memory_format=CL)
        for layer in final:
            x = layer.kept(x)
        return F.pixel_shuffle(x, s)

    return normal


def part_micro(kit: Kit) -> None:
    """Times single operations."""
    batch, side, filters = (2, 16, 8) if kit.small else (16, 128, 128)
    device = kit.device
    torch.manual_seed(0)
    prior = DEALPrior(1, filters).to(device)
    x = torch.rand(batch, 1, side, side, device=device)
    pixels = batch * side * side
    sigma = torch.full((batch,), 0.1, device=device)
    with torch.no_grad():
        kernels = [k.detach() for k in prior.W.kernels()]
        regularizer = prior.bind(sigma, x)
        squared = regularizer.squared_mask(x)
        with precision("fp32"):
            reference = regularizer.normal(x, squared)
    flops, flops_mask = normal_flops(kernels, pixels), mask_flops(prior, pixels)
    kit.say(
        f"{batch} x 1 x {side} x {side}, {filters} filters: W^T m^2 W {flops / 1e9:.1f}"
        f" GFLOP, mask {flops_mask / 1e9:.1f} GFLOP"
    )
    kit.note("micro_flops", normal=flops, mask=flops_mask)

    def operator(
        name: str, function: Callable[[], Any], cost: int = flops, check: bool = False
    ) -> None:
        with kit.fence("micro_operators", name, 15), torch.no_grad():
            ms = milliseconds(function, device)
            row = {"name": name, "ms": ms, "tflops": cost / ms / 1e9}
            if check:
                difference = (function().float() - reference).norm()
                row["error"] = float(difference / reference.norm())
            kit.note("micro_operators", **row)

    for benchmark in (False, True):
        torch.backends.cudnn.benchmark = benchmark
        suffix = ", cudnn.benchmark" if benchmark else ""
        for mode in ("tf32", "fp32"):
            with precision(mode), torch.no_grad():
                tag = f"{mode}{suffix}"
                w = regularizer.W(x)
                operator(f"W {tag}", lambda: regularizer.W(x), flops // 2)
                operator(f"W^T {tag}", lambda w=w: regularizer.W.adjoint(w), flops // 2)
                operator(
                    f"W^T m^2 W {tag}",
                    lambda: regularizer.normal(x, squared),
                    check=True,
                )
                operator(
                    f"squared mask {tag}",
                    lambda: regularizer.squared_mask(x),
                    flops_mask,
                )
                del w
        with torch.no_grad():
            half = regularizer.to(torch.bfloat16)
            mask16 = squared.bfloat16()
            operator(
                f"W^T m^2 W bf16{suffix}", partial(half.normal, x, mask16), check=True
            )
    with precision("tf32"), torch.no_grad():

        def plain(memory_format: torch.memory_format) -> Callable[[], Tensor]:
            ours = [Plain(k, memory_format) for k in kernels]
            back = [
                Plain(k.flip(-2, -1).transpose(0, 1), memory_format)
                for k in reversed(kernels)
            ]
            mask = squared.contiguous(memory_format=memory_format)

            def normal() -> Tensor:
                v = x
                for layer in ours:
                    v = layer(v)
                v = v * mask
                for layer in back:
                    v = layer(v)
                return v

            return normal

        for name, memory_format in (
            ("contiguous", torch.contiguous_format),
            ("channels_last", torch.channels_last),
        ):
            operator(f"W^T m^2 W tf32 {name}", plain(memory_format), check=True)
        for s in (2, 4):
            for last in ("plain", "blocks"):
                for dtype, mode in ((torch.float32, "tf32"), (torch.bfloat16, "bf16")):
                    with kit.fence("micro_operators", f"blocks {s}", 15):
                        function = composed([k.to(dtype) for k in kernels], s, last)
                        mask = squared.to(dtype)
                        if last == "blocks":
                            mask = F.pixel_unshuffle(mask, s)
                        mask = mask.contiguous(memory_format=CL)
                        v = x.to(dtype)
                        operator(
                            f"W^T m^2 W {mode} blocks {s}, last layer {last}",
                            partial(function, v, mask),
                            check=True,
                        )
        data = operator_term(x, lambda v: v)
        equation = prior.equation(data, sigma=sigma, lambda_reg=1.0)
        for dtype in (None, torch.bfloat16):
            options = SolverOptions(inner_dtype=dtype)
            system = replace(equation, options=options).freeze(x)
            tag = "tf32" if dtype is None else "bf16"

            def steps(number: int, system: Any = system) -> Any:
                return conjugate_gradient(
                    system.A, x, rtol=0.0, max_iter=number, verify=False
                )

            with kit.fence("micro_operators", f"CG step {tag}", 15):
                few, many = 8, 24
                ms = milliseconds(partial(steps, many), device)
                ms = (ms - milliseconds(partial(steps, few), device)) / (many - few)
                kit.note("micro_operators", name=f"CG step {tag}", ms=ms)
    kit.write()
    kit.say("layers, k = 9: forward, forward and backward")
    layers = [*kernels, *(k.flip(-2, -1).transpose(0, 1) for k in reversed(kernels))]
    for benchmark in (True,) if kit.small else (True, False):
        torch.backends.cudnn.benchmark = benchmark
        for mode, dtype in (
            ("tf32", torch.float32),
            ("bf16", torch.bfloat16),
            ("fp32", torch.float32),
        ):
            for kernel in layers:
                c_out, c_in = kernel.shape[:2]
                for form in FORMS if benchmark else ("contiguous", "channels_last"):
                    if max(c_out, c_in) * 16 > 1024 and form.startswith(
                        ("blocks 4", "stride 4")
                    ):
                        continue  # many channels need no blocks
                    name = f"{c_in}->{c_out} {mode} {form}"
                    with kit.fence("micro_layers", name, 10), precision(mode):
                        row = layer_times(kit, kernel, form, dtype, (batch, side))
                        kit.note("micro_layers", name=name, benchmark=benchmark, **row)
    torch.backends.cudnn.benchmark = False


# -- reconstructions -------------------------------------------------------------------


def test_image(kit: Kit, side: int) -> Tensor:
    """A photograph ``(1, 1, side, side)`` in [0, 1], of the given ones if there are."""
    folder = kit.val or kit.data
    x = None
    for path in sorted(folder.iterdir()) if folder else ():
        with contextlib.suppress(ValueError):
            x = as_float(load_image(path, 1)[None])
            break
    if x is None:
        from skimage.data import camera

        x = torch.from_numpy(camera().copy())[None, None].float() / 255
    while min(x.shape[-2:]) < side:
        x = torch.cat([x, x.flip(-1)], -1)
        x = torch.cat([x, x.flip(-2)], -2)
    return x[..., :side, :side].contiguous()


def seconds_of(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of the second of two calls, or of the first if it was slow."""
    seconds = math.inf
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        result = function()
        synchronize(device)
        seconds = time.perf_counter() - start
        if seconds > 8:
            break
    return seconds, result


def psnr(x: Tensor, reference: Tensor) -> float:
    mse = (x.cpu().clamp(0, 1) - reference).square().mean()
    return float(-10 * mse.log10())


def part_speed(kit: Kit) -> None:
    """Times denoising at the default settings."""
    sizes = (
        ((16, 1), (16, 2)) if kit.small else ((256, 1), (256, 16), (512, 1), (512, 16))
    )
    sigma = 25 / 255
    model = DEAL(pretrained="deal_gray_64", warn=False, device=kit.device)
    half = DEAL(
        prior=model.prior, solver=SolverOptions(inner_dtype=torch.bfloat16), warn=False
    )
    other = None
    with kit.fence("speed", "deepinv.models.DEAL", 20):
        other = deepinv_model(model.prior)
        other.sigma_denoiser, other.lambda_reg = sigma, 1.0
    rng = torch.Generator().manual_seed(0)

    def run(name: str, solve: Callable[[], Any], limit: float, x: Tensor) -> None:
        label = f"{name} {x.shape[-1]} px, batch {len(x)}"
        device = kit.device if not name.startswith("CPU") else torch.device("cpu")
        with kit.fence("speed", label, limit), torch.no_grad():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds, result = seconds_of(solve, device)
            row: dict[str, Any] = {"name": label, "seconds": seconds}
            image = result
            if isinstance(result, tuple):
                image, info = result
                row["outer"] = float(info.n_iter.double().mean())
                row["inner"] = float(info.inner_iter.double().mean())
                row["converged"] = float(info.converged.double().mean())
            row["psnr"] = psnr(image, x)
            if device.type == "cuda":
                row["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            kit.note("speed", **row)

    for side, batch in sizes:
        x = test_image(kit, side).repeat(batch, 1, 1, 1)
        y = x + sigma * torch.randn(x.shape, generator=rng, device="cpu")
        there = y.to(kit.device)
        ours = partial(model, there, sigma=sigma, return_info=True)
        for mode in ("tf32", "fp32"):
            with precision(mode):
                run(mode, ours, 15, x)
        with precision("tf32"):
            run(
                "inner bf16",
                partial(half, there, sigma=sigma, return_info=True),
                15,
                x,
            )
        if batch == 1 and other is not None:
            with precision("fp32"):
                run("deepinv.models.DEAL", partial(other, there, sigma), 20, x)
            if not kit.small:
                with precision("tf32"):
                    run("deepinv.models.DEAL tf32", partial(other, there, sigma), 20, x)
    x = test_image(kit, sizes[0][0])
    y = x + sigma * torch.randn(x.shape, generator=rng, device="cpu")
    cpu = DEAL(pretrained="deal_gray_64", warn=False)
    run(
        f"CPU, {torch.get_num_threads()} threads,",
        partial(cpu, y, sigma=sigma, return_info=True),
        20,
        x,
    )


# -- training --------------------------------------------------------------------------


class KitTrainer(DEALTrainer):
    """Trains in a scratch folder, and copies small files to the results."""

    results: Path
    copy_every = 60.0

    @property
    def checkpoint_interval(self) -> float:
        """Never: the pool is large, and there is no time to go on from it."""
        return math.inf

    def save(self) -> None:
        """Writes the state without the pool, whose patches are then drawn anew."""
        pool, self.pool = self.pool, {}
        try:
            super().save()
        finally:
            self.pool = pool

    def train_step(self) -> float:
        """Takes a step, and copies files from time to time."""
        now = time.monotonic()
        if now - getattr(self, "copied", -math.inf) > self.copy_every:
            self.copied = now
            copy_results(self.out, self.results)
        return super().train_step()


def copy_results(source: Path, target: Path, names: tuple[str, ...] = COPIES) -> None:
    """Copies what is there, each file atomically."""
    for name in names:
        if (source / name).is_file():
            with replacing(target / name) as temporary:
                shutil.copyfile(source / name, temporary)


def made_up_images(folder: Path, number: int, side: int) -> Path:
    """Writes images of random rectangles, for want of photographs."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        n = -(-side // 8)
        image = np.kron(rng.integers(0, 255, (n, n)), np.ones((8, 8)))
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def recipe_of(kit: Kit, **settings: Any) -> DEALRecipe:
    """The settings of the training, with the given defaults."""
    small: dict[str, Any] = {"batch_size": 16, "patch_size": 128, "num_filters": 128}
    if kit.small:
        small = {"batch_size": 2, "patch_size": 16, "num_filters": 4, "val_size": 16}
    chosen = {**small, "device": str(kit.device), **settings}
    if kit.val is not None:
        chosen["val"] = str(kit.val)
    return DEALRecipe(**{**chosen, **kit.recipe})


def part_steps(kit: Kit) -> None:
    """Times the steps of a training."""
    device = kit.device
    warm, counted = (2, 4) if kit.small else (30, 64)
    data = kit.data or made_up_images(kit.scratch / "made_up", 3, 160)
    settings = {"pool": 2 if kit.small else 16, "steps": 10**6, "reuse": 8}
    kit_recipe = {
        k: v
        for k, v in kit.recipe.items()
        if k not in ("pool", "steps", "time_budget", "data", "out")
    }
    before, kit.recipe = kit.recipe, kit_recipe
    try:
        recipe = recipe_of(
            kit, data=str(data), out=str(kit.scratch / "steps"), **settings
        )
    finally:
        kit.recipe = before
    trainer = DEALTrainer(recipe, resume=False)
    start = time.perf_counter()
    for i in range(3):
        trainer.sampler.batch(10**6 + i, recipe.batch_size)
    sampling = 1e3 * (time.perf_counter() - start) / 3

    def take(number: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(number):
            trainer.train_step()
            trainer.step += 1
        synchronize(device)
        return (time.perf_counter() - start) / number

    for benchmark in (False, True):
        torch.backends.cudnn.benchmark = benchmark
        with kit.fence("steps", f"cudnn.benchmark {benchmark}", kit.left / 3):
            take(warm)
            seconds = take(counted)
            kit.note(
                "steps",
                name=f"benchmark {benchmark}",
                steps_per_second=1 / seconds,
                ms=1e3 * seconds,
                sampler_ms=sampling,
            )
    # Where the time goes: every part waits for the device, which slows it a little.
    times: dict[str, list[float]] = {}
    loss = trainer._averaged_loss
    kind = ["new"]

    def timed(problems: Any, start: Any) -> Any:
        kind[0] = "new" if start is None else "reused"
        synchronize(device)
        begin = time.perf_counter()
        result = loss(problems, start)
        synchronize(device)
        spent = 1e3 * (time.perf_counter() - begin)
        times.setdefault(f"{kind[0]}, loss", []).append(spent)
        return result

    trainer._averaged_loss = timed
    for _ in range(counted):
        begin = 1e3 * time.perf_counter()
        trainer.train_step()
        synchronize(device)
        spent = 1e3 * time.perf_counter() - begin
        rest = spent - times[f"{kind[0]}, loss"][-1]
        times.setdefault(f"{kind[0]}, whole step", []).append(spent)
        times.setdefault(f"{kind[0]}, backward and optimizer", []).append(rest)
        trainer.step += 1
    for name, values in sorted(times.items()):
        kit.note("steps", name=name, ms=statistics.median(values), number=len(values))
    trainer._averaged_loss = loss
    with FlopCounterMode(display=False) as counter:
        take(recipe.reuse)
    flops = counter.get_total_flops() / recipe.reuse
    kit.note(
        "steps",
        name="operations",
        gflop_per_step=flops / 1e9,
        **{f"bound_ms_{mode}": 1e3 * flops / peak for mode, peak in PEAK.items()},
    )
    if device.type == "cuda":
        with kit.fence("steps", "profile", 25):
            profile_steps(kit, take)


def profile_steps(kit: Kit, take: Callable[[int], float]) -> None:
    """Lists the kernels that take most of the time of the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        take(8)
    events = [
        e
        for e in profiled.key_averages()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    kit.note(
        "steps", name="busy", ms=total / 8e3, launches=sum(e.count for e in events) / 8
    )
    for e in events[:15]:
        share = e.self_device_time_total / total
        kit.note("kernels", share=share, number=e.count / 8, name=e.key[:90])


def part_train(kit: Kit) -> None:
    """Trains with the time that is left."""
    if kit.data is None:
        kit.say("  no --data, no training")
        return
    out = kit.scratch / "train"
    # Reading the images and the last files take time beside the training.
    budget = kit.recipe.get("time_budget", kit.left - RESERVE)
    settings: dict[str, Any] = {"val_every": 800, "pool": 128}
    if kit.small:
        settings |= {"steps": 4, "val_every": 2, "val_images": 1, "pool": 2}
    started = time.monotonic()
    recipe = recipe_of(
        kit, data=str(kit.data), out=str(out), time_budget=budget, **settings
    )
    trainer = KitTrainer(recipe, resume=False)
    trainer.results = kit.out
    left = budget - (time.monotonic() - started)
    if "time_budget" not in kit.recipe:
        trainer.recipe.time_budget = max(left, 1.0)
    torch.backends.cudnn.benchmark = False
    error = None
    try:
        best = trainer.train()
        kit.note("train", best=best, steps=trainer.step, seconds=trainer.elapsed)
    except BaseException as caught:
        error = caught
        with contextlib.suppress(Exception):
            trainer.save()
            trainer.save_prior(out / "last.safetensors", {})
    copy_results(out, kit.out, (*COPIES, "last.safetensors", "state.pt"))
    if error is not None:
        kit.note(
            "train", best=trainer.best, steps=trainer.step, error=repr(error)[:300]
        )
        raise error


PARTS: dict[str, Callable[[Kit], None]] = {
    "tests": part_tests,
    "micro": part_micro,
    "speed": part_speed,
    "steps": part_steps,
    "train": part_train,
}


# -- the command -----------------------------------------------------------------------


def describe(kit: Kit) -> None:
    """Reports the machine."""
    row: dict[str, Any] = {"torch": torch.__version__, "device": str(kit.device)}
    if kit.device.type == "cuda":
        row["gpu"] = torch.cuda.get_device_name(kit.device)
        row["cuda"], row["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    row["threads"] = torch.get_num_threads()
    kit.note("machine", **row)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--data", type=Path)
    command.add_argument("--val", type=Path)
    command.add_argument("--device", default="cuda")
    command.add_argument("--parts", default=",".join(PARTS))
    command.add_argument("--minutes", type=float, default=9.0)
    command.add_argument("--small", action="store_true")
    command.add_argument("--recipe", type=json.loads, default={})
    command.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    return command


def main() -> None:
    start = time.monotonic()
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in args.parts.split(",") if part]
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise SystemExit(f"--parts: {unknown[0]!r} is none of {', '.join(PARTS)}")
    kit = Kit(
        torch.device(args.device),
        args.out.resolve(),
        Path(tempfile.mkdtemp(prefix="deepinv_deal_")),
        args.data and args.data.resolve(),
        args.val and args.val.resolve(),
        args.recipe,
        args.small,
        start + 60 * args.minutes,
    )
    if args.again:
        with contextlib.suppress(OSError, ValueError):
            kit.report = json.loads((kit.out / "report.json").read_text())
    warnings.simplefilter("ignore")
    describe(kit)
    failed = False
    for i, part in enumerate(parts):
        seconds, share = LIMITS[part]
        seconds = min(seconds, share * 60 * args.minutes, kit.left - RESERVE / 3)
        kit.say(f"== {part}: {kit.left:.0f} s are left, at most {seconds:.0f} s for it")
        begin = time.monotonic()
        try:
            with limited(max(seconds, 1.0)):
                PARTS[part](kit)
        except OutOfTime:
            kit.say(f"  {part} was stopped after {seconds:.0f} s")
        except BaseException as error:
            failed = True
            kit.say(f"  {part} failed:\n{traceback.format_exc()}")
            kit.report.setdefault("failures", []).append(f"{part}: {error!r}"[:300])
            if isinstance(error, KeyboardInterrupt | SystemExit):
                break
        kit.report.setdefault("seconds", {})[part] = time.monotonic() - begin
        kit.write()
        if kit.device.type == "cuda":
            try:
                torch.cuda.synchronize(kit.device)
                torch.cuda.empty_cache()
            except Exception:
                # After such an error a process can do nothing more with the GPU.
                kit.say("  the device failed: the other parts run in a new process")
                rest = ",".join(parts[i + 1 :])
                options = ["--parts", rest, "--minutes", str(kit.left / 60), "--again"]
                os.execv(sys.executable, [sys.executable, *sys.argv, *options])
    shutil.rmtree(kit.scratch, ignore_errors=True)
    kit.say(f"== done, {kit.left:.0f} s were left")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
