"""
Iterations and time of the solvers of CPR and NCPR, to the same distance from the end.

    python benchmarks/dictionaries.py --weights FILE          # a trained checkpoint

A crop of scikit-image's ``camera`` with the noise of the weights is denoised. The image
to reach is that of the best solver, run on for ``--reference`` iterations: the
minimiser for convex models, otherwise the stationary point that this solver finds.
After each iteration, the image that belongs to the coefficients is compared with it,
which is not timed; ratios are those to ``"published"``. That is iPALM as its authors
wrote it, one convolution with every atom; ``"ipalm"`` is the same method in the
penalised subspace, where all of this package's solvers work. One distance is that at
which the published rule stops.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import torch
from torch import Tensor

from deepinv_deal import SmoothPlusSparse
from deepinv_deal.operators import PatchConv
from deepinv_deal.operators.patches import channel_map
from deepinv_deal.problems import SynthesisProblem, operator_term
from deepinv_deal.problems.dictionary import ADMM_CONVEX, ADMM_WEAKLY_CONVEX
from deepinv_deal.problems.synthesis_solvers import (
    PALM_MARGIN,
    eliminated_fista,
    ipalm,
    joint_admm,
)


class Reached(Exception):  # noqa: N818 - control flow, not an error
    """The distance asked for is reached."""


@dataclass
class Watch:
    """Looks at the coefficients of every iteration."""

    problem: SynthesisProblem
    target: Tensor | None
    distances: list[float]
    n_iter: int = 0
    seconds: float = 0.0
    reached: dict[float, tuple[int, float]] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    def look(self, a: Tensor) -> Tensor:
        """Compares the image of the coefficients with the target, not timed."""
        self.n_iter += 1
        if self.target is None:
            return a
        self.seconds += time.perf_counter() - self.start
        x = self.problem.image(a)
        distance = float((x - self.target).norm() / self.target.norm())
        for wanted in self.distances:
            if distance <= wanted and wanted not in self.reached:
                self.reached[wanted] = self.n_iter, self.seconds
        if len(self.reached) == len(self.distances):
            raise Reached
        self.start = time.perf_counter()
        return a


@dataclass(frozen=True)
class Watched(SynthesisProblem):
    """A problem whose iterations are watched."""

    watch: Watch | None = None

    def threshold(self, *args: Tensor) -> Tensor:
        return self.watch.look(super().threshold(*args))

    def prox(self, a: Tensor, r: float) -> Tensor:
        return self.watch.look(super().prox(a, r))


def run(solver, problem, y, watch, **options) -> Tensor:
    """Runs a solver until the watched distances are reached or its limit."""
    parts = {f.name: getattr(problem, f.name) for f in fields(problem)}
    watching = Watched(**parts, watch=watch)
    watch.start = time.perf_counter()
    try:
        with torch.no_grad():
            zero = problem.zero_coefficients()
            return solver(watching, y, zero, rtol=0.0, **options).x
    except Reached:
        return y


@torch.no_grad()
def published(
    problem: SynthesisProblem, y: Tensor, a: Tensor, *, rtol: float, max_iter: int
) -> SimpleNamespace:
    """Runs iPALM for denoising with convolutions for all atoms, as its authors do."""
    D = PatchConv(problem.beta.sqrt() * problem.frame.atoms, "circular")
    gram = problem.frame.C @ problem.frame.C.T
    L = PALM_MARGIN * (1 + problem.beta * problem.aggregation_norm)
    x, old_x, old_a = y, y, a
    for k in range(1, max_iter + 1):
        w = (k - 1) / (k + 2)
        v = a + w * (a - old_a)
        old_a, a = a, problem.prox(v - channel_map(gram, v) + D(x), 1.0)
        v = x + w * (x - old_x)
        slope = v - y + problem.aggregate(v) - D.adjoint(a)
        old_x, x = x, v - slope / L
        if (x - old_x).norm() <= rtol * old_x.norm():
            break
    return SimpleNamespace(x=x, n_iter=k)


def main() -> None:
    """Prints one line for each solver and distance."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", required=True, help="checkpoint of CPR or NCPR")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--reference", type=int, default=3000, help="iterations")
    parser.add_argument("--max-iter", type=int, default=3000)
    parser.add_argument("--distance", type=float, nargs="+", default=[1e-2, 3e-3, 1e-3])
    names = ["ipalm", "fista", "admm"]
    parser.add_argument("--solver", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    from skimage.data import camera

    prior = SmoothPlusSparse(pretrained=args.weights).prior
    n = args.size
    x = torch.from_numpy(camera()[60 : 60 + n, 200 : 200 + n] / 255.0)[None, None]
    x = x.float()
    rng = torch.Generator().manual_seed(0)
    y = x + prior.sigma * torch.randn(x.shape, generator=rng)
    problem = prior.problem(operator_term(y))
    convex = problem.penalty.weak_convexity == 0
    r = ADMM_CONVEX if convex else ADMM_WEAKLY_CONVEX
    solvers = {
        "published": (published, {}),
        "ipalm": (ipalm, {}),
        "fista": (eliminated_fista, {}),
        "admm": (joint_admm, {"r": r}),
    }
    best = "admm" if convex else "fista"
    watch = Watch(problem, None, [])
    function, options = solvers[best]
    target = run(function, problem, y, watch, max_iter=args.reference, **options)
    zero = problem.zero_coefficients()
    theirs = published(problem, y, zero, rtol=1e-4, max_iter=args.max_iter)
    stop = float((theirs.x - target).norm() / target.norm())
    distances = sorted([stop, *args.distance], reverse=True)

    def psnr(z: Tensor) -> float:
        return -10 * float((z - x).square().mean().log10())

    print(
        f"{prior.penalty_name}, {n} x {n}, PSNR of the target {psnr(target):.2f} dB, "
        f"where the published rule stops, after {theirs.n_iter} iterations, "
        f"{psnr(theirs.x):.2f} dB"
    )
    print(
        f"{'solver':<10}{'distance':>10}{'iterations':>12}{'seconds':>10}{'ratio':>8}"
    )
    base: dict[float, float] = {}
    for name in ["published", *args.solver]:
        function, options = solvers[name]
        watch = Watch(problem, target, distances)
        run(function, problem, y, watch, max_iter=args.max_iter, **options)
        for wanted in distances:
            found = watch.reached.get(wanted)
            if found is None:
                print(f"{name:<10}{wanted:>10.1e}{'not reached':>12}", flush=True)
                continue
            n_iter, seconds = found
            if name == "published":
                base[wanted] = seconds
            ratio = f"{base[wanted] / seconds:.1f}" if wanted in base else "-"
            print(
                f"{name:<10}{wanted:>10.1e}{n_iter:>12}{seconds:>10.2f}{ratio:>8}",
                flush=True,
            )


if __name__ == "__main__":
    main()
