"""Gradients in all that a call depends on, against finite differences."""

from __future__ import annotations

from dataclasses import replace

import deepinv as dinv
import pytest
import torch
from helpers import gradients_equal_finite_differences, random
from problems import ACCURATE_INNER, MODELS, TIGHT, generator, images
from torch.func import functional_call

from deepinv_deal.solvers import AdjointOptions

SIZE = (4, 5)

#: So accurate that a difference of two losses means something.
ACCURATE = {
    "DEAL": {"rtol": 1e-12, "max_iter": 500, "adjoint": TIGHT},
    "SAFI": {
        "rtol": 1e-10,
        "max_iter": 500,
        "solver": ACCURATE_INNER,
        "adjoint": replace(TIGHT, rtol=1e-9),
    },
    "MMR": {"rtol": 1e-10, "max_iter": 500, "solver": ACCURATE_INNER, "adjoint": TIGHT},
    "CPR": {"rtol": 1e-12, "adjoint": AdjointOptions(True, 1e-11), "solver": "fista"},
    "PatchSynthesis": {"rtol": 1e-12, "adjoint": AdjointOptions(True, 1e-11)},
}


class Mixing(dinv.physics.LinearPhysics):
    """A dense real map: every entry of the matrix is a parameter."""

    def __init__(self, parameter):
        super().__init__()
        self.matrix = torch.eye(20, dtype=torch.float64) + parameter

    def A(self, x, **kwargs):
        return (x.flatten(1) @ self.matrix.T).view_as(x)

    def A_adjoint(self, y, **kwargs):
        return (y.flatten(1) @ self.matrix).view_as(y)


def coils(parameter):
    """Cartesian MRI with two coils, whose sensitivities are the parameter."""
    mask = torch.ones(SIZE, dtype=torch.float64)
    mask[:, 1] = 0
    maps = torch.view_as_complex(parameter.contiguous())
    return dinv.physics.MultiCoilMRI(mask=mask, coil_maps=maps, img_size=SIZE)


def problem(kind):
    if kind == "real":
        return Mixing, 0.1 * random(generator(2), 20, 20), images(1, 1, *SIZE)
    maps = 0.5 + 0.3 * random(generator(2), 1, 2, *SIZE, 2)
    return coils, maps, images(1, 2, *SIZE)


@pytest.mark.parametrize("kind", ["real", "MRI"])
@pytest.mark.parametrize(
    "name",
    [
        "DEAL",
        pytest.param("SAFI", marks=pytest.mark.slow),
        pytest.param("MMR", marks=pytest.mark.slow),
        pytest.param("CPR", marks=pytest.mark.slow),
        pytest.param("PatchSynthesis", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_a_reconstruction_are_finite_differences(name, kind, rng):
    model = MODELS[name](**ACCURATE[name], warn=True)
    physics, parameter, x = problem(kind)
    y = physics(parameter).A(x)
    y = torch.cat([y.real, y.imag], 1) if y.is_complex() else y
    y = y + 0.05 * random(rng, *y.shape)
    arguments = {"lambda_reg": 0.03 if name in ("SAFI", "MMR") else 0.3}
    if name == "DEAL":
        arguments["sigma"] = 0.1
    if name in ("CPR", "PatchSynthesis"):
        arguments = {"lambda_reg": 0.02, "beta": 0.5}
    values = [torch.tensor(v, dtype=torch.float64) for v in arguments.values()]
    weights = {
        k: p for k, p in model.named_parameters() if p.requires_grad and p.numel()
    }
    for unused in (
        "prior.kappa.coefficients",
        "prior.lambda_reg",
        "prior.log_beta",
    ):
        weights.pop(unused, None)
    with torch.no_grad():
        start = model(y, physics(parameter), **arguments)
    target = random(rng, *start.shape)

    def loss(y, parameter, *others):
        given = dict(zip(arguments, others, strict=False))
        new = dict(zip(weights, others[len(arguments) :], strict=True))
        x_hat = functional_call(
            model, new, (y, physics(parameter)), {**given, "init": start}
        )
        return (x_hat * target).sum()

    tensors = [y, parameter, *values, *weights.values()]
    gradients_equal_finite_differences(loss, tensors, rng, rtol=1e-3, h=1e-5)
