"""Reconstruction problems small enough for dense linear algebra."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import deepinv as dinv
import torch
from deepinv.optim import PoissonLikelihood
from problems import DOUBLE, dense, generator, images, random_model, random_prior
from torch import Tensor

from deepinv_deal.interpret import Linearization, linearize

SIZE = 12
SHAPE = (1, SIZE, SIZE)


def physics_of(name: str) -> Any:
    if name == "denoising":
        return None
    if name == "inpainting":
        mask = torch.rand(1, *SHAPE, generator=generator(5), dtype=DOUBLE)
        mask = 0.4 + 0.6 * mask.round()
        return dinv.physics.Inpainting(SHAPE, mask=mask)
    kernel = torch.tensor([[1.0, 2, 1], [2, 9, 2], [1, 2, 3]], dtype=DOUBLE)
    kernel = (kernel / kernel.sum())[None, None]
    return dinv.physics.BlurFFT(SHAPE, filter=kernel)


@dataclass
class DenseProblem:
    """A linearised problem, and its matrices by other means, made when asked for."""

    at: Linearization
    model: Any
    physics: Any
    y: Tensor
    settings: dict[str, Any]

    @property
    def equation(self) -> Any:
        return self.at.problem.equation

    @cached_property
    def B(self) -> Tensor:
        squared = self.equation.mask(self.at.x).square()
        G = self.equation.force
        return self.H + dense(lambda v: G(v, squared), SHAPE).detach()

    @cached_property
    def H(self) -> Tensor:
        data = self.equation.data
        curvature = data.normal if data.quadratic else data.frozen(self.at.x)
        return dense(curvature, SHAPE).detach()

    @cached_property
    def F(self) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(self.equation, self.at.x)
        return jacobian.detach().reshape(SIZE**2, SIZE**2)

    @cached_property
    def J(self) -> Tensor:
        return torch.eye(SIZE**2, dtype=DOUBLE) + torch.linalg.solve(self.B, self.F)

    @cached_property
    def A(self) -> Tensor:
        if self.physics is None:
            return torch.eye(SIZE**2, dtype=DOUBLE)
        return dense(self.physics.A, SHAPE)

    @cached_property
    def sensitivity(self) -> Tensor:
        return torch.linalg.solve(-self.F, self.A.T)


#: Seed and gain of the weights, and lambda, of problems with a stable fixed point whose
#: largest eigenvalues are no larger than 0.6.
PROBLEMS = {
    "denoising": ("denoising", 3, 7.0, None),
    "denoising, strong mask": ("denoising", 3, 9.0, None),
    "inpainting": ("inpainting", 3, 9.0, 1.0),
    "inpainting, large weight": ("inpainting", 3, 9.0, 3.0),
    "blur": ("blur", 3, 6.0, 0.1),
    "counts": ("blur", 3, 6.0, 40.0),
}


@lru_cache
def small_problem(name: str) -> DenseProblem:
    kind, seed, gain, lambda_reg = PROBLEMS[name]
    fidelity = PoissonLikelihood(0.01, 1.0) if name == "counts" else "auto"
    model = random_model(random_prior(seed=seed, gain=gain), data_fidelity=fidelity)
    x = images(1, *SHAPE, seed=seed)
    physics = physics_of(kind)
    y = x if physics is None else physics.A(x)
    noise = torch.randn(y.shape, generator=generator(seed + 7), dtype=DOUBLE)
    y = y + 0.05 * noise if name != "counts" else 0.01 * (100 * y + 1 + noise).round()
    settings = {"sigma": 0.05, "lambda_reg": lambda_reg}
    at = linearize(
        model, y, physics, rtol=1e-10, max_iter=300, inner_rtol=1e-7, **settings
    )
    return DenseProblem(at, model, physics, y, settings)
