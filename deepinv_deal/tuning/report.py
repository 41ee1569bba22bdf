"""What was tried: the result, its file, its figure, and what there is to warn of."""

from __future__ import annotations

import csv
import os
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from deepinv_deal._atomic import replacing
from deepinv_deal.solvers import ConvergenceWarning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: First factors of the search are powers of ``spread``. The model's noise level acts
#: through its logarithm like the others, but less strongly.
POWERS = {"lambda_reg": 1.0, "sigma": 0.5, "beta": 1.0}


@dataclass(frozen=True)
class Trial:
    """
    One setting that was tried.

    :param float lambda_reg: regularization weight.
    :param float sigma: noise level of the model; ``None`` if it was not tuned.
    :param float beta: coupling of a dictionary; ``None`` if it was not tuned.
    :param float score: mean of the metric over the images.
    :param float converged: share of the images whose solver met its tolerance, or has
        none.
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

    @property
    def text(self) -> str:
        """The settings in words."""
        return ", ".join(f"{name}={x:.4g}" for name, x in self.settings.items())


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
        with (
            replacing(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = _writer(file)
            writer.writerows(asdict(trial) for trial in self.trials)

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
        axis.set_title(f"best: {best.text}, {best.score:.4g}", fontsize=11)
        axis.spines[["right", "top"]].set_visible(False)
        axis.grid(alpha=0.3)
        return figure


def _writer(file: TextIO) -> csv.DictWriter[str]:
    writer = csv.DictWriter(file, [f.name for f in fields(Trial)])
    writer.writeheader()
    return writer


class Recorder:
    """
    Adds trials to a result, to a file and to a progress bar as soon as they are done.

    When the search ends, it says what there is to warn of. An interrupt by the keyboard
    ends it as if it were over if there is a trial; an error gets the result so far as
    its attribute ``tuning``.

    :param TuningResult result: filled here.
    :param str log: file for one line per trial; ``None``: no file.
    :param int budget: largest number of trials.
    :param bool progress: show a progress bar; on terminals if ``None``.
    """

    def __init__(
        self,
        result: TuningResult,
        log: str | os.PathLike[str] | None,
        budget: int,
        progress: bool | None,
    ):
        self.result, self.budget = result, budget
        self.file: TextIO | None = None
        if log is not None:
            self.file = open(Path(log), "w", newline="", encoding="utf-8")
            self.writer = _writer(self.file)
        silent = None if progress is None else not progress
        self.bar = tqdm(total=budget, desc="Tuning", unit="trial", disable=silent)

    def add(self, trial: Trial) -> float:
        """Adds a trial; returns its cost, which is to be small."""
        self.result.trials.append(trial)
        if self.file is not None:
            self.writer.writerow(asdict(trial))
            self.file.flush()
        self.bar.set_postfix_str(f"best {self.result.best.text}", refresh=False)
        self.bar.update()
        return trial.score if self.result.lower_better else -trial.score

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if isinstance(error, Exception):
            error.tuning = self.result  # type: ignore[attr-defined]
        interrupted = isinstance(error, KeyboardInterrupt) and self.result.trials
        if error is None or interrupted:
            for text, category in self._warnings(bool(interrupted)):
                warnings.warn(text, category, stacklevel=3)
        return bool(interrupted)

    def _warnings(self, interrupted: bool) -> list[tuple[str, type[Warning]]]:
        best, found = self.result.best, list[tuple[str, type[Warning]]]()
        if interrupted:
            text = (
                f"Tuning was interrupted after {len(self.result.trials)} trials; the "
                "best of these is returned."
            )
            return [(text, RuntimeWarning)]
        if not self.result.complete:
            text = (
                f"Tuning stopped at max_trials={self.budget} before the search was "
                f"over. Start nearer ({best.text} is the best so far) or allow more."
            )
            found.append((text, RuntimeWarning))
        if best.converged < 1:
            text = (
                f"At the best setting ({best.text}) only {best.converged:.0%} of the "
                "images converged. Raise the model's max_iter, or its rtol if the "
                "residual is small enough for you."
            )
            found.append((text, ConvergenceWarning))
        return found
