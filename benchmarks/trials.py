"""
How often a physics is applied before the first iteration, and in later calls.

A model tries a physics out: whether its adjoint is one, and what it resembles, for
the preconditioner. What was learnt is kept by ``known = model.examine(y, physics)``
and used again by ``model(y, known)``.

    python benchmarks/trials.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from deepinv.physics import MRI, Blur, Inpainting, LinearPhysics
from deepinv.physics.functional import gaussian_blur

from deepinv_deal import DEAL, MMR, SmoothPlusSparse

SIZE = (40, 44)


def tasks() -> dict[str, LinearPhysics]:
    """Physics that are a convolution, diagonal, or neither."""
    rng = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, *SIZE, generator=rng) < 0.5).float()
    kernel = gaussian_blur(sigma=(1.6, 1.6))
    return {
        "inpainting": Inpainting((1, *SIZE), mask=mask),
        "circular blur": Blur(kernel, padding="circular"),
        "valid blur": Blur(kernel, padding="valid"),
        "MRI": MRI(mask=mask.expand(2, -1, -1), img_size=SIZE),
    }


def counted(physics: LinearPhysics) -> list[int]:
    """Makes a physics count its applications, the adjoint's included, in ``[0]``."""
    calls = [0]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return function(*args, **kwargs)

        return call

    for name in ("A", "A_adjoint"):
        setattr(physics, name, watched(getattr(physics, name)))
    return calls


def before_first_iteration(model: Any, y: Any, physics: Any, calls: list[int]) -> int:
    """Applications of A and its adjoint until the first iterate is known."""
    calls[0] = 0
    problem = model.pose(y, physics, lambda_reg=0.05)
    equation = problem.equation
    for name in ("preconditioning", "circulant"):  # made when the first solve begins
        getattr(equation, name, None)
    if isinstance(model, SmoothPlusSparse):
        _ = equation.problem.data_spectrum, equation.data.norm_bound
    return calls[0]


def rows() -> list[tuple[str, str, int, int]]:
    """Model, task, applications in a first call and in one with a known physics."""
    found = []
    models = [DEAL(), MMR(pretrained="mmr_25"), SmoothPlusSparse(pretrained="cpr_25")]
    for model in models:
        for name, physics in tasks().items():
            channels = 2 if name == "MRI" else 1
            y = physics(torch.rand(1, channels, *SIZE))
            calls = counted(physics)
            with torch.no_grad():
                first = before_first_iteration(model, y, physics, calls)
                known = model.examine(y, physics)
                before_first_iteration(model, y, known, calls)
                again = before_first_iteration(model, y, known, calls)
            found.append((type(model).__name__, name, first, again))
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0]).parse_args()
    print(f"{'model':<18}{'physics':<16}{'first call':>12}{'known':>8}")
    for model, task, first, again in rows():
        print(f"{model:<18}{task:<16}{first:>12}{again:>8}")


if __name__ == "__main__":
    main()
