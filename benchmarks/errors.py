"""
What hostile input gives: writes ``docs/user_guide/errors.rst``.

Every line of the page is Python that is run here, and the error that came. A test
compares the page with this script, so that it cannot go stale.

    python benchmarks/errors.py
"""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch
from safetensors.torch import load_file, save_file

from deepinv_deal import DEAL, SAFI, PatchSynthesis, SmoothPlusSparse, SolverOptions
from deepinv_deal.solvers import conjugate_gradient
from deepinv_deal.weights import save
from deepinv_deal.weights.files import read_header

PAGE = Path(__file__).resolve().parent.parent / "docs" / "user_guide" / "errors.rst"

HEAD = """Errors
======

A mistake in the input is an error that names the argument, what arrived and what to
do; no call returns an image made of NaN, of the wrong channels or of the wrong weights.
Each of the lines below was run, with ``model`` a gray DEAL, ``y`` a batch of two gray
images and ``physics`` an inpainting of them (``python benchmarks/errors.py``).

What is not an error:

* A sample that **does not converge** gives one
  :class:`~deepinv_deal.solvers.ConvergenceWarning` and ``info.status``, see
  :doc:`solver`; with ``strict=True`` it raises
  :class:`~deepinv_deal.solvers.ConvergenceError`, in the backward pass too.
* **NaN that appears inside**, from a faulty physics, ends its sample with the status
  ``NON_FINITE`` and a warning. The other samples go on.
* An ``A_adjoint`` that is **slightly wrong**, or an ``A_adjoint_A`` that is not their
  product, is told in ``info.notes``.

After an error the model is as it was.
"""

CASES = {
    "Measurements": (
        "model(y.numpy(), sigma=0.1)",
        "model((255 * y).byte(), sigma=0.1)",
        "model(y.double(), sigma=0.1)",
        "model(y.to('meta'), sigma=0.1)",
        "model(y[:0], sigma=0.1)",
        "model(y[0], sigma=0.1)",
        "model(y.repeat(1, 3, 1, 1), sigma=0.1)",
        "model(y / 0, sigma=0.1)",
        "model(y * torch.nan, physics)",
        "model(y[:, 0], physics)",
        "PatchSynthesis(8, 4)(y[..., :3])",
    ),
    "Physics": (
        "model(y, torch.abs)",
        "model(y, dinv.physics.Haze())",
        "model(y, dinv.physics.LinearPhysics(A=torch.relu, A_adjoint=torch.relu))",
        "model(y, dinv.physics.LinearPhysics(A_adjoint=lambda y: y.flip(-1)))",
    ),
    "Noise level, weight and other arguments": (
        "model(y)",
        "model(y, sigma=-0.25)",
        "model(y, sigma=torch.nan)",
        "model(y, sigma=[0.1, 0.2, 0.3])",
        "model(y, sigma='guess')",
        "model(y, sigma='estimate')",
        "model(y, physics, lambda_reg=-1.0)",
        "model(y, physics, lambda_reg='much')",
        "SAFI(num_filters=4)(y, physics)",
        "SmoothPlusSparse('group', 8, 4, 2)(y, beta=0.0)",
        "model(y, sigma=0.1, lambda_=2.0)",
        "SAFI(num_filters=4)(y, sigma=0.0)",
        "model.examine(y, None)",
        "model(y[:1], model.examine(y, physics))",
        "model(y, physics, init=y[:1])",
        "model(y, physics, init=y * torch.nan)",
        "model(y, physics, init='ones')",
        "model(y, physics, x_gt=y[..., 1:], compute_metrics=True)",
    ),
    "Settings": (
        "DEAL(pretrained=None, rtol=-1.0)",
        "SolverOptions(forcing=1.0)",
        "SolverOptions(inner_max_iter=0)",
        "SolverOptions(preconditioner='jacobi')",
        "SolverOptions(anderson=-1)",
        "DEAL(pretrained=None, solver='newton')(y, sigma=0.1)",
        "SAFI(num_filters=4, solver=SolverOptions(anderson=5))(y)",
        "PatchSynthesis(8, 4, solver='two-step', rtol=1e-3)",
        "SmoothPlusSparse('group', 8, 4, 2, solver='fista', bounds=(0, 1))(y)",
        "DEAL(pretrained=None, scale=0.0)",
        "DEAL(pretrained=None, complex_mode='abs')",
        "DEAL(pretrained=None, adjoint=True)",
        "DEAL(pretrained=None, bounds=(1.0, 0.0))",
        "DEAL(pretrained=None, trainable_params=['lambda_reg'])",
        "DEAL(in_channels=3, pretrained='good.safetensors')",
        "conjugate_gradient(lambda v: v, y, init=y[:1])",
        "conjugate_gradient(lambda v: v, y, rtol=-1.0)",
    ),
    "Weights": (
        "DEAL(pretrained='deal_grey')",
        "DEAL(pretrained='cpr_25')",
        "DEAL(pretrained='missing.safetensors')",
        "DEAL(pretrained='malicious.pth')",
        "DEAL(pretrained='truncated.safetensors')",
        "DEAL(pretrained='other.safetensors')",
        "DEAL(pretrained='key.safetensors')",
        "DEAL(pretrained='shape.safetensors')",
        "DEAL(pretrained='nan.safetensors')",
        "DEAL(pretrained='other.pth')",
        "SAFI(pretrained='other.pth')",
        "PatchSynthesis(pretrained='other.pth')",
    ),
}


NAMES = {
    "torch": torch,
    "dinv": dinv,
    "DEAL": DEAL,
    "SAFI": SAFI,
    "PatchSynthesis": PatchSynthesis,
    "SmoothPlusSparse": SmoothPlusSparse,
    "SolverOptions": SolverOptions,
    "conjugate_gradient": conjugate_gradient,
}


class Malicious:
    """Would write a file when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("was_here", "w"))


def write_files(model: DEAL) -> None:
    """Writes weights files, damaged in every way, to the working directory."""
    save(model.prior, "good.safetensors")
    content = Path("good.safetensors").read_bytes()
    Path("truncated.safetensors").write_bytes(content[:-100])
    save_file({"weight": torch.ones(2)}, "other.safetensors")
    torch.save({"state_dict": {"weight": torch.ones(2)}}, "other.pth")
    with open("malicious.pth", "wb") as file:
        pickle.dump({"state_dict": Malicious()}, file)
    header = read_header(Path("good.safetensors"))
    for name, change in {
        "key": lambda state: state.pop("kappa.coefficients"),
        "shape": lambda state: state.update({"mask_network.V.0": torch.ones(4, 3)}),
        "nan": lambda state: state["W.weight.1"].fill_(torch.nan),
    }.items():
        state = load_file("good.safetensors")
        change(state)
        save_file(state, f"{name}.safetensors", header)


@contextmanager
def namespace() -> Iterator[dict[str, Any]]:
    """What the lines of the page may use, in a folder of their own."""
    before = Path.cwd()
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        os.chdir(folder)
        try:
            model = DEAL(pretrained=None, num_filters=4)
            write_files(model)
            y = torch.rand(2, 1, 8, 9)
            physics = dinv.physics.Inpainting((1, 8, 9), mask=torch.ones(1, 8, 9))
            yield {**NAMES, "model": model, "y": y, "physics": physics}
            if Path("was_here").exists():
                raise AssertionError("A malicious file was executed.")
        finally:
            os.chdir(before)


def error_of(line: str, names: dict[str, Any]) -> str:
    """The error of a line of Python, on one line."""
    try:
        eval(line, names)
    except (TypeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        # What other libraries say changes with their versions.
        text = re.sub(r": (Weights only|Error while).*", ": ...", text)
        return f"{type(error).__name__}: {text}"
    raise AssertionError(f"No error: {line}")


def page() -> str:
    """The text of the page."""
    parts = [HEAD]
    with namespace() as names:
        for title, lines in CASES.items():
            parts.append(f"\n{title}\n{'-' * len(title)}\n\n.. list-table::\n")
            parts.append("   :header-rows: 1\n   :widths: 40 60\n\n")
            parts.append("   * - input\n     - error\n")
            for line in lines:
                parts.append(f"   * - ``{line}``\n     - ``{error_of(line, names)}``\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"Wrote {PAGE}.")
