r"""
How much work and time solvers of the same equation need, until the same accuracy.

What is counted is applications of W^T M^2 W, which take nearly all the time, until the
*nonlinear* residual ||b - H x - lambda G(x)|| / ||b|| of an iterate is first below a
target. The residual is evaluated by this package for all solvers, while their clocks
are stopped. The solvers are

* ``deepinv_deal``: this package, once for every target, with the settings of the
  model but stopped by the residual; checking the physics is included
* ``deepinv_deal, bfloat16``: the same with inner solves in 16 bits, only on request: it
  is slow on hardware without such units
* ``published iteration``: fixed-point iteration and conjugate gradients of the paper
  with the published tolerances, on the operators of this package
* ``deepinv.models.DEAL``: deepinv's implementation with the same weights; left out for
  MRI, which it does not take, and for weights of another norm rule than "published"
* ``deepinv TV``: total variation, whose time and quality can be compared

    python benchmarks/speed.py [--size 128] [--threads 1] [--figure speed.png]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from _common import SPEED_TASKS, PeakMemory, application_times, clock, deepinv_model
from matplotlib.figure import Figure
from torch import Tensor

from deepinv_deal import DEAL
from deepinv_deal._batch import central, norm
from deepinv_deal.cli._options import photograph
from deepinv_deal.evaluation import Task, TotalVariation, quality
from deepinv_deal.files import read_picture
from deepinv_deal.problems import AttentiveEquation, AttentiveQuadratic, Problem
from deepinv_deal.solvers import anderson_depth, fixed_point

#: Accuracies that runs are compared at.
TARGETS = (1e-3, 1e-5)

#: Accuracy of the reference solution, in double precision.
REFERENCE_RTOL = 1e-10

#: Weights of total variation for the tasks, chosen by hand.
TV_WEIGHTS = {
    "denoising": 0.08,
    "inpainting": 0.02,
    "deblurring": 0.002,
    "super-resolution": 0.002,
    "mri": 0.005,
}

# -- results ---------------------------------------------------------------------


@dataclass
class SpeedRun:
    r"""
    The work of one solver until one accuracy.

    :param str task: name of the task.
    :param str solver: name of the solver.
    :param float target: nonlinear residual to reach; NaN for solvers of other problems.
    :param bool reached: whether it was reached.
    :param int applications: applications of :math:`W^{\top} M^2 W`.
    :param int masks: evaluations of the mask.
    :param int n_iter: outer iterations.
    :param float seconds: wall time without the evaluation of residuals.
    :param float memory: most memory used beyond that at the start, in MB, without the
        evaluation of residuals; NaN where the system does not tell.
    :param float residual: nonlinear residual of the last iterate.
    :param float distance: its relative distance to the reference solution, NaN if there
        is none.
    :param float psnr: of the last iterate, clipped, dB.
    :param list path: applications, seconds and residual after every outer iteration.
    """

    task: str
    solver: str
    target: float = math.nan
    reached: bool = False
    applications: int = 0
    masks: int = 0
    n_iter: int = 0
    seconds: float = 0.0
    memory: float = math.nan
    residual: float = math.nan
    distance: float = math.nan
    psnr: float = math.nan
    path: list[tuple[int, float, float]] = field(default_factory=list)


class _Enough(Exception):  # noqa: N818 - control flow, not an error
    """All targets are reached, or the time is used up."""


class _Watch:
    """Counts the work of a run, and stops clock and memory while it is judged."""

    def __init__(
        self, case: _Case, solver: str, targets: Sequence[float], time_limit: float
    ):
        self.case, self.targets, self.time_limit = case, targets, time_limit
        #: The run up to now; the solver counts its work here.
        self.now = SpeedRun(case.task.name, solver)
        self.runs: dict[float, SpeedRun] = {}
        self.memory = PeakMemory(case.x.device)

    def start(self) -> None:
        """Starts clock and memory, or goes on."""
        self.memory.start()
        self._started = self.case.clock()

    def stop(self) -> None:
        """Stops them."""
        self.now.seconds += self.case.clock() - self._started
        self.memory.stop()
        self.now.memory = self.memory.peak

    def look(self, x: Tensor) -> None:
        """Judges the iterate after an outer iteration."""
        self.stop()
        now, self.x = self.now, x
        now.n_iter += 1
        now.residual = self.case.residual(x)
        now.path.append((now.applications, now.seconds, now.residual))
        for target in self.targets:
            if target not in self.runs and now.residual <= target:
                self._note(target, reached=True)
        if len(self.runs) == len(self.targets) or now.seconds > self.time_limit:
            raise _Enough
        self.start()

    def _note(self, target: float, reached: bool) -> None:
        self.runs[target] = replace(
            self.now,
            target=target,
            reached=reached,
            distance=self.case.distance(self.x),
            psnr=self.case.psnr(self.x),
            path=list(self.now.path),
        )

    def watch(self, solve: Callable[[_Watch], None]) -> list[SpeedRun]:
        """Runs a solver, which starts the watch; returns what each target took."""
        with torch.no_grad(), contextlib.suppress(_Enough):
            solve(self)
        for target in self.targets:
            if target not in self.runs and self.now.path:
                self._note(target, reached=False)
        return list(self.runs.values())


class _Case:
    """One problem: the exact equation to judge by, and its reference solution."""

    def __init__(self, model: DEAL, task: Task, image: Tensor, reference: bool):
        self.model, self.task = model, task
        (self.condition,) = task.conditions
        weight = next(model.parameters())
        x = task.ground_truth(image.cpu())
        y, physics = self.condition.measure(x)  # on the CPU: the same on all devices
        self.x, self.y = x.to(weight), y.to(weight)
        self.physics = physics.to(weight.device)
        sigma = self.condition.noise if task.sigma is None else task.sigma
        #: Noise level and weight of the model.
        self.settings: dict[str, Any] = {"sigma": sigma / 255}
        if task.sigma is not None:
            self.settings["lambda_reg"] = self.condition.lambda_reg
        with torch.no_grad():
            self.judge = self.pose()
            _solve(self.judge.equation, 0.5)  # nobody pays for the first calls
            self.reference = self._solution() if reference else None

    def pose(self) -> Problem:
        """The problem as this package poses it, checks of the physics included."""
        return self.model.pose(self.y, self.physics, **self.settings)

    def clock(self) -> float:
        """Seconds, when all work so far is done."""
        return clock(self.x.device)

    def residual(self, x: Tensor) -> float:
        """The nonlinear residual relative to the right-hand side."""
        equation = self.judge.equation
        return float(norm(equation(x)) / norm(equation.data.b))

    def psnr(self, x: Tensor) -> float:
        """Quality of an unknown as an image."""
        compare = self.task.compare
        psnr, _ = quality(compare(self.judge.image(x)), compare(self.x))
        return psnr

    def distance(self, x: Tensor) -> float:
        """Relative distance to the reference solution; NaN without."""
        if self.reference is None:
            return math.nan
        return float(norm(x.double() - self.reference) / norm(self.reference))

    def _solution(self) -> Tensor | None:
        """The solution in double precision, if it converges."""
        model = copy.deepcopy(self.model).double()
        physics = copy.deepcopy(self.physics).double()
        problem = model.pose(self.y.double(), physics, **self.settings)
        result = _solve(problem.equation, REFERENCE_RTOL)
        return result.x if float(result.residual) <= REFERENCE_RTOL else None


# -- solvers -------------------------------------------------------------------


def _solve(
    equation: AttentiveEquation,
    target: float,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Any:
    """Solves an equation as the model does, but judged by the plain residual."""
    options = equation.options

    def freeze(x: Tensor) -> Any:
        problem = equation.freeze(x)
        problem.weight = torch.ones_like(problem.residual)
        return problem

    return fixed_point(
        freeze,
        equation.start(None),
        rtol=target,
        max_iter=3000,
        forcing=options.forcing,
        anderson=anderson_depth(equation, options.anderson),
        callback=callback,
    )


def _counting(equation: AttentiveEquation, watch: _Watch) -> AttentiveEquation:
    """The same equation, counting what is applied."""
    regularizer = equation.regularizer

    class Counting(AttentiveQuadratic):
        def normal(self, x: Tensor, squared_mask: Tensor) -> Tensor:
            watch.now.applications += 1
            return super().normal(x, squared_mask)

        def squared_mask(self, x: Tensor) -> Tensor:
            watch.now.masks += 1
            return super().squared_mask(x)

    counting = Counting(regularizer.W, regularizer.attention, regularizer.reach)
    return replace(equation, regularizer=counting)


def _run_ours(
    case: _Case, watch: _Watch, inner_dtype: torch.dtype | None = None
) -> None:
    watch.start()
    equation = case.pose().equation
    options = replace(equation.options, inner_dtype=inner_dtype)
    equation = _counting(replace(equation, options=options), watch)

    def callback(_k: int, _: Tensor, x: Tensor) -> None:
        watch.look(x)

    _solve(equation, min(watch.targets), callback)


def _run_published(case: _Case, watch: _Watch) -> None:
    """
    The published iteration with its tolerances, on the operators of this package.

    It starts at zero. Conjugate gradients on the system divided by 1 + lambda run until
    the squared norm of the residual is below an absolute tolerance, outer steps until
    the relative change is below 1e-5.
    """
    watch.start()
    equation = _counting(case.pose().equation, watch)
    eps_in = 1e-6 if case.task.sigma is None else 1e-8
    total = 1 + float(equation.lambda_reg)
    x = torch.zeros_like(equation.data.b)
    b = equation.data.b / total
    for _ in range(60):
        squared_mask = equation.regularizer.squared_mask(x)

        def normal(v: Tensor, squared_mask: Tensor = squared_mask) -> Tensor:
            return (equation.data.normal(v) + equation.force(v, squared_mask)) / total

        previous = x
        r = b - normal(x)
        p, rr = r, r.square().sum()
        for _ in range(200):
            if rr <= eps_in:
                break
            q = normal(p)
            alpha = rr / (p * q).sum()
            x, r = x + alpha * p, r - alpha * q
            rr, old = r.square().sum(), rr
            p = r + rr / old * p
        watch.look(x)
        if norm(x - previous) <= 1e-5 * norm(previous):
            return


def _run_deepinv(case: _Case, watch: _Watch) -> None:
    model = deepinv_model(case.model.prior)
    model.sigma_denoiser = case.settings["sigma"]
    model.lambda_reg = case.settings.get("lambda_reg", 1.0)
    inner = model.model
    normal, cal_mask = inner.BtB, inner.cal_mask

    def counting_normal(*args: Any) -> Tensor:
        watch.now.applications += 1
        return normal(*args)

    def watched_mask(x: Tensor) -> Tensor:
        if watch.now.masks:
            watch.look(x)
        watch.now.masks += 1
        return cal_mask(x)

    inner.BtB, inner.cal_mask = counting_normal, watched_mask
    watch.start()
    if case.task.sigma is None:
        x = model(case.y, sigma=case.settings["sigma"])
    else:
        x = model(case.y, case.physics)
    watch.look(x)


def _run_tv(case: _Case) -> SpeedRun:
    """Total variation: another problem, so only time and quality compare."""
    model = TotalVariation(real=case.task.mri)
    watch = _Watch(case, TV, (), math.inf)
    with torch.no_grad():
        watch.start()
        x = model(case.y, case.physics, lambda_reg=TV_WEIGHTS[case.task.name])
        watch.stop()
    psnr = case.psnr(case.judge.data.unknown("x", x))
    return replace(watch.now, reached=True, psnr=psnr)


#: This package, deepinv's model, and the rival that solves another problem.
OWN, DEEPINV, TV = "deepinv_deal", "deepinv.models.DEAL", "deepinv TV"

#: This package with inner solves in 16 bits.
BFLOAT16 = "deepinv_deal, bfloat16"

#: Solvers of the equation, by the name they have in tables.
SOLVERS: dict[str, Callable[[_Case, _Watch], None]] = {
    OWN: _run_ours,
    BFLOAT16: partial(_run_ours, inner_dtype=torch.bfloat16),
    "published iteration": _run_published,
    DEEPINV: _run_deepinv,
}


def compare_speed(
    model: DEAL,
    image: Tensor,
    name: str,
    *,
    targets: Sequence[float] = TARGETS,
    bfloat16: bool = False,
    time_limit: float = 120.0,
    reference: bool = True,
) -> list[SpeedRun]:
    """
    Solves one problem by all solvers until the same accuracy.

    :param DEAL model: gray or colour, for MRI gray.
    :param torch.Tensor image: 8-bit image ``(C, H, W)``.
    :param str name: of the task in ``SPEED_TASKS``.
    :param tuple targets: nonlinear residuals to reach.
    :param bool bfloat16: this package also with inner solves in 16 bits.
    :param float time_limit: seconds after which a run is stopped, at the end of its
        outer iteration.
    :param bool reference: compute the solution to 1e-10 in double precision, from which
        distances are measured.
    """
    real = DEAL(
        prior=model.prior,
        scale=None,
        complex_mode="real",
        solver=model.solver,
        warn=False,
    )
    takes = model.prior.normalization == "published" and name != "mri"
    left_out = {BFLOAT16: not bfloat16, DEEPINV: not takes}
    # Convolutions in TF32 would be judged by their own rounding.
    with torch.backends.cudnn.flags(allow_tf32=False):
        case = _Case(real, SPEED_TASKS[name], image, reference)
        runs: list[SpeedRun] = []
        for solver, run in SOLVERS.items():
            if left_out.get(solver):
                continue
            # What this package does depends on the accuracy asked for.
            own = solver in (OWN, BFLOAT16)
            for group in [(t,) for t in targets] if own else [targets]:
                watch = _Watch(case, solver, group, time_limit)
                runs += watch.watch(partial(run, case))
        return [*runs, _run_tv(case)]


# -- output ----------------------------------------------------------------------


def speed_table(runs: Sequence[SpeedRun]) -> str:
    """
    Returns the runs as a table, with ratios to this package.

    :param list runs: from :func:`compare_speed`.
    :return: text of several lines.
    """
    lines = []
    for name in dict.fromkeys(run.task for run in runs):
        lines += [
            "",
            f"{name:<22}{'target':>8}{'W':>7}{'masks':>7}{'outer':>7}{'seconds':>9}"
            f"{'MB':>7}{'residual':>10}{'distance':>10}{'PSNR':>7}{'W ratio':>9}"
            f"{'time ratio':>12}",
        ]
        chosen = [run for run in runs if run.task == name]
        own = {run.target: run for run in chosen if run.solver == OWN}
        for run in chosen:
            if math.isnan(run.target):
                lines.append(
                    f"{run.solver:<22}{'':>29}{run.seconds:>9.2f}{run.memory:>7.0f}"
                    f"{'':>20}{run.psnr:>7.2f}"
                )
                continue
            ours = own.get(run.target)
            ratios = ""
            if ours is not None and ours is not run and ours.reached:
                sign = "" if run.reached else ">"
                ratios = (
                    f"{sign + format(run.applications / ours.applications, '.1f'):>9}"
                    f"{sign + format(run.seconds / ours.seconds, '.1f'):>12}"
                )
            lines.append(
                f"{run.solver:<22}{run.target:>8.0e}{run.applications:>7}{run.masks:>7}"
                f"{run.n_iter:>7}{run.seconds:>9.2f}{run.memory:>7.0f}"
                f"{run.residual:>10.1e}{run.distance:>10.1e}{run.psnr:>7.2f}{ratios}"
            )
    if any(not run.reached for run in runs):
        lines.append("> the target was not reached")
    return "\n".join(lines[1:])


def plot_speed(runs: Sequence[SpeedRun]) -> Figure:
    """
    Draws the residual against the time, for each task.

    :param list runs: from :func:`compare_speed`.
    """
    tasks = list(dict.fromkeys(run.task for run in runs))
    # A Figure of its own needs no display and leaves pyplot alone.
    figure = Figure(figsize=(3.2 * len(tasks) + 0.6, 3.2), layout="constrained")
    (axes,) = figure.subplots(1, len(tasks), squeeze=False)
    for name, axis in zip(tasks, axes, strict=True):
        for i, solver in enumerate(SOLVERS):
            chosen = [r for r in runs if (r.task, r.solver) == (name, solver)]
            if not chosen:
                continue
            run = min(chosen, key=lambda r: r.target)
            _, seconds, residual = zip(*run.path, strict=True)
            axis.loglog(seconds, residual, ".-", color=f"C{i}", label=solver)
        axis.set_title(name)
        axis.set_xlabel("seconds")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nonlinear residual")
    handles = {line.get_label(): line for axis in axes for line in axis.lines}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=3)
    return figure


# -- the script ------------------------------------------------------------------


def picture(path: str | None, size: int, channels: int) -> Tensor:
    """Returns the 8-bit image ``(C, size, size)`` to compare on."""
    if path is None:
        x = photograph(size, channels)
    else:
        x = central(read_picture(path).x[0], size)
        if x.shape != (channels, size, size):
            raise ValueError(
                f"--image {path!r} must have {channels} channel(s) and at least "
                f"{size} x {size} pixels for these weights; it gives "
                f"{tuple(x.shape)}."
            )
    return (255 * x).round().clamp(0, 255).byte()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, tasks = parser.add_argument, list(SPEED_TASKS)
    add("--pretrained", default="deal_gray", help="weights of a DEAL")
    add("--task", nargs="+", choices=tasks, default=tasks, help="problems to solve")
    add("--image", help="image file, of which the centre is used; else a photograph")
    add("--size", type=int, default=128, help="side of the image in pixels")
    add("--target", type=float, nargs="+", default=TARGETS, help="residuals to reach")
    add("--time-limit", type=float, default=120.0, help="seconds of one run")
    add(
        "--reference",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure distances from the solution in double precision",
    )
    add("--bfloat16", action="store_true", help="also with inner solves in bfloat16")
    add("--device", default="cpu", help="where to compute")
    add("--threads", type=int, help="number of CPU threads")
    add("--csv", help="file for one line per run")
    add("--figure", help="file for a picture of residual against time")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = DEAL(pretrained=args.pretrained, warn=False, device=args.device)
    image = picture(args.image, args.size, model.prior.in_channels)
    times = application_times(model, args.size)
    print(
        f"One application of W^T M^2 W at {args.size} x {args.size}: "
        f"{1e3 * times.normal:.2f} ms, with plain convolutions "
        f"{1e3 * times.plain:.2f} ms ({times.plain / times.normal:.1f} times as long). "
        f"One conjugate gradient step {1e3 * times.step:.2f} ms "
        f"({times.step / times.normal:.2f}), one mask {1e3 * times.mask:.2f} ms.\n",
        flush=True,
    )
    runs = []
    for task in args.task:
        new = compare_speed(
            model,
            image,
            task,
            targets=args.target,
            bfloat16=args.bfloat16,
            time_limit=args.time_limit,
            reference=args.reference,
        )
        print(speed_table(new) + "\n", flush=True)
        runs += new
    if args.csv:
        rows = [asdict(replace(run, path=len(run.path))) for run in runs]
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if args.figure:
        plot_speed(runs).savefig(args.figure, dpi=150)
    missed = [r for r in runs if r.solver == OWN and not r.reached]
    for run in missed:
        print(f"{run.task}: {run.target:g} was not reached", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
