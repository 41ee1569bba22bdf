r"""
Applications of W and time against ``deepinv.models.DEAL``, with identical weights.

    python benchmarks/against_deepinv.py                    # random weights
    python benchmarks/against_deepinv.py --weights FILE.pth # weights in the authors'
    layout

Three solvers work on the same two problems (denoising at sigma 25/255 and inpainting of
half the pixels, on a 128 x 128 crop of scikit-image's ``camera``):

* ``deepinv_deal``: this package, ``rtol`` as asked for;
* ``published``: the published iteration and its tolerances, restated on our operators:
  conjugate gradients on the system divided by 1 + lambda until its squared residual is
  below ``eps_in`` (absolute), outer steps until the relative change is below 1e-5;
* ``deepinv``: ``deepinv.models.DEAL``, evaluated after each of its outer iterations.

A solver is counted until its iterate *first* has a nonlinear residual
``||b - A(x) x|| / ||b||`` of at most the target. These evaluations are not counted.
deepinv is stopped after ``--cap`` applications; ``--default-run`` lets it go
on until it stops by itself.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial

import deepinv as dinv
import torch

from deepinv_deal import DEAL
from deepinv_deal._batch import norm
from deepinv_deal.priors import AttentiveQuadratic
from deepinv_deal.weights import convert_state_dict
from deepinv_deal.weights.deal import prior_from_state_dict

SIGMA_MODEL, LAMBDA = 15 / 255, 1.0


class Reached(Exception):  # noqa: N818 - control flow, not an error
    """The target residual, or the cap, is reached."""


@dataclass
class Count:
    """Work done until the target, and what became of it."""

    applications: int = 0
    masks: int = 0
    seconds: float = 0.0
    residual: float = float("nan")

    def line(self, name: str) -> str:
        return (
            f"{name:<24}{self.applications:>8}{self.masks:>8}{self.seconds:>10.1f}"
            f"{self.residual:>12.1e}"
        )


@torch.no_grad()
def relative_residual(equation, x) -> float:
    """The nonlinear residual, relative to the right-hand side."""
    return float(norm(equation(x)) / norm(equation.b))


def counted(equation) -> Count:
    """Counts applications of W and masks of an equation from now on."""
    count = Count()
    regularizer = equation.regularizer

    class Counting(AttentiveQuadratic):
        def normal(self, x, squared_mask):
            count.applications += 1
            return super().normal(x, squared_mask)

        def mask(self, x):
            count.masks += 1
            return super().mask(x)

    object.__setattr__(
        equation,
        "regularizer",
        Counting(regularizer.W, regularizer.attention),
    )
    return count


def ours(model, equation, target: float) -> Count:
    from deepinv_deal.solvers import fixed_point

    count = counted(equation)

    def freeze(x):
        problem = equation.freeze(x)
        problem.weight = torch.ones_like(problem.residual)  # judged by the residual
        return problem

    start = time.perf_counter()
    with torch.no_grad():
        result = fixed_point(
            freeze,
            torch.zeros_like(equation.b),
            rtol=target,
            max_iter=1000,
            forcing=model.forcing,
            anderson=model.anderson,
        )
    count.seconds = time.perf_counter() - start
    count.residual = float(result.residual)
    return count


def published(equation, judge, target: float, eps_in: float, cap: int) -> Count:
    """The published iteration; ``cap`` limits inner and outer iterations."""
    count = counted(equation)

    def normal(v, squared_mask):
        return equation.H(v) + equation.force(v, squared_mask)

    lambda_reg = float(equation.lambda_reg)
    x = torch.zeros_like(equation.b)
    b = equation.b / (1 + lambda_reg)
    start = time.perf_counter()
    judged = 0.0
    with torch.no_grad():
        for _ in range(cap):
            squared_mask = equation.regularizer.mask(x).square()
            previous = x
            r = b - normal(x, squared_mask) / (1 + lambda_reg)
            p, rr = r, r.square().sum()
            for _ in range(cap):
                if rr <= eps_in:
                    break
                q = normal(p, squared_mask) / (1 + lambda_reg)
                alpha = rr / (p * q).sum()
                x, r = x + alpha * p, r - alpha * q
                rr, old = r.square().sum(), rr
                p = r + rr / old * p
            paused = time.perf_counter()
            count.residual = judge(x)
            judged += time.perf_counter() - paused
            if count.residual <= target:
                break
            if norm(x - previous) <= 1e-5 * norm(previous):
                break
    count.seconds = time.perf_counter() - start - judged
    return count


def theirs(
    reference, run, judge, target: float, full: bool, cap: int
) -> tuple[Count, Count]:
    """Runs deepinv's model; returns the work until the target and until it stops."""
    now, first = Count(), Count()
    inner = reference.model
    convolution, cal_mask = inner.W1.convolution, inner.cal_mask
    judged = 0.0
    start = time.perf_counter()

    def counting_convolution(x):
        now.applications += 1
        return convolution(x)

    def counting_mask(x):
        nonlocal judged
        paused = time.perf_counter()
        now.residual = judge(x) if x.any() else 1.0
        now.seconds = paused - start - judged
        judged += time.perf_counter() - paused
        if now.residual <= target and not first.applications:
            first.__dict__.update(now.__dict__)
            if not full:
                raise Reached
        if not full and now.applications >= cap:
            raise Reached
        now.masks += 1
        return cal_mask(x)

    inner.W1.convolution, inner.cal_mask = counting_convolution, counting_mask
    try:
        with torch.enable_grad():  # its last step registers a hook
            x = run().detach()
        now.seconds = time.perf_counter() - start - judged
        now.residual = judge(x)
    except Reached:
        pass
    finally:
        inner.W1.convolution, inner.cal_mask = convolution, cal_mask
    return first, now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", help=".pth file in the authors' layout")
    parser.add_argument("--target", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--cap", type=int, default=6000, help="applications of W")
    parser.add_argument("--default-run", action="store_true")
    parser.add_argument("--skip-deepinv", action="store_true")
    args = parser.parse_args()
    from skimage.data import camera

    torch.manual_seed(0)
    reference = dinv.models.DEAL(pretrained=args.weights, clamp_output=False)
    prior = prior_from_state_dict(convert_state_dict(reference.state_dict()))
    model = DEAL(prior=prior, pretrained=None, scale=None)
    n = args.size
    x = torch.from_numpy(camera()[100 : 100 + n, 180 : 180 + n] / 255.0).float()[
        None, None
    ]
    rng = torch.Generator().manual_seed(0)
    noisy = x + 25 / 255 * torch.randn(x.shape, generator=rng)
    inpainting = dinv.physics.Inpainting((1, n, n), mask=0.5, rng=rng)
    masked = inpainting(x)
    identity = dinv.physics.Denoising(dinv.physics.GaussianNoise(25 / 255))
    reference.sigma_denoiser = SIGMA_MODEL
    reference.lambda_reg = LAMBDA
    problems = {
        "denoising": (
            lambda: model.equation(noisy, identity, sigma=25 / 255),
            lambda: reference(noisy, sigma=25 / 255),
            1e-6,
        ),
        "inpainting": (
            lambda: model.equation(
                masked, inpainting, sigma=SIGMA_MODEL, lambda_reg=LAMBDA
            ),
            lambda: reference(masked, inpainting),
            1e-8,
        ),
    }
    for name, (make, run, eps_in) in problems.items():
        print(f"\n{name}, {n} x {n}, until residual {args.target:g} is first reached")
        print(f"{'solver':<24}{'W':>8}{'masks':>8}{'seconds':>10}{'residual':>12}")
        with torch.no_grad():
            exact = make()
            judge = partial(relative_residual, exact)
            print(ours(model, make(), args.target).line("deepinv_deal"), flush=True)
            line = published(make(), judge, args.target, eps_in, 1000)
            print(line.line("published tolerances"), flush=True)
            if args.skip_deepinv:
                continue
            first, last = theirs(
                reference, run, judge, args.target, args.default_run, args.cap
            )
            reached = first if first.applications else last
            print(reached.line("deepinv.models.DEAL"), flush=True)
            if args.default_run:
                print(last.line("  its default run"), flush=True)


if __name__ == "__main__":
    main()
