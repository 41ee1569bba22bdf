"""What training brought: validation results against time, as a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG, CURVE = "log.jsonl", "curve.png"


def read_log(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    Returns the validations of a training, in the order of their steps.

    What was validated again after a kill appears once.

    :param str run: folder of the training, or its ``log.jsonl``.
    :raises FileNotFoundError: if there is no log.
    :raises ValueError: if the file is no log of a training.
    """
    path = Path(run)
    path = path / LOG if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}: give the folder of a training with at least one "
            "validation, or its log."
        )
    entries = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            psnr = {str(k): float(v) for k, v in entry["psnr"].items()}
            entries[int(entry["step"])] = {
                "step": int(entry["step"]),
                "seconds": float(entry["seconds"]),
                "psnr": psnr,
            }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no log of a training, which has a line of JSON with 'step', "
            f"'seconds' and 'psnr' for every validation: {error!r}. Remove lines that "
            "were cut off."
        ) from error
    if not entries:
        raise ValueError(f"{path} holds no validation.")
    return [entries[step] for step in sorted(entries)]


def plot_learning_curve(
    *runs: str | os.PathLike[str], gflop_per_step: float | None = None
) -> Figure:
    """
    Draws the validation PSNR of trainings that continue each other against time.

    One panel for every noise level that all of them validate, one colour for every
    training. Trainings write this picture of themselves, ``curve.png``.

    |sep|

    :Example:

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from deepinv_deal.training import plot_learning_curve
    >>> with tempfile.TemporaryDirectory() as out:
    ...     line = {"step": 100, "seconds": 60.0, "psnr": {"25": 28.5}}
    ...     _ = (Path(out) / "log.jsonl").write_text(json.dumps(line))
    ...     figure = plot_learning_curve(out)
    >>> figure.axes[0].get_ylabel()
    'validation PSNR (dB)'

    :param str runs: folders of trainings, or their logs, the first one first.
    :param float gflop_per_step: computations of one step in GFLOP, for a second axis in
        PFLOP; ``benchmarks/training.py`` measures them.
    :return: figure; ``figure.savefig("curve.png")`` writes it.
    :raises FileNotFoundError: if a log is missing.
    :raises ValueError: without runs, for another file, or without a noise level that
        all validate.
    """
    from matplotlib.figure import Figure

    if not runs:
        raise ValueError("runs must name at least one training.")
    logs = [read_log(run) for run in runs]
    levels = [
        level
        for level in logs[0][0]["psnr"]
        if all(level in entry["psnr"] for log in logs for entry in log)
    ]
    if not levels:
        raise ValueError(
            "runs must validate a common noise level, got "
            + "; ".join(
                f"{run}: {', '.join(log[0]['psnr'])}"
                for run, log in zip(runs, logs, strict=True)
            )
            + "."
        )
    figure = Figure(figsize=(3.2 * len(levels) + 0.4, 3.0), layout="constrained")
    (axes,) = figure.subplots(1, len(levels), squeeze=False)
    for axis, level in zip(axes, levels, strict=True):
        hours, steps = 0.0, 0
        for i, (run, log) in enumerate(zip(runs, logs, strict=True)):
            x = [hours + entry["seconds"] / 3600 for entry in log]
            y = [entry["psnr"][level] for entry in log]
            axis.plot(x, y, ".-", color=f"C{i}", label=_name(run))
            hours, steps = x[-1], steps + log[-1]["step"]
        axis.set_title(f"noise {level}/255")
        axis.set_xlabel("hours")
        axis.grid(alpha=0.3)
        if gflop_per_step and hours:
            _add_compute(axis, 1e-6 * gflop_per_step * steps / hours)
    axes[0].set_ylabel("validation PSNR (dB)")
    if len(runs) > 1:
        axes[0].legend(fontsize="small")
    return figure


def _name(run: str | os.PathLike[str]) -> str:
    path = Path(run).resolve()
    if path.name == LOG:
        return path.parent.name
    return path.name if path.is_dir() else path.stem


def _add_compute(axis: Any, rate: float) -> None:
    """Adds computations as a second axis, ``rate`` PFLOP per hour."""
    second = axis.secondary_xaxis(
        "top", functions=(lambda hours: hours * rate, lambda pflop: pflop / rate)
    )
    second.set_xlabel("PFLOP")
