"""
What the right likelihood brings, and what it costs.

Photon-limited deblurring, low-dose computed tomography and deblurring with impulses, on
crops of scikit-image's photographs: DEAL with the likelihood of the noise, DEAL with
least squares, total variation with the same likelihood, and what the field takes
otherwise (Richardson-Lucy, filtered back-projection, a median filter). The weights of
all of them, and the number of iterations of Richardson-Lucy, are those with the best
mean PSNR on two other crops.

The gain is the mean difference of PSNR between both DEALs, with its standard error over
the crops. Work is counted until DEAL has converged: applications of the physics or its
adjoint, and of W^T M^2 W.

    python benchmarks/likelihoods.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import deepinv as dinv
import torch
from _common import PHOTOGRAPHS, crop
from deepinv.loss.metric import PSNR, SSIM
from deepinv.models import Reconstructor
from deepinv.optim import L2
from deepinv.physics.functional import gaussian_blur
from scipy.ndimage import median_filter
from torch import Tensor
from trials import counted

from deepinv_deal import DEAL, tune
from deepinv_deal.optim import SmoothedL1
from deepinv_deal.problems.likelihood import Likelihood
from deepinv_deal.problems.noise import likelihood_of as likelihood_of_fidelity
from deepinv_deal.problems.noise import likelihood_of_noise
from deepinv_deal.solvers import soft_threshold

#: Those on which weights are tuned.
TUNING = ("coffee", "moon")

#: Line integrals of the brightest ray, roughly.
ATTENUATION = 4.0

#: Iterations of total variation, and bisections in its proximal map.
TV_ITERATIONS, BISECTIONS = 300, 24

RICHARDSON_LUCY = (2, 4, 8, 15, 30, 60, 120)


class Problem(NamedTuple):
    """A kind of measurement, and what its rivals are."""

    physics: dinv.physics.LinearPhysics
    fidelity: Any
    rival: str
    start: dict[str, float]  # where tuning starts; empty: the noise tells


def problems(size: int) -> dict[str, Problem]:
    def deblurring(noise: Any) -> dinv.physics.LinearPhysics:
        physics = dinv.physics.Blur(gaussian_blur(sigma=(1.2, 1.2)), padding="circular")
        physics.set_noise_model(noise)
        return physics

    def tomography(photons: float) -> dinv.physics.LinearPhysics:
        physics = dinv.physics.Tomography(60, img_width=size, normalize=True)
        rng = torch.Generator().manual_seed(1)
        mu = ATTENUATION / float(physics.A(torch.ones(1, 1, size, size)).max())
        physics.set_noise_model(dinv.physics.LogPoissonNoise(photons, mu, rng=rng))
        return physics

    def photons(peak: float) -> Any:
        rng = torch.Generator().manual_seed(1)
        return dinv.physics.PoissonNoise(1 / peak, rng=rng)

    impulses = dinv.physics.SaltPepperNoise(
        0.05, 0.05, rng=torch.Generator().manual_seed(1)
    )
    return {
        "photons, peak 30": Problem(
            deblurring(photons(30)), "auto", "Richardson-Lucy", {}
        ),
        "photons, peak 5": Problem(
            deblurring(photons(5)), "auto", "Richardson-Lucy", {}
        ),
        "CT, 10,000 photons": Problem(tomography(1e4), "auto", "FBP", {}),
        "CT, 1,000 photons": Problem(tomography(1e3), "auto", "FBP", {}),
        "10 % impulses": Problem(
            deblurring(impulses),
            SmoothedL1(),
            "median",
            {"lambda_reg": 10.0, "sigma": 15 / 255},
        ),
    }


# -- rivals ----------------------------------------------------------------------


class TotalVariation(Reconstructor):
    r"""
    Total variation with any likelihood, :math:`\phi(A x; y) + \lambda \|\nabla x\|_1`,
    by the primal-dual method of Chambolle and Pock.
    """

    def __init__(self, likelihood: Callable[[Any, Tensor], Likelihood]):
        super().__init__()
        self.likelihood = likelihood

    def forward(self, y: Tensor, physics: Any, lambda_reg: float = 1.0) -> Tensor:
        likelihood = self.likelihood(physics, y)
        D, norm = dinv.optim.TVPrior().nabla, 8**0.5 + 1
        Dt = dinv.optim.TVPrior().nabla_adjoint
        x = physics.A_adjoint(likelihood.linear(y)).clamp_min(0)
        x = torch.full_like(x, 0.5)
        u, p, bar = torch.zeros_like(physics.A(x)), torch.zeros_like(D(x)), x
        # The likelihoods are steep: a long primal step, short dual ones.
        curvature = float(likelihood.curvature(physics.A(x), y).mean())
        sigma = curvature**0.5 / norm
        tau = 1 / (sigma * norm**2)
        for _ in range(TV_ITERATIONS):
            v = u / sigma + physics.A(bar)
            u = sigma * (v - self._prox(likelihood, v, y, sigma))
            p = p + sigma * D(bar)
            p = p - soft_threshold(p, lambda_reg)
            new = (x - tau * (physics.A_adjoint(u) + Dt(p))).clamp_min(0)
            x, bar = new, 2 * new - x
        return x

    @staticmethod
    def _prox(likelihood: Likelihood, v: Tensor, y: Tensor, sigma: float) -> Tensor:
        # What is to vanish grows from v to the measurement, so bisection finds it.
        z = likelihood.linear(y)
        low, high = torch.minimum(v, z), torch.maximum(v, z)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            too_high = likelihood.derivative(middle, y) + sigma * (middle - v) > 0
            low, high = middle.where(~too_high, low), middle.where(too_high, high)
        return (low + high) / 2


def richardson_lucy(y: Tensor, physics: Any, iterations: int) -> Tensor:
    """Multiplicative updates from a constant image."""
    x = torch.full_like(physics.A_adjoint(y), float(y.mean()))
    ones = physics.A_adjoint(torch.ones_like(y))
    for _ in range(iterations):
        x = x * physics.A_adjoint(y / physics.A(x).clamp_min(1e-6)) / ones
    return x


def rival(problem: Problem, pairs: list[tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """Returns the third method, with the setting that is best on some pairs."""
    if problem.rival == "FBP":
        return lambda y: problem.physics.A_dagger(y)
    if problem.rival == "median":
        return lambda y: torch.from_numpy(median_filter(y.numpy(), (1, 1, 3, 3)))

    def score(iterations: int) -> float:
        found = (richardson_lucy(y, problem.physics, iterations) for _, y in pairs)
        return sum(float(PSNR()(f, x)) for f, (x, _) in zip(found, pairs, strict=True))

    best = max(RICHARDSON_LUCY, key=score)
    return lambda y: richardson_lucy(y, problem.physics, best)


# -- the comparison ---------------------------------------------------------------


def run(name: str, problem: Problem, size: int, number: int, pretrained: str) -> None:
    physics = problem.physics
    names = [n for n in PHOTOGRAPHS if n not in TUNING][:number]
    measure = lambda n: (crop(n, size), physics(crop(n, size)))  # noqa: E731
    tuning, test = [measure(n) for n in TUNING], [measure(n) for n in names]

    def likelihood(physics: Any, y: Tensor) -> Likelihood:
        if problem.fidelity != "auto":
            return likelihood_of_fidelity(problem.fidelity)
        found, _ = likelihood_of_noise(physics, y)
        assert found is not None
        return found

    settings = {"pretrained": pretrained, "warn": False, "scale": None}
    deal = DEAL(data_fidelity=problem.fidelity, **settings)
    squares = DEAL(data_fidelity=L2(), **settings)
    starts: dict[str, tuple[Any, dict[str, float]]] = {
        "DEAL, likelihood": (deal, problem.start),
        "DEAL, least squares": (squares, {"lambda_reg": 10.0, "sigma": 25 / 255}),
        "TV, likelihood": (TotalVariation(likelihood), {"lambda_reg": 3.0}),
    }
    methods: dict[str, Callable[[Tensor], Any]] = {}
    weights = {}
    for label, (model, start) in starts.items():
        own: dict[str, Any] = {}
        if isinstance(model, DEAL):
            own = {"tune_sigma": True, "max_trials": 18}
        result = tune(model, physics, tuning, spread=3, precision=1.8, **start, **own)
        weights[label] = result.settings
        methods[label] = lambda y, m=model, w=result.settings: m(y, physics, **w)
    methods[problem.rival] = rival(problem, tuning)

    print(f"\n{name}: {len(test)} crops of {size} x {size}")
    print(f"{'':22s}{'PSNR':>7s}{'SSIM':>8s}{'s':>7s}{'physics':>9s}{'W':>7s}  weights")
    scores = {}
    for label, method in methods.items():
        psnr, ssim, work, start = [], [], [], time.perf_counter()
        for x, y in test:
            with torch.no_grad():
                x_hat = method(y)
            psnr.append(float(PSNR()(x_hat, x)))
            ssim.append(float(SSIM()(x_hat, x)))
        seconds = (time.perf_counter() - start) / len(test)
        if label.startswith("DEAL"):
            model = starts[label][0]
            calls = counted(physics)
            before = calls[0]
            for _, y in test:
                _, info = model(y, physics, **weights[label], return_info=True)
                work.append(int(info.inner_iter + info.n_iter))
            applied = (calls[0] - before) / len(test)
            effort = f"{applied:9.0f}{sum(work) / len(work):7.0f}"
        else:
            effort = f"{'':16s}"
        scores[label] = torch.tensor(psnr)
        chosen = ", ".join(f"{k} {v:.3g}" for k, v in weights.get(label, {}).items())
        mean = sum(ssim) / len(ssim)
        print(
            f"{label:22s}{sum(psnr) / len(psnr):7.2f}{mean:8.3f}{seconds:7.2f}{effort}"
            f"  {chosen}",
            flush=True,
        )
    gain = scores["DEAL, likelihood"] - scores["DEAL, least squares"]
    error = gain.std() / len(gain) ** 0.5
    print(f"gain over least squares {gain.mean():.2f} +- {error:.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--number", type=int, default=10, help="crops")
    parser.add_argument("--pretrained", default="deal_gray")
    parser.add_argument("--only", default="", help="part of the problems' names")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, problem in problems(args.size).items():
        if args.only in name:
            run(name, problem, args.size, args.number, args.pretrained)


if __name__ == "__main__":
    main()
