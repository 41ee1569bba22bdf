"""Small problems with every likelihood."""

import deepinv as dinv
import torch
from deepinv.optim import L1, L2, LogPoissonLikelihood, PoissonLikelihood
from problems import DOUBLE, generator, images

from deepinv_deal.optim import SmoothedL1, WeightedL2

SHAPE = (1, 8, 7)


def blur(noise=None):
    kernel = torch.tensor([[1.0, 2, 1], [2, 9, 2], [1, 2, 3]], dtype=DOUBLE)[None, None]
    physics = dinv.physics.Blur(kernel / kernel.sum(), padding="circular")
    if noise is not None:
        physics.set_noise_model(noise)
    return physics


def truth(batch=1):
    return images(batch, *SHAPE, seed=2)


def poisson(gain=0.05, **settings):
    return dinv.physics.PoissonNoise(gain, rng=generator(3), **settings)


def transmission():
    return dinv.physics.LogPoissonNoise(300.0, 0.8, rng=generator(3))


def weights(batch=1):
    return 0.2 + 3 * torch.rand(batch, *SHAPE, generator=generator(5), dtype=DOUBLE)


def impulses(u):
    hit = torch.rand(u.shape, generator=generator(6), dtype=DOUBLE) < 0.1
    return torch.where(hit, 1 - u.round(), u + 0.01)


#: Data fidelity and measurements; the weight that gives about as much smoothing.
CASES = {
    "L2": (lambda _: L2(0.5), lambda u: u + 0.02, 4.0),
    "WeightedL2": (lambda n: WeightedL2(weights(n)), lambda u: u + 0.02, 1.0),
    "L1": (lambda _: L1(), impulses, 1.0),
    "SmoothedL1": (lambda _: SmoothedL1(0.03), impulses, 1.0),
    "Poisson": (lambda _: PoissonLikelihood(0.05), lambda u: poisson()(u), 20.0),
    "background": (
        lambda _: PoissonLikelihood(0.05, 2.0),
        lambda u: poisson()(u + 0.1),
        20.0,
    ),
    "raw counts": (
        lambda _: PoissonLikelihood(0.05, denormalize=False),
        lambda u: poisson(normalize=False)(u),
        20.0,
    ),
    "LogPoisson": (
        lambda _: LogPoissonLikelihood(300.0, 0.8),
        lambda u: transmission()(u),
        50.0,
    ),
}
