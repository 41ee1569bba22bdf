"""Small random models and problems for the tests of priors, optimizers and models."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import random
from torch import Tensor

from deepinv_deal import (
    DEAL,
    MMR,
    SAFI,
    AdjointOptions,
    DEALPrior,
    PatchSynthesis,
    PatchSynthesisPrior,
    SmoothPlusSparse,
    SmoothPlusSparsePrior,
    SolverOptions,
)
from deepinv_deal.operators import MultiConv
from deepinv_deal.priors import AttentiveQuadratic, AttentiveQuadraticPrior

DOUBLE = torch.float64

#: Backward pass to rounding error.
TIGHT = AdjointOptions(smoothing=1e-6, rtol=1e-12, max_iter=300)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Images in [0, 1] with a smooth part, an edge and some noise."""
    g = generator(seed)
    batch, channels, height, width = shape
    rows = torch.linspace(0, 1, height, dtype=dtype)[:, None]
    columns = torch.linspace(0, 1, width, dtype=dtype)
    phase = torch.rand(batch, channels, 1, 1, generator=g, dtype=dtype)
    x = 0.5 + 0.3 * torch.sin(4 * (rows + columns + phase))
    x = torch.where(columns > phase, x, 0.8 * x)
    return x + 0.1 * torch.rand(shape, generator=g, dtype=dtype)


def noisy_images(n=2, height=9, width=8, seed=3) -> Tensor:
    """Gray images with noise of 0.1."""
    noise = torch.randn(n, 1, height, width, generator=generator(seed), dtype=DOUBLE)
    return images(n, 1, height, width, seed=seed) + 0.1 * noise


def random_prior(
    in_channels: int = 1,
    num_filters: int = 4,
    *,
    seed: int = 0,
    gain: float = 5.0,
    dtype: torch.dtype = DOUBLE,
    **kwargs,
) -> DEALPrior:
    """
    A prior whose masks fill (0.01, 1) and follow the image, with kappa of 7 to 12.

    As initialised, the masks are about 1 whatever the image: the mask network would go
    untested. With a large ``gain`` they depend on the image so strongly that some
    problems have no stable fixed point.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = DEALPrior(in_channels, num_filters, **kwargs).double()
    g = generator(seed + 1)
    with torch.no_grad():
        for p in prior.parameters():
            noise = torch.randn(p.shape, generator=g, dtype=DOUBLE)
            p.add_(0.05 * p.abs().mean() * noise)
        prior.mask_network.W.weight[-1].mul_(gain)
        prior.mask_network.scaling.coefficients.add_(2.0)
        prior.kappa.coefficients.mul_(0.4)
    return prior.to(dtype)


class OwnPrior(AttentiveQuadraticPrior):
    """Two learned filters; their mask falls with the response."""

    def __init__(self):
        super().__init__(in_channels=1)
        self.W = MultiConv((1, 2), kernel_size=3)
        self.c = torch.nn.Parameter(torch.tensor(0.3))

    def regularizer(self, sigma):
        W, c = self.W.operator(), self.c + sigma[:, None, None, None]
        return AttentiveQuadratic(W, lambda x: 1 / (1 + (W(x) / c).square()))


def random_model(prior: DEALPrior | None = None, **kwargs) -> DEAL:
    """A model with masks in (0.01, 1), accurate to 1e-10 unless told otherwise."""
    settings = {"rtol": 1e-10, "max_iter": 500, "adjoint": TIGHT, **kwargs}
    return DEAL(pretrained=None, prior=prior or random_prior(), **settings)


def relative_error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def dense(operator: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear map on images or volumes of shape ``(C, ...)``."""
    n = math.prod(shape)
    basis = torch.eye(n, dtype=DOUBLE).view(n, *shape)
    return operator(basis).reshape(n, -1).T


def random_l1_prior(kind: type, num_filters: int = 3, seed: int = 0):
    """
    A SAFIPrior or MMRPrior with random weights, in float64.

    Filters are scaled such that responses fill the range of the splines, and masks
    depend on the image.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = kind(num_filters).double()
    g = generator(seed + 1)
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=DOUBLE))
        for spline in prior.splines():
            c = spline.coefficients
            if spline.anchor is None:
                t = torch.linspace(-1, 1, c.shape[1], dtype=DOUBLE)
                a, b = torch.randn(2, len(c), 1, generator=g, dtype=DOUBLE)
                c.copy_(torch.sin(a * t + b))
            else:
                c.copy_(torch.linspace(1, -0.2, c.shape[1], dtype=DOUBLE) ** 3)
                c.add_(0.02 * torch.randn(c.shape, generator=g, dtype=DOUBLE))
        prior.lambda_reg.fill_(0.05)
    return prior


#: Inner solves of SAFI and MMR that leave few outer iterations.
ACCURATE_INNER = SolverOptions(forcing=0.05, inner_max_iter=5000)


def random_l1_model(kind, **kwargs):
    """A SAFI or MMR that smooths visibly, accurate to 1e-8 unless told otherwise."""
    settings = {"rtol": 1e-8, "solver": ACCURATE_INNER, "adjoint": TIGHT}
    prior = random_l1_prior(kind.prior_type)
    with torch.no_grad():
        prior.lambda_reg.fill_(0.2 / float(prior.bind().nu))
    return kind(prior=prior, **{**settings, **kwargs})


def small_model(form, rng, options, **settings):
    """A dictionary model with small random atoms in float64."""
    if form is SmoothPlusSparse:
        penalty = options["penalty"]
        prior = SmoothPlusSparsePrior(penalty, 8, 3, 3, lambda_reg=0.02)
    else:
        settings["mean"] = options["mean"]
        prior = PatchSynthesisPrior(8, 3, lambda_reg=0.02)
    prior = prior.double()
    with torch.no_grad():
        for p in prior.dictionary.parameters():
            p.copy_(random(rng, *p.shape))
    if settings.get("solver") != "two-step":  # which has no tolerance
        settings = {"rtol": 1e-5, **settings}
    return form(prior=prior, **settings)


#: Rough ones, as the models themselves choose.
ROUGH_INNER = SolverOptions(inner_max_iter=5000)


def _fixed_point(form, **fixed):
    fixed = {"rtol": 1e-2, "adjoint": AdjointOptions(), **fixed}
    return lambda **settings: form(**{**fixed, **settings})


def _dictionary(form, options, **fixed):
    return lambda **settings: small_model(
        form, generator(), options, **{**fixed, **settings}
    )


#: One random model of every kind, fast and rough unless told otherwise: functions of
#: the settings. The weakly convex one has gradients near its minimum only.
MODELS = {
    "DEAL": _fixed_point(random_model),
    "SAFI": _fixed_point(partial(random_l1_model, SAFI), solver=ROUGH_INNER),
    "MMR": _fixed_point(partial(random_l1_model, MMR), solver=ROUGH_INNER),
    "CPR": _dictionary(SmoothPlusSparse, {"penalty": "group"}, rtol=1e-3),
    "NCPR": _dictionary(SmoothPlusSparse, {"penalty": "weakly_convex"}, rtol=1e-5),
    "two-step": _dictionary(PatchSynthesis, {"mean": "free"}),
    "PatchSynthesis": _dictionary(
        PatchSynthesis, {"mean": "free"}, solver="fista", rtol=1e-2
    ),
}

#: The names, as parameters of a test. MMR, NCPR and PatchSynthesis run the code of
#: SAFI, CPR and two-step, for longer: `pytest -m slow` takes them too.
EACH_MODEL = [
    pytest.param(n, marks=[pytest.mark.slow] * (n in ("MMR", "NCPR", "PatchSynthesis")))
    for n in MODELS
]
