r"""
How much work and time solvers of the same equation need, until the same accuracy.

What is counted is applications of :math:`W^{\top} M^2 W`, which take nearly all the
time, until the *nonlinear* residual

.. math::
    \frac{\|b - H x - \lambda G(x)\|}{\|b\|}

of an iterate is first below a target. The residual is evaluated by this package for all
solvers, while their clocks are stopped.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import deepinv as dinv
import torch
from deepinv.physics import (
    MRI,
    Blur,
    Denoising,
    Downsampling,
    GaussianNoise,
    Inpainting,
    LinearPhysics,
)
from deepinv.physics.functional import gaussian_blur
from torch import Tensor
from tqdm import tqdm

from deepinv_deal._batch import norm
from deepinv_deal.evaluation.baselines import TotalVariation
from deepinv_deal.evaluation.run import quality
from deepinv_deal.evaluation.tasks import MRI_NOISE, Condition, Task, line_mask
from deepinv_deal.evaluation.timing import PeakMemory, clock
from deepinv_deal.models import DEAL
from deepinv_deal.models.problem import Problem
from deepinv_deal.priors import AttentiveEquation, AttentiveQuadratic, DEALPrior
from deepinv_deal.solvers import anderson_depth, fixed_point
from deepinv_deal.weights.deal import to_authors_state_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Accuracies that runs are compared at.
TARGETS = (1e-3, 1e-5)

#: Accuracy of the reference solution, in double precision.
REFERENCE_RTOL = 1e-10


# -- tasks -----------------------------------------------------------------------------


def _inpainting(x: Tensor) -> LinearPhysics:
    rng = torch.Generator().manual_seed(0)
    mask = (torch.rand(x.shape[1:], generator=rng, device="cpu") < 0.5).to(x)
    return Inpainting(tuple(x.shape[1:]), mask=mask)


def _super_resolution(x: Tensor) -> LinearPhysics:
    kernel = gaussian_blur(sigma=(1.2, 1.2))
    return Downsampling(tuple(x.shape[1:]), filter=kernel, factor=2, padding="circular")


def _mri(x: Tensor) -> LinearPhysics:
    size = (int(x.shape[-2]), int(x.shape[-1]))
    return MRI(mask=line_mask(size, 4, 0.08), img_size=size)


def _speed_task(name: str, *condition: Any, mri: bool = False) -> Task:
    sigma = None if name == "denoising" else 15.0
    return Task(name, (Condition("", *condition),), sigma=sigma, mri=mri)


#: Noise (gray levels), physics and weight of the problems, by name.
SPEED_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _speed_task("denoising", 25.0, lambda _: Denoising(GaussianNoise(25 / 255))),
        _speed_task("inpainting", 0.0, _inpainting, 1.0),
        _speed_task(
            "deblurring",
            2.55,
            lambda _: Blur(gaussian_blur(sigma=(1.6, 1.6)), padding="circular"),
            0.5,
        ),
        _speed_task("super-resolution", 2.55, _super_resolution, 0.28),
        _speed_task("mri", round(255 * MRI_NOISE, 2), _mri, 0.05, mri=True),
    )
}

#: Weights of total variation for these tasks, chosen by hand.
TV_WEIGHTS = {
    "denoising": 0.08,
    "inpainting": 0.02,
    "deblurring": 0.002,
    "super-resolution": 0.002,
    "mri": 0.005,
}


# -- results ---------------------------------------------------------------------------


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
    target: float
    reached: bool = False
    applications: int = 0
    masks: int = 0
    n_iter: int = 0
    seconds: float = 0.0
    memory: float = math.nan
    residual: float = math.nan
    distance: float = math.nan
    psnr: float = math.nan
    path: list[tuple[int, float, float]] = field(default_factory=list, repr=False)


class _Enough(Exception):  # noqa: N818 - control flow, not an error
    """All targets are reached, or the time is used up."""


@dataclass
class _Watch:
    """Counts the work of a run, and stops clock and memory while it is judged."""

    case: _Case
    solver: str
    targets: Sequence[float]
    time_limit: float
    applications: int = 0
    masks: int = 0
    n_iter: int = 0
    seconds: float = 0.0
    path: list[tuple[int, float, float]] = field(default_factory=list)
    runs: dict[float, SpeedRun] = field(default_factory=dict)
    x: Tensor | None = None

    def __post_init__(self) -> None:
        self.memory = PeakMemory(self.case.x.device)
        self._started = self.case.clock()

    def start(self) -> None:
        """Starts clock and memory, or goes on."""
        self.memory.start()
        self._started = self.case.clock()

    def stop(self) -> None:
        """Stops them."""
        self.seconds += self.case.clock() - self._started
        self.memory.stop()

    def look(self, x: Tensor) -> None:
        """Judges the iterate after an outer iteration."""
        self.stop()
        self.x = x
        residual = self.case.residual(x)
        self.path.append((self.applications, self.seconds, residual))
        for target in self.targets:
            if target not in self.runs and residual <= target:
                self._note(target, reached=True)
        if len(self.runs) == len(self.targets) or self.seconds > self.time_limit:
            raise _Enough
        self.start()

    def _note(self, target: float, reached: bool) -> None:
        assert self.x is not None
        applications, seconds, residual = self.path[-1]
        self.runs[target] = SpeedRun(
            self.case.task.name,
            self.solver,
            target,
            reached,
            applications,
            self.masks,
            self.n_iter,
            seconds,
            self.memory.peak,
            residual,
            self.case.distance(self.x),
            self.case.psnr(self.x),
            list(self.path),
        )

    def watch(self, solve: Callable[[_Watch], None]) -> list[SpeedRun]:
        """Runs a solver, which starts the watch; returns what each target took."""
        with torch.no_grad(), contextlib.suppress(_Enough):
            solve(self)
        for target in self.targets:
            if target not in self.runs and self.path:
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
            _solve(self.judge.equation, 0.5, model)  # nobody pays for the first calls
            self.reference = self._solution() if reference else None

    def pose(self) -> Problem[AttentiveEquation]:
        """The problem as this package poses it, checks of the physics included."""
        return self.model.pose(self.y, self.physics, **self.settings)

    def clock(self) -> float:
        """Seconds, when all work so far is done."""
        return clock(self.x.device)

    def residual(self, x: Tensor) -> float:
        """The nonlinear residual relative to the right-hand side."""
        equation = self.judge.equation
        return float(norm(equation(x)) / norm(equation.b))

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
        result = _solve(problem.equation, REFERENCE_RTOL, model)
        return result.x if float(result.residual) <= REFERENCE_RTOL else None


# -- solvers ---------------------------------------------------------------------------


def _solve(
    equation: AttentiveEquation,
    target: float,
    model: DEAL,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Any:
    """Solves an equation as the model does, but judged by the plain residual."""

    def freeze(x: Tensor) -> Any:
        problem = equation.freeze(x)
        problem.weight = torch.ones_like(problem.residual)
        return problem

    return fixed_point(
        freeze,
        equation.start(None),
        rtol=target,
        max_iter=3000,
        forcing=model.forcing,
        anderson=anderson_depth(equation, model.anderson),
        callback=callback,
    )


def _counting(equation: AttentiveEquation, watch: _Watch) -> AttentiveEquation:
    """The same equation, counting what is applied."""
    regularizer = equation.regularizer

    class Counting(AttentiveQuadratic):
        def normal(self, x: Tensor, squared_mask: Tensor) -> Tensor:
            watch.applications += 1
            return super().normal(x, squared_mask)

        def squared_mask(self, x: Tensor) -> Tensor:
            watch.masks += 1
            return super().squared_mask(x)

    counting = Counting(regularizer.W, regularizer.attention, regularizer.reach)
    return replace(equation, regularizer=counting)


def _run_ours(
    case: _Case, watch: _Watch, inner_dtype: torch.dtype | None = None
) -> None:
    watch.start()
    equation = replace(case.pose().equation, inner_dtype=inner_dtype)
    equation = _counting(equation, watch)

    def callback(k: int, _: Tensor, x: Tensor) -> None:
        watch.n_iter = k + 1
        watch.look(x)

    _solve(equation, min(watch.targets), case.model, callback)


def _run_published(case: _Case, watch: _Watch) -> None:
    """
    The published iteration with its tolerances, on the operators of this package.

    Conjugate gradients on the system divided by 1 + lambda run until the squared norm
    of the residual is below an absolute tolerance, outer steps until the relative
    change is below 1e-5.
    """
    watch.start()
    equation = _counting(case.pose().equation, watch)
    eps_in = 1e-6 if case.task.sigma is None else 1e-8
    total = 1 + float(equation.lambda_reg)
    x = equation.start(None)
    b = equation.b / total
    for _ in range(60):
        squared_mask = equation.regularizer.squared_mask(x)

        def normal(v: Tensor, squared_mask: Tensor = squared_mask) -> Tensor:
            return (equation.H(v) + equation.force(v, squared_mask)) / total

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
        watch.n_iter += 1
        watch.look(x)
        if norm(x - previous) <= 1e-5 * norm(previous):
            return


def deepinv_model(prior: DEALPrior) -> dinv.models.DEAL:
    """
    Returns ``deepinv.models.DEAL`` with the weights of a prior.

    :param DEALPrior prior: with the norm rule ``"published"``; any number of filters.
    :raises ValueError: for another norm rule, which deepinv's model does not have.
    """
    if prior.normalization != "published":
        raise ValueError(
            f"deepinv.models.DEAL has the norm rule 'published' only, the weights have "
            f"{prior.normalization!r}."
        )
    color, n = prior.in_channels == 3, prior.num_filters
    model = dinv.models.DEAL(
        pretrained=None, color=color, clamp_output=False, device="cpu"
    )
    inner = model.model
    inner.last_c, channels = n, [*inner.W1.num_channels[:-1], n]
    for name in ("W1", "M1"):
        setattr(inner, name, type(inner.W1)(channels, [9] * 3, color=color))
    for name in ("M2", "M3"):
        setattr(inner, name, torch.nn.Conv2d(n, n, 3, padding=1, bias=False))
    inner.spline_scaling = type(inner.spline_scaling)(
        num_activations=n, num_knots=14, x_min=-1, x_max=51, init=3.0, clamp=False
    )
    missing, unexpected = inner.load_state_dict(
        to_authors_state_dict(prior.state_dict()), strict=False
    )
    parameters = {name for name, _ in inner.named_parameters()}
    assert not unexpected and not parameters & set(missing)
    return model.to(next(prior.parameters())).eval()


def _run_deepinv(case: _Case, watch: _Watch) -> None:
    model = deepinv_model(case.model.prior[0])
    model.sigma_denoiser = case.settings["sigma"]
    model.lambda_reg = case.settings.get("lambda_reg", 1.0)
    inner = model.model
    normal, cal_mask = inner.BtB, inner.cal_mask

    def counting_normal(*args: Any) -> Tensor:
        watch.applications += 1
        return normal(*args)

    def watched_mask(x: Tensor) -> Tensor:
        if watch.masks:
            watch.n_iter += 1
            watch.look(x)
        watch.masks += 1
        return cal_mask(x)

    inner.BtB, inner.cal_mask = counting_normal, watched_mask
    watch.start()
    if case.task.sigma is None:
        x = model(case.y, sigma=case.settings["sigma"])
    else:
        x = model(case.y, case.physics)
    watch.n_iter += 1
    watch.look(x)


def _run_tv(case: _Case) -> SpeedRun:
    """Total variation: another problem, so only time and quality compare."""
    model = TotalVariation(real=case.task.mri)
    watch = _Watch(case, TV, (), math.inf)
    with torch.no_grad():
        watch.start()
        x = model(case.y, case.physics, lambda_reg=TV_WEIGHTS[case.task.name])
        watch.stop()
    run = SpeedRun(case.task.name, TV, math.nan, True, seconds=watch.seconds)
    run.memory = watch.memory.peak
    run.psnr = case.psnr(case.judge.unknown("x", x))
    return run


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

#: Those that are always compared. bfloat16 is slow on hardware without such units.
DEFAULT_SOLVERS = (*(name for name in SOLVERS if name != BFLOAT16), TV)


def compare_speed(
    model: DEAL,
    image: Tensor,
    tasks: Sequence[str] = tuple(SPEED_TASKS),
    *,
    targets: Sequence[float] = TARGETS,
    solvers: Sequence[str] = DEFAULT_SOLVERS,
    time_limit: float = 120.0,
    reference: bool = True,
    progress: bool | None = None,
) -> list[SpeedRun]:
    r"""
    Solves the same problems by several solvers until the same accuracy.

    * ``deepinv_deal``: this package, once for every target, with the settings of the
      model but stopped by the residual; checking the physics is included.
    * ``deepinv_deal, bfloat16``: the same with ``inner_dtype=torch.bfloat16``, only if
      asked for.
    * ``published iteration``: fixed-point iteration and conjugate gradients of
      :footcite:t:`pourya2025dealing` with the published tolerances, on the operators
      of this package.
    * ``deepinv.models.DEAL``: deepinv's implementation with the same weights; left out
      for MRI, which it does not take, and for weights of another norm rule than
      ``"published"``, which it does not have.
    * ``deepinv TV``: total variation, whose time and quality can be compared.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.evaluation import compare_speed
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> image = (255 * torch.rand(1, 24, 24)).byte()
    >>> runs = compare_speed(
    ...     model,
    ...     image,
    ...     ["denoising"],
    ...     targets=[1e-3],
    ...     reference=False,
    ...     solvers=["deepinv_deal", "published iteration"],
    ... )
    >>> [run.solver for run in runs]
    ['deepinv_deal', 'published iteration']

    :param DEAL model: gray or colour, for MRI gray.
    :param torch.Tensor image: 8-bit image ``(C, H, W)``.
    :param tuple tasks: names in ``SPEED_TASKS``.
    :param tuple targets: nonlinear residuals to reach.
    :param tuple solvers: which of the above.
    :param float time_limit: seconds after which a run is stopped, at the end of its
        outer iteration.
    :param bool reference: compute the solution to 1e-10 in double precision, from which
        distances are measured.
    :param bool progress: show a progress bar; on terminals if ``None``.
    :return: list of :class:`SpeedRun`.
    :raises ValueError: for unknown tasks or solvers.
    """
    known = (*SOLVERS, TV)
    for what, names, choices in (
        ("tasks", tasks, SPEED_TASKS),
        ("solvers", solvers, known),
    ):
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise ValueError(
                f"{what} must be among {', '.join(choices)}; got {unknown[0]!r}."
            )
    iterator = model.fixed_point.iterator
    real = DEAL(
        prior=model.prior[0],
        pretrained=None,
        scale=None,
        complex_mode="real",
        inner_max_iter=iterator.inner_max_iter,
        preconditioner=iterator.preconditioner,
        forcing=model.forcing,
        anderson=model.anderson,
        warn=False,
    )
    published_norm = model.prior[0].normalization == "published"
    bar = tqdm(
        total=len(tasks) * len(solvers),
        disable=None if progress is None else not progress,
    )
    runs: list[SpeedRun] = []
    # Convolutions in TF32 would be judged by their own rounding.
    with bar, torch.backends.cudnn.flags(allow_tf32=False):
        for name in tasks:
            bar.set_description(name)
            case = _Case(real, SPEED_TASKS[name], image, reference)
            for solver in solvers:
                bar.set_description(f"{name}, {solver}")
                if solver == TV:
                    runs.append(_run_tv(case))
                elif solver != DEEPINV or (published_norm and not case.task.mri):
                    # What this package does depends on the accuracy asked for.
                    own = solver in (OWN, BFLOAT16)
                    for group in [(t,) for t in targets] if own else [targets]:
                        watch = _Watch(case, solver, group, time_limit)
                        runs += watch.watch(partial(SOLVERS[solver], case))
                bar.update()
    return runs


# -- output ----------------------------------------------------------------------------


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
    from matplotlib.figure import Figure

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
