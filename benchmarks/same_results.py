"""
What every bundled weights file gives on ten small problems, to compare two versions.

A record holds, for each weights file and problem, the image, iteration counts, whether
it converged, and the gradients of a fixed linear function of the image with respect to
measurements, regularization weight and the first learned tensor of the prior. Recorded
before and after a change that should change nothing, the two must agree: to the last
bit on one machine, and to rounding errors amplified by the iterations on two. float32
is recorded with default tolerances; float64 with a tight one for DEAL, whose results
then depend little on the path of the iteration. The others have low limits of
iterations: what is not solved is compared as it is, and must agree as well. Each record
takes some minutes. The script runs with the version before ``SolverOptions`` too: put
that version on the path.

    python benchmarks/same_results.py record FILE.npz [--dtype float64] [--only NAME]
    python benchmarks/same_results.py compare OLD.npz NEW.npz [--rtol 1e-5] [--counts]

Both print one line per weights and problem. "!" marks what did not converge, "~"
gradients whose linear system was not solved to its tolerance. The exit status is 1 if
a relative difference is above the tolerance, or if results are missing in the new file.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepinv
import numpy as np
import torch
from deepinv.physics import (
    MRI,
    Blur,
    Denoising,
    Downsampling,
    Inpainting,
    MultiCoilMRI,
    StackedLinearPhysics,
)
from deepinv.physics.functional import gaussian_blur
from deepinv.utils import TensorList
from skimage.data import astronaut, camera
from torch import Tensor

# -- the interface of the package: all that a change of it can ask to be changed here --

import deepinv_deal  # isort: skip
from deepinv_deal import DEAL, MMR, SAFI, PatchSynthesis, SmoothPlusSparse  # isort: skip
from deepinv_deal.solvers import AdjointOptions  # isort: skip

#: Two interfaces are known, that with ``SolverOptions`` and the one before.
CURRENT = hasattr(deepinv_deal, "SolverOptions")

if CURRENT:
    from deepinv_deal import SolverOptions
    from deepinv_deal.problems import synthesis
else:
    from deepinv.optim import DEQConfig

    from deepinv_deal.priors import synthesis

# Backward passes of the patches would take minutes: a constant, not an argument, limits
# their conjugate gradients. Where there is none of this name, this is to be changed.
assert synthesis.MAX_CG_ITER == 1000
synthesis.MAX_CG_ITER = 20

#: Names of the weights, and the noise level in gray levels that they serve.
WEIGHTS = {
    "deal_gray": 25,
    "deal_gray_64": 25,
    "deal_color": 25,
    "safi_5": 5,
    "safi_15": 15,
    "safi_25": 25,
    "mmr_5": 5,
    "mmr_15": 15,
    "mmr_25": 25,
    "cpr_5": 5,
    "cpr_25": 25,
    "ncpr_5": 5,
    "ncpr_25": 25,
    "patch_25": 25,
}
MODELS = {"deal": DEAL, "safi": SAFI, "mmr": MMR, "cpr": SmoothPlusSparse}
MODELS |= {"ncpr": SmoothPlusSparse, "patch": PatchSynthesis}


def build_model(name: str, dtype: torch.dtype, complex_mode: str) -> torch.nn.Module:
    """Bundled weights with settings that are all written down here."""
    kind, tight = family(name), dtype == torch.float64
    settings: dict[str, Any] = {"complex_mode": complex_mode, "warn": False}
    if kind in ("deal", "safi", "mmr"):
        settings |= {"rtol": 2e-2, "scale": None}
        eps, (max_iter, inner_max_iter, backward) = 1e-4, (100, 1000, 100)
        if kind == "deal" and tight:
            settings["rtol"] = eps = 1e-5
        if kind != "deal":
            # Too slow to be solved here: few iterations show whether they are the same.
            settings["bounds" if CURRENT else "box"] = (0.0, 1.0)
            max_iter, inner_max_iter, backward = 4, 8, 2
        settings["max_iter"] = max_iter
        if CURRENT:
            settings["solver"] = SolverOptions(
                inner_max_iter=inner_max_iter, forcing=0.5
            )
            settings["adjoint"] = AdjointOptions(rtol=eps, max_iter=backward)
        else:
            settings |= {"inner_max_iter": inner_max_iter, "forcing": 0.5}
            settings["DEQ"] = DEQConfig(
                anderson_acceleration_backward=True,
                eps_backward=eps,
                max_iter_backward=backward,
            )
    else:
        # The model chooses the solver for the problem, and its default tolerance.
        settings |= {"rtol": 1e-6 if tight else None}
        settings |= {"scale": None} if CURRENT else {}
        settings["max_iter"] = 20 if kind == "patch" else 40
        settings["adjoint"] = AdjointOptions(
            jacobian_free=True, rtol=1e-6 if tight else 1e-4
        )
    return MODELS[kind](pretrained=name, **settings).to(dtype)


def run(
    model: torch.nn.Module, y: Any, physics: Any, sigma: Any, lambda_reg: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The image, outer and inner iterations and whether it converged."""
    if CURRENT and isinstance(model, (SAFI, MMR)):
        # Before, they took no notice of it; now they would rescale their weights.
        sigma = model.prior.sigma
    x_hat, info = model(y, physics, sigma, lambda_reg=lambda_reg, return_info=True)
    return x_hat, info.n_iter, info.inner_iter, info.converged


def first_parameter(model: torch.nn.Module) -> Tensor:
    """The atoms, or the filters of the first of several convolutions."""
    if isinstance(model, (SmoothPlusSparse, PatchSynthesis)):
        return model.prior.dictionary.atoms
    return (model.prior if CURRENT else model.prior[0]).W.weight[0]


# -- the problems ----------------------------------------------------------------------

#: Weights of the regularizer: in denoising by noise of 25 gray levels (otherwise in
#: proportion), and in inverse problems.
LAMBDA = {
    "deal": (30.0, 0.5),
    "safi": (0.01, 0.005),
    "mmr": (0.02, 0.01),
    "cpr": (0.002, 0.001),
    "ncpr": (0.0125, 0.002),
    "patch": (0.006, 0.0002),
}

#: Gradients, by the name of the variable.
VARIABLES = ("y", "lambda", "parameter")

#: What must agree; counts are compared too, but may differ.
VALUES = ("image", *(f"gradient_{name}" for name in VARIABLES))
COUNTS = ("n_iter", "inner_iter", "converged")


@dataclass(frozen=True)
class Case:
    """A problem: noise level of the model and weights, ``None`` for the learned one."""

    name: str
    y: Any
    physics: Any
    sigma: Any
    lambda_reg: list[float] | None
    complex_mode: str = "real_imag"


def family(name: str) -> str:
    return name.split("_")[0]


def photographs(size: tuple[int, int], color: bool, dtype: torch.dtype) -> Tensor:
    """Three crops of a photograph, ``(3, C, *size)``."""
    photo = (astronaut() if color else camera()[..., None]) / 255.0
    height, width = size
    corners = ((60, 200), (90, 190), (150, 220))
    crops = [photo[i::2, j::2][:height, :width] for i, j in corners]
    return torch.from_numpy(np.stack(crops)).movedim(-1, 1).to(dtype).contiguous()


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).normal(size=shape)).to(dtype)


def measure(physics: Any, x: Tensor, level: float) -> Any:
    """Measurements with noise of some gray levels."""
    y = physics.A(x)
    parts = list(y) if isinstance(y, TensorList) else [y]
    parts = [
        part + level / 255 * noise(tuple(part.shape), seed, x.dtype)
        for seed, part in enumerate(parts)
    ]
    return TensorList(parts) if isinstance(y, TensorList) else parts[0]


def lines(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Half of the lines of a Fourier transform, those in the middle among them."""
    kept = np.random.RandomState(3).uniform(size=size[1]) < 0.4
    kept[size[1] // 2 - 2 : size[1] // 2 + 3] = True
    return torch.from_numpy(kept).to(dtype).expand(size).contiguous()


def coils(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Sensitivities of two coils, left and right, ``(1, 2, *size)``."""
    rows = torch.linspace(-1, 1, size[0], dtype=torch.float64)[:, None]
    columns = torch.linspace(-1, 1, size[1], dtype=torch.float64)
    left = torch.polar((1.5 + columns).reciprocal(), rows * columns)
    right = torch.polar((1.5 - columns).reciprocal(), 0.5 * rows + 0 * columns)
    maps = torch.stack([left, right])
    maps = maps / maps.abs().square().sum(0).sqrt()
    return maps[None].to(dtype.to_complex())


def cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    """The ten problems of some weights."""
    kind, level, color = family(name), WEIGHTS[name], name == "deal_color"
    denoising, weight = LAMBDA[kind]
    denoising *= level / 25
    small, large = ((18, 18), (22, 20)) if color else ((24, 24), (30, 26))
    sigma = 15 / 255
    x = photographs(small, color, dtype)
    first, second, wide = x[:1], x[1:2], photographs(large, color, dtype)[:1]
    channels = x.shape[1]

    y = first + level / 255 * noise(tuple(first.shape), 0, dtype)
    yield Case("denoising", y, None, level / 255, None)

    levels = level / 255 * torch.tensor([0.6, 1.0, 1.4], dtype=dtype)
    y = x + levels.view(3, 1, 1, 1) * noise(tuple(x.shape), 1, dtype)
    weights = [0.7 * denoising, denoising, 1.3 * denoising]
    yield Case("denoising, batch of 3", y, Denoising(), levels, weights)

    def problem(title: str, physics: Any, x: Tensor, **kwargs: Any) -> Case:
        y = measure(physics, x, 2.55)
        return Case(title, y, physics, sigma, [weight], **kwargs)

    mask = np.random.RandomState(2).uniform(size=(1, *large)) < 0.5
    mask = torch.from_numpy(mask).to(dtype).expand(channels, *large).contiguous()
    yield problem("inpainting", Inpainting(mask.shape, mask=mask), wide)

    kernels = [gaussian_blur(sigma=(s, s)).to(dtype) for s in (1.2, 0.8)]
    circular = Blur(kernels[0], padding="circular")
    yield problem("blur, circular", circular, wide)
    yield problem("blur, valid", Blur(kernels[0], padding="valid"), second)
    decimation = Downsampling(
        (channels, *small), filter=kernels[1], factor=2, padding="circular"
    )
    yield problem("super-resolution x2", decimation, second)

    if color:  # no complex images
        for number, other in enumerate((5, 15, 50)):
            y = first + other / 255 * noise(tuple(first.shape), 4 + number, dtype)
            title = f"denoising, noise of {other}"
            yield Case(title, y, None, other / 255, [denoising * other / 25])
    else:
        pair = torch.cat([first, 0.3 * second], 1)
        single = MRI(mask=lines(small, dtype), img_size=small)
        yield problem("MRI", single, pair)
        multi = MultiCoilMRI(
            mask=lines(small, dtype), coil_maps=coils(small, dtype), img_size=small
        )
        yield problem("MRI, 2 coils", multi, pair)
        pair = torch.cat([first, torch.zeros_like(first)], 1)
        yield problem("MRI, real image", single, pair, complex_mode="real")

    stacked = StackedLinearPhysics([circular, Blur(kernels[1], padding="valid")])
    yield problem("two blurs", stacked, second)


# -- recording -------------------------------------------------------------------------


def solve(name: str, case: Case, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """One entry of a record."""
    model = build_model(name, dtype, case.complex_mode)
    parameter = first_parameter(model)
    y, lambda_reg = case.y, None
    parts = list(y) if isinstance(y, TensorList) else [y]
    parts = [part.detach().clone().requires_grad_() for part in parts]
    y = TensorList(parts) if isinstance(y, TensorList) else parts[0]
    if case.lambda_reg is not None:
        lambda_reg = torch.tensor(case.lambda_reg, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image, *counts = run(model, y, case.physics, case.sigma, lambda_reg)
        (image * noise(tuple(image.shape), 9, dtype)).sum().backward()
    entry = dict(zip(COUNTS, counts, strict=True), image=image)
    entry["gradient_y"] = torch.cat([part.grad.flatten() for part in parts])
    entry["gradient_parameter"] = parameter.grad
    if lambda_reg is not None:
        entry["gradient_lambda"] = lambda_reg.grad
    arrays = {key: value.detach().numpy() for key, value in entry.items()}
    arrays["warnings"] = np.array([str(warning.message) for warning in caught], "U")
    return arrays


def number(values: np.ndarray) -> str:
    return "/".join(str(int(value)) for value in values.ravel())


def record(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, deepinv, np)]
    results = {"about": np.array([args.dtype, *versions])}
    start = time.process_time()
    header = f"{'weights':13s}{'problem':23s}{'outer':>12s}{'inner':>15s}"
    print(f"{header}{'s':>6s}  norm of the gradients in {', '.join(VARIABLES)}")
    for name in args.only or WEIGHTS:
        for case in cases(name, dtype):
            begin = time.process_time()
            entry = solve(name, case, dtype)
            seconds = time.process_time() - begin
            for key, value in entry.items():
                results[f"{name}/{case.name}/{key}"] = value
            norms = [
                np.linalg.norm(entry.get(f"gradient_{v}", np.nan)) for v in VARIABLES
            ]
            marks = "!" * (not entry["converged"].all())
            marks += "~" * (entry["warnings"].size > 0)
            print(
                f"{name:13s}{case.name:23s}{number(entry['n_iter']):>12s}"
                f"{number(entry['inner_iter']):>15s}{seconds:6.1f}  "
                f"{' '.join(f'{norm:8.2e}' for norm in norms)} {marks}",
                flush=True,
            )
    np.savez_compressed(args.file, **results)
    print(f"{time.process_time() - start:.0f} s, written to {args.file}")
    return 0


# -- comparing -------------------------------------------------------------------------


def difference(old: np.ndarray, new: np.ndarray) -> float:
    """Relative to the old values; infinite for other shapes and what is not finite."""
    if old.shape != new.shape:
        return np.inf
    distance, size = np.linalg.norm(new - old), np.linalg.norm(old)
    if not np.isfinite(distance):
        return np.inf
    return float(distance / size) if size else np.inf if distance else 0.0


def compare(args: argparse.Namespace) -> int:
    old, new = np.load(args.old), np.load(args.new)
    print(f"old: {', '.join(old['about'])}\nnew: {', '.join(new['about'])}")
    titles = "".join(f"{key.replace('gradient_', 'd/d '):>13s}" for key in VALUES)
    print(f"{'weights':13s}{'problem':23s}{titles}  counts")
    entries = dict.fromkeys(key.rsplit("/", 1)[0] for key in old if "/" in key)
    if args.only:
        entries = {key: None for key in entries if key.split("/")[0] in args.only}
    failures, largest = 0, dict.fromkeys(VALUES, 0.0)
    for entry in entries:
        cells, failed, changed = [], False, []
        for key in VALUES:
            place = f"{entry}/{key}"
            if place not in old:
                cells.append("-")
            elif place not in new:
                cells.append("missing")
                failed = True
            else:
                error = difference(old[place], new[place])
                cells.append(f"{error:.1e}" if error else "0")
                largest[key] = max(largest[key], error)
                failed |= not error <= args.rtol
        for key in COUNTS:
            place = f"{entry}/{key}"
            if place in new and not np.array_equal(old[place], new[place]):
                changed.append(f"{key} {number(old[place])} -> {number(new[place])}")
        failed |= args.counts and bool(changed)
        failures += failed
        name, problem = entry.split("/")
        print(
            f"{name:13s}{problem:23s}{''.join(f'{cell:>13s}' for cell in cells)}  "
            f"{', '.join(changed) or 'equal'}{'  ABOVE' * failed}"
        )
    cells = [f"{error:.1e}" if error else "0" for error in largest.values()]
    print(f"{'largest':36s}{''.join(f'{cell:>13s}' for cell in cells)}")
    print(f"{failures} of {len(entries)} above {args.rtol:g} or missing")
    return int(failures > 0 or not entries)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("record", help="solve the problems")
    command.set_defaults(run=record)
    command.add_argument("file", help="file to write, .npz")
    command.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    command.add_argument("--only", nargs="+", choices=WEIGHTS, metavar="NAME")
    command.add_argument("--threads", type=int, default=1)
    command = commands.add_parser("compare", help="compare two records")
    command.set_defaults(run=compare)
    command.add_argument("old", help="file of the old version")
    command.add_argument("new", help="file of the new version")
    command.add_argument("--rtol", type=float, default=1e-5)
    command.add_argument("--counts", action="store_true", help="counts must agree too")
    command.add_argument("--only", nargs="+", choices=WEIGHTS, metavar="NAME")
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
