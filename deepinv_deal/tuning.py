r"""
Choosing the regularization weight, and a second parameter, on a few images.

:func:`tune` looks for the :math:`\lambda` (and, on request, the :math:`\sigma` or
:math:`\beta` of the model) with the best mean score on a validation set. With ground
truth the score is any deepinv metric; without, it is Stein's unbiased risk estimate.
"""

from __future__ import annotations

import csv
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from deepinv.loss import SureGaussianLoss
from deepinv.loss.metric import PSNR, Metric
from deepinv.models import Reconstructor
from deepinv.physics import Denoising
from deepinv.utils import TensorList
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from deepinv_deal.models.deal import DEFAULT_SIGMA
from deepinv_deal.models.patches import SynthesisModel
from deepinv_deal.optim import FixedPointOptim
from deepinv_deal.solvers import ConvergenceWarning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Trial", "TuningResult", "tune"]

#: Keeps the probe of SURE apart from noise drawn with the same seed, or a simple one:
#: a probe that is correlated with the noise would bias the estimate.
PROBE_SEED = 0x5EED_0BE5

#: Evaluations allowed if ``max_trials`` is not given, by number of parameters.
DEFAULT_MAX_TRIALS = {1: 15, 2: 60}

#: First factors of the search are powers of ``spread``. The model's noise level acts
#: through its logarithm like the others, but less strongly.
POWERS = {"lambda_reg": 1.0, "sigma": 0.5, "beta": 1.0}

#: Models that say how a reconstruction went, by ``return_info=True``.
REPORTING = (FixedPointOptim, SynthesisModel)

EMPTY = "The validation set is empty: at least one image is needed to tune."


@dataclass(frozen=True)
class Trial:
    """
    One setting that was tried.

    :param float lambda_reg: regularization weight.
    :param float sigma: noise level of the model; ``None`` if it was not tuned.
    :param float beta: coupling of a dictionary; ``None`` if it was not tuned.
    :param float score: mean of the metric over the images.
    :param float converged: share of the images whose solver met its tolerance.
    :param float n_iter: mean number of outer iterations.
    :param float seconds: wall time; that of the batch divided by its candidates.
    """

    lambda_reg: float
    sigma: float | None
    beta: float | None
    score: float
    converged: float
    n_iter: float
    seconds: float

    @property
    def settings(self) -> dict[str, float]:
        """The parameters that were tuned, by name."""
        values = {name: getattr(self, name) for name in POWERS}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class TuningResult:
    """
    What :func:`tune` tried, in order.

    :param str metric: name of the metric.
    :param bool lower_better: whether a lower score is better.
    :param list trials: one :class:`Trial` per setting.
    :param bool complete: whether the search ended by its own rule, rather than by
        ``max_trials``, an interrupt or an error.
    :param dict fixed: parameters that were given and not tuned.
    """

    metric: str
    lower_better: bool
    trials: list[Trial]
    complete: bool = False
    fixed: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        """The trial with the best score."""
        sign = 1 if self.lower_better else -1
        return min(self.trials, key=lambda trial: sign * trial.score)

    @property
    def lambda_reg(self) -> float:
        """The best regularization weight."""
        return self.best.lambda_reg

    @property
    def sigma(self) -> float | None:
        """The best noise level of the model, ``None`` if it was not tuned."""
        return self.best.sigma

    @property
    def beta(self) -> float | None:
        """The best coupling of a dictionary, ``None`` if it was not tuned."""
        return self.best.beta

    @property
    def settings(self) -> dict[str, float]:
        """
        The best values as arguments, ``model(y, physics, **result.settings)``, with
        those that were fixed.
        """
        return {**self.fixed, **self.best.settings}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per trial."""
        with open(Path(path), "w", newline="", encoding="utf-8") as file:
            rows = _Rows(file)
            for trial in self.trials:
                rows.add(trial)

    def plot(self, axis: Axes | None = None) -> Figure:
        """
        Draws the score over lambda or, if two parameters were tuned, over both.

        :param matplotlib.axes.Axes axis: where to draw; on a figure of its own if
            ``None``.
        :return: the figure; ``figure.savefig(path)`` writes it.
        """
        # A Figure of its own needs no display and leaves pyplot's state alone.
        from matplotlib.figure import Figure

        if axis is None:
            axis = Figure(figsize=(5.5, 4), layout="constrained").subplots()
        figure = axis.get_figure(root=True)
        assert figure is not None
        trials = sorted(self.trials, key=lambda trial: trial.lambda_reg)
        weights = [trial.lambda_reg for trial in trials]
        scores = [trial.score for trial in trials]
        best = self.best
        second = [name for name in best.settings if name != "lambda_reg"]
        if not second:
            axis.plot(weights, scores, "o-", markersize=4)
            height = best.score
            axis.set_ylabel(self.metric)
        else:
            scale = 255 if second == ["sigma"] else 1
            heights = [scale * trial.settings[second[0]] for trial in trials]
            shown = axis.scatter(weights, heights, c=scores, cmap="viridis", s=60)
            height = scale * best.settings[second[0]]
            figure.colorbar(shown, ax=axis, label=self.metric)
            if second == ["sigma"]:
                axis.set_ylabel("sigma of the model, gray levels")
            else:
                axis.set_ylabel("beta")
                axis.set_yscale("log")
        axis.scatter(
            [best.lambda_reg], [height], s=140, c="tab:red", marker="*", zorder=3
        )
        axis.set_xscale("log")
        axis.set_xlabel("lambda_reg")
        axis.set_title(f"best: {_describe(best)}, {best.score:.4g}", fontsize=11)
        axis.spines[["right", "top"]].set_visible(False)
        axis.grid(alpha=0.3)
        return figure


def tune(
    model: Reconstructor,
    physics: Any,
    dataset: Dataset[Any] | DataLoader[Any] | Iterable[Any] | Tensor,
    *,
    metric: Metric | str | None = None,
    lambda_reg: float | None = None,
    sigma: float | None = None,
    tune_sigma: bool = False,
    beta: float | None = None,
    tune_beta: bool = False,
    spread: float = 4.0,
    precision: float = 1.2,
    max_trials: int | None = None,
    batch_candidates: bool = False,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> TuningResult:
    r"""
    Chooses ``lambda_reg``, and on request ``sigma`` or ``beta``, on a validation set.

    The search is on a logarithmic scale, from coarse to fine, as in the code of
    :footcite:t:`pourya2024iteratively`. It compares the weights :math:`p/g`, :math:`p`
    and :math:`p g`; while an end is best, the three points move one step that way;
    else :math:`g \leftarrow \sqrt{g}`, until :math:`g` is at most ``precision``. We add
    one last point, the vertex of the parabola through the scores of the three points
    over :math:`\log \lambda`. With ``tune_sigma`` or ``tune_beta``, the points are
    those of a 3 x 3 grid, :math:`\beta` moves by :math:`g`, :math:`\sigma` by
    :math:`\sqrt g`, and the last point comes from the paraboloid fitted to them. No
    setting is tried twice.

    All settings see the same measurements, and each is solved from the model's own
    first image: started at a neighbour's result, the solver would stop elsewhere within
    its tolerance, and scores would depend on the order of the trials. That tolerance
    also limits how finely settings can be told apart: with few, small images and the
    default ``rtol``, scores are uneven by some hundredths of a decibel.

    **Without ground truth**, ``metric="sure"`` takes deepinv's Monte Carlo estimate
    :class:`deepinv.loss.SureGaussianLoss` of :math:`\tfrac1m \|A\hat x - A x\|^2`,
    which needs Gaussian noise of known level (``physics.noise_model``) and one more
    reconstruction per setting. In denoising this is the mean squared error. With any
    other operator it sees the error of the *measured* part of the image only: it says
    nothing about what :math:`A` does not measure, and should not be used where that is
    much (inpainting, undersampled MRI, super-resolution).

    **Interrupted** by the keyboard, the search returns what it has, with
    ``complete=False`` and a warning. If a candidate raises an error, the error carries
    the result so far as its attribute ``tuning``. The file ``log`` has every finished
    trial in both cases.

    |sep|

    :Example:

    >>> import deepinv as dinv, torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.tuning import tune
    >>> x = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    >>> model = DEAL(pretrained=None, num_filters=4)
    >>> physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    >>> result = tune(model, physics, [x])
    >>> x_hat = model(physics(x), physics, **result.settings)

    :param deepinv.models.Reconstructor model: a model of this package; or any other,
        called as ``model(y, physics, lambda_reg=...)``, to tune a rival with the same
        care: ``converged`` and ``n_iter`` are then NaN, and candidates are tried one by
        one. Models of others need a ``lambda_reg`` to start at. Only DEAL, SAFI and
        MMR have a ``sigma``, only dictionaries a ``beta`` to choose.
    :param deepinv.physics.LinearPhysics physics: forward operator with its noise.
        ``None`` to denoise given pairs.
    :param Dataset, DataLoader, Iterable, torch.Tensor dataset: ground-truth images
        ``(C, H, W)`` or ``(B, C, H, W)``, from which measurements are drawn once, or
        what deepinv's datasets and loaders give: pairs ``(x, y)``, triples
        ``(x, y, params)`` or dictionaries of these, batched unless ``x`` has three
        dimensions or it is a :class:`torch.utils.data.Dataset`.
    :param deepinv.loss.metric.Metric, str metric: called as ``metric(x_hat, x)``; its
        ``lower_better`` says which way is better; or ``"sure"``.
        :class:`deepinv.loss.metric.PSNR` if ``None``.
    :param float lambda_reg: where the search starts; if ``None``, at the model's own
        value, which is 1 where it has none, and the learned one for denoising.
    :param float sigma: noise level of the model: where its search starts, or fixed if
        ``tune_sigma`` is false. ``None``: the model's own.
    :param bool tune_sigma: choose ``sigma`` too.
    :param float beta: coupling of a dictionary: where its search starts, or fixed if
        ``tune_beta`` is false. ``None``: the model's own.
    :param bool tune_beta: choose ``beta`` too.
    :param float spread: first factor :math:`g`.
    :param float precision: last factor :math:`g`.
    :param int max_trials: largest number of settings; if ``None``, 15, or 60 for two
        parameters.
    :param bool batch_candidates: solve the candidates of a grid as one batch, with the
        same result; for images that are small for the machine. Each physics must serve
        batches larger than its data's.
    :param int seed: seed of the measurements that are drawn.
    :param str log: file to which each trial is appended as it is done (CSV).
    :param bool progress: show a progress bar; on terminals if ``None``.
    :return: a :class:`TuningResult`.
    :raises ValueError: for an empty validation set, a score that is not finite, values
        that are not positive, or missing ground truth or noise level.
    :raises TypeError: for a model, metric or data of another kind.
    """
    if not isinstance(model, Reconstructor):
        raise TypeError(
            "model must be a deepinv Reconstructor such as deepinv_deal.DEAL, got "
            f"{type(model).__name__}."
        )
    kind, iterates = type(model).__name__, isinstance(model, FixedPointOptim)
    dictionary = isinstance(model, SynthesisModel)
    if (sigma is not None or tune_sigma) and not iterates:
        raise ValueError(
            f"sigma can be fixed or tuned for DEAL, SAFI and MMR only, not for {kind}, "
            f"got sigma={sigma}, tune_sigma={tune_sigma}."
        )
    if (beta is not None or tune_beta) and not dictionary:
        raise ValueError(
            "beta can be fixed or tuned for PatchSynthesis and SmoothPlusSparse only, "
            f"not for {kind}, got beta={beta}, tune_beta={tune_beta}."
        )
    if lambda_reg is None and not iterates and not dictionary:
        raise ValueError(
            f"For {kind}, lambda_reg must be given: the weight to start at."
        )
    scorer = _scorer(metric, seed)
    if not math.inf > spread >= precision > 1:
        raise ValueError(
            "spread and precision are factors with spread >= precision > 1, got "
            f"spread={spread}, precision={precision}."
        )
    tuned = {"lambda_reg": True, "sigma": tune_sigma, "beta": tune_beta}
    names = [name for name in POWERS if tuned[name]]
    budget = DEFAULT_MAX_TRIALS[len(names)] if max_trials is None else max_trials
    if budget < 1:
        raise ValueError(f"max_trials must be at least 1, got {max_trials}.")
    problems = _problems(model, physics, dataset, seed)
    scorer.check(problems)
    given = {"lambda_reg": lambda_reg, "sigma": sigma, "beta": beta}
    for name, value in given.items():
        if value is not None and torch.as_tensor(value).numel() != 1:
            raise ValueError(f"{name} must be one number, got {value}.")
    start = _start(model, problems[0], given, names)
    fixed = {
        name: float(value)
        for name, value in given.items()
        if value is not None and name not in names
    }
    result = TuningResult(scorer.name, scorer.lower_better, [], fixed=fixed)
    bar = tqdm(
        total=budget,
        desc="Tuning",
        unit="trial",
        disable=None if progress is None else not progress,
    )

    def evaluate(points: Sequence[np.ndarray]) -> list[float]:
        batched = batch_candidates and isinstance(model, REPORTING)
        size = max(1, len(points)) if batched else 1
        costs = []
        for i in range(0, len(points), size):
            candidates = [
                dict(zip(names, np.exp(point).tolist(), strict=True))
                for point in points[i : i + size]
            ]
            for trial in _evaluate(model, problems, candidates, fixed, scorer):
                result.trials.append(trial)
                if rows is not None:
                    rows.add(trial)
                costs.append(trial.score if scorer.lower_better else -trial.score)
                bar.update()
            bar.set_postfix_str(f"best {_describe(result.best)}")
        return costs

    steps = np.array([POWERS[name] for name in names]) * math.log(spread)
    file = None if log is None else open(Path(log), "w", newline="", encoding="utf-8")
    rows = None if file is None else _Rows(file)
    try:
        result.complete = _search(
            evaluate, np.log(start), steps, math.log(precision), budget
        )
    except KeyboardInterrupt:
        if not result.trials:
            raise
        warnings.warn(
            f"Tuning was interrupted after {len(result.trials)} trials; the best of "
            "these is returned.",
            RuntimeWarning,
            stacklevel=2,
        )
        return result
    except Exception as error:
        error.tuning = result  # type: ignore[attr-defined]
        raise
    finally:
        bar.close()
        if file is not None:
            file.close()
    if not result.complete:
        warnings.warn(
            f"Tuning stopped at max_trials={budget} before the search was over. Start "
            f"nearer ({_describe(result.best)} is the best so far) or allow more.",
            RuntimeWarning,
            stacklevel=2,
        )
    if result.best.converged < 1:
        warnings.warn(
            f"At the best setting ({_describe(result.best)}) only "
            f"{result.best.converged:.0%} of the images converged. Raise the model's "
            "max_iter, or its rtol if the residual is small enough for you.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return result


def _describe(trial: Trial) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in trial.settings.items())


class _Rows:
    """A CSV file of trials; each row is on disk as soon as it is added."""

    def __init__(self, file: TextIO):
        self.file = file
        self.writer = csv.DictWriter(file, [f.name for f in fields(Trial)])
        self.writer.writeheader()

    def add(self, trial: Trial) -> None:
        self.writer.writerow(asdict(trial))
        self.file.flush()


# -- the search ------------------------------------------------------------------


def _search(
    evaluate: Callable[[Sequence[np.ndarray]], list[float]],
    centre: np.ndarray,  # (n,) logarithms
    steps: np.ndarray,  # (n,)
    precision: float,
    budget: int,
) -> bool:
    """
    Minimises over 3^n points that move and contract; returns whether it ended itself.
    """
    offsets = sorted(product((-1, 0, 1), repeat=len(centre)), key=any)  # centre first
    costs: dict[tuple[float, ...], float] = {}

    def visit(points: Sequence[np.ndarray]) -> list[float] | None:
        # Sums of the same steps in another order must count as the same point.
        keys = [tuple(np.round(point, 6)) for point in points]
        new = {k: p for k, p in zip(keys, points, strict=True) if k not in costs}
        affordable = list(new)[: budget - len(costs)]
        for key, cost in zip(
            affordable, evaluate([new[k] for k in affordable]), strict=True
        ):
            costs[key] = cost
        return [costs[k] for k in keys] if len(affordable) == len(new) else None

    while True:
        grid = [centre + steps * offset for offset in offsets]
        values = visit(grid)
        if values is None:
            return False
        if (lowest := int(np.argmin(values))) > 0:  # not the centre: move there
            centre = grid[lowest]
        elif steps[0] > precision:
            steps = steps / 2
        else:
            vertex = _vertex(np.array(offsets, float), np.array(values))
            return vertex is None or visit([centre + steps * vertex]) is not None


def _vertex(points: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """Returns where the quadratic fitted to the values is smallest, if it is convex."""
    n = points.shape[1]
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    squares = np.stack([points[:, i] * points[:, j] for i, j in pairs], 1)
    columns = np.concatenate([np.ones((len(points), 1)), points, squares], 1)
    coefficients = np.linalg.lstsq(columns, values, rcond=None)[0]
    gradient, hessian = coefficients[1 : n + 1], np.zeros((n, n))
    for (i, j), c in zip(pairs, coefficients[n + 1 :], strict=True):
        hessian[i, j] += c
        hessian[j, i] += c
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        return None
    return np.clip(-np.linalg.solve(hessian, gradient), -1, 1)


def _start(
    model: Reconstructor,
    problem: _Problem,
    given: dict[str, float | None],
    names: Sequence[str],
) -> np.ndarray:
    """Returns the first value of each parameter."""
    denoising = problem.physics is None or isinstance(problem.physics, Denoising)
    if isinstance(model, SynthesisModel):
        known = _noise_level(problem.physics) if denoising else None
        learned = {
            "lambda_reg": model.default_lambda(known),
            "beta": model.default_beta,
        }
        given = {k: learned.get(k) if v is None else v for k, v in given.items()}
    if not isinstance(model, FixedPointOptim):
        return _positive({name: given[name] for name in names})
    lambda_reg, sigma = given["lambda_reg"], given["sigma"]
    own = model.update_params_fn(0)
    level: Any = sigma
    if level is None and denoising:
        level = _noise_level(problem.physics)
    if level is None:
        level = own["g_param"]
    weight: Any = own["lambda"] if lambda_reg is None else lambda_reg
    prior = model.prior[0]
    if weight is None and denoising and not (level is None and prior.needs_sigma):
        weight = prior.default_lambda(level, problem.y)
    start = {
        "lambda_reg": 1.0 if weight is None else weight,
        "sigma": DEFAULT_SIGMA if level is None else level,
    }
    return _positive({name: start[name] for name in names})


def _positive(start: dict[str, Any]) -> np.ndarray:
    values = []
    for name, first in start.items():
        value = torch.as_tensor(first, dtype=torch.float64).detach()
        values.append(float(value.log().mean().exp()))
        if not 0 < values[-1] < math.inf:
            raise ValueError(
                f"The search for {name} is on a logarithmic scale and must start at a "
                f"positive number, got {value.tolist()}. Give {name}=..."
            )
    return np.array(values)


# -- the problems ----------------------------------------------------------------


@dataclass
class _Problem:
    """A batch of the validation set: every candidate sees these measurements."""

    x: Tensor | None
    y: Any
    physics: Any

    def __len__(self) -> int:
        return len(self.y[0] if isinstance(self.y, TensorList) else self.y)


def _problems(
    model: Reconstructor, physics: Any, dataset: Any, seed: int
) -> list[_Problem]:
    # Without parameters, the data stay where they are.
    device = next((p.device for p in model.parameters()), None)
    if isinstance(dataset, Tensor):
        dataset = [dataset]
    elif isinstance(dataset, Dataset):
        dataset = DataLoader(dataset)
    if not isinstance(dataset, Iterable):
        raise TypeError(
            "dataset must be an iterable of images or of pairs (x, y), got "
            f"{type(dataset).__name__}."
        )
    problems = []
    with own_randomness(physics, device, seed):
        for i, item in enumerate(dataset):
            x, y, params = _unpack(item, i)
            own = physics
            if params:
                own = physics.clone()
                own.update(**params)
            if x is not None and device is not None:
                x = x.to(device)
            if x is not None and not len(x):
                raise ValueError(EMPTY)
            if y is None:
                if physics is None:
                    raise ValueError(
                        f"Item {i} of the validation set has no measurements, and "
                        "without physics none can be made of it. Give physics=..., "
                        "e.g. Denoising(GaussianNoise(sigma))."
                    )
                with torch.no_grad():
                    y = own(x)
            y = y if device is None else y.to(device)
            problems.append(_Problem(x, y, own))
    if not problems:
        raise ValueError(EMPTY)
    return problems


def _unpack(item: Any, i: int) -> tuple[Tensor | None, Any, dict[str, Any] | None]:
    """Takes image, measurements and parameters from an item in deepinv's formats."""
    if isinstance(item, dict):
        x, y, params = (item.get(name) for name in ("x", "y", "params"))
    elif isinstance(item, Tensor):
        x, y, params = item, None, None
    elif isinstance(item, (tuple, list)) and 2 <= len(item) <= 3:
        x, y, params = (*item, None)[:3]
    else:
        raise TypeError(
            f"Item {i} of the validation set must be an image, a pair (x, y), a triple "
            f"(x, y, params) or a dictionary, got {type(item).__name__}."
        )
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, (Tensor, TensorList, type(None))):
            raise TypeError(
                f"{name} of item {i} must be a tensor, got {type(value).__name__}."
            )
    if isinstance(x, Tensor) and x.numel() and bool(x.isnan().all()):
        x = None  # deepinv's placeholder for a missing ground truth
    if x is None and y is None:
        raise ValueError(f"Item {i} of the validation set has neither x nor y.")
    if x is not None and x.ndim == 3:
        x, y = x[None], None if y is None else y[None]
    return x, y, params


@contextmanager
def own_randomness(
    physics: Any, device: torch.device | None, seed: int
) -> Iterator[None]:
    """Seeds all generators, and puts them back as they were."""
    device = torch.device("cpu") if device is None else device
    devices = [] if device.type == "cpu" else [device]
    modules: Iterable[Any] = (
        physics.modules() if isinstance(physics, torch.nn.Module) else ()
    )
    generators = [
        (module, rng, rng.get_state())
        for module in modules
        if isinstance(rng := getattr(module, "rng", None), torch.Generator)
    ]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed)
        for _, rng, _ in generators:
            rng.manual_seed(seed)
        try:
            yield
        finally:
            for module, rng, state in generators:
                # An update of the noise model may have put another generator there.
                module.rng = rng
                rng.set_state(state)


# -- scores ----------------------------------------------------------------------


@torch.no_grad()
def _evaluate(
    model: Reconstructor,
    problems: Sequence[_Problem],
    candidates: Sequence[dict[str, float]],
    fixed: dict[str, float],
    scorer: _MetricScorer | _SureScorer,
) -> list[Trial]:
    """Tries some settings, all in one batch."""
    start = time.perf_counter()
    scores: list[list[float]] = [[] for _ in candidates]
    converged: list[list[float]] = [[] for _ in candidates]
    n_iter: list[list[float]] = [[] for _ in candidates]
    for problem in problems:
        size = len(problem)
        values = {
            name: torch.tensor(
                [c[name] for c in candidates], dtype=torch.float64
            ).repeat_interleave(size)
            for name in candidates[0]
        }
        info = None
        with warnings.catch_warnings():
            # Whether candidates converge is part of their trial.
            warnings.simplefilter("ignore", ConvergenceWarning)
            if isinstance(model, REPORTING):
                x_hat, info = model(
                    _repeat(problem.y, len(candidates)),
                    problem.physics,
                    return_info=True,
                    **fixed,
                    **values,
                )
            else:
                x_hat = model(problem.y, problem.physics, **candidates[0])
            for i, candidate in enumerate(candidates):
                own = slice(i * size, (i + 1) * size)

                def again(y: Any, physics: Any, settings: Any = candidate) -> Any:
                    return model(y, physics, **fixed, **settings)

                score = scorer(problem, x_hat[own], again)
                if not bool(torch.isfinite(score).all()):
                    raise ValueError(
                        f"The metric {scorer.name} gave {score.tolist()} for "
                        f"{candidate} on images of the validation set, which cannot be "
                        "compared."
                    )
                # A metric that averages itself counts once per image all the same.
                scores[i] += score.double().expand(size).tolist()
                if info is not None:
                    converged[i] += info.converged[own].tolist()
                    n_iter[i] += info.n_iter[own].tolist()
    seconds = (time.perf_counter() - start) / len(candidates)
    return [
        Trial(
            candidate["lambda_reg"],
            candidate.get("sigma"),
            candidate.get("beta"),
            float(np.mean(scores[i])),
            float(np.mean(converged[i] or math.nan)),
            float(np.mean(n_iter[i] or math.nan)),
            seconds,
        )
        for i, candidate in enumerate(candidates)
    ]


def _repeat(y: Any, n: int) -> Any:
    if isinstance(y, TensorList):
        return TensorList([_repeat(part, n) for part in y])
    return y.repeat(n, *[1] * (y.ndim - 1))


def _noise_level(physics: Any) -> Tensor | None:
    return getattr(getattr(physics, "noise_model", None), "sigma", None)


def _scorer(metric: Any, seed: int) -> _MetricScorer | _SureScorer:
    if metric == "sure":
        return _SureScorer(seed)
    metric = PSNR() if metric is None else metric
    if not callable(metric) or not hasattr(metric, "lower_better"):
        raise TypeError(
            "metric must be 'sure' or a deepinv.loss.metric.Metric, whose attribute "
            f"lower_better says which way is better, got {metric!r}. Wrap a function "
            "f(x_hat, x) as Metric(metric=f)."
        )
    return _MetricScorer(metric)


class _MetricScorer:
    """The score of images whose ground truth is known."""

    def __init__(self, metric: Any):
        self.metric, self.name = metric, type(metric).__name__
        # With train_loss, deepinv's metrics turn around what is better when higher.
        self.lower_better = metric.lower_better or getattr(metric, "train_loss", False)

    def check(self, problems: Sequence[_Problem]) -> None:
        for i, problem in enumerate(problems):
            if problem.x is None:
                raise ValueError(
                    f"Item {i} of the validation set has no ground truth, which the "
                    f"metric {self.name} needs. metric='sure' does without."
                )

    def __call__(self, problem: _Problem, x_hat: Tensor, _again: Any) -> Tensor:
        score = self.metric(x_hat, problem.x)
        if not isinstance(score, Tensor) or score.numel() not in (1, len(x_hat)):
            raise ValueError(
                f"The metric {self.name} must give one number per image, got "
                f"{tuple(score.shape) if isinstance(score, Tensor) else score!r} for "
                f"{len(x_hat)} images."
            )
        return score.reshape(-1)


class _SureScorer:
    """Stein's unbiased estimate of the risk, with the same probe for all candidates."""

    name, lower_better = "SURE", True

    def __init__(self, seed: int):
        self.seed = PROBE_SEED + seed

    def check(self, problems: Sequence[_Problem]) -> None:
        for problem in problems:
            if _noise_level(problem.physics) is None:
                raise ValueError(
                    "metric='sure' needs the level of the Gaussian noise: give physics "
                    "with noise_model=GaussianNoise(sigma)."
                )

    def __call__(self, problem: _Problem, x_hat: Tensor, again: Any) -> Tensor:
        rng = torch.Generator(x_hat.device).manual_seed(self.seed)
        sure = SureGaussianLoss(_noise_level(problem.physics), rng=rng)
        return sure(y=problem.y, x_net=x_hat, physics=problem.physics, model=again)
