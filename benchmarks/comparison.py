"""
Every model of this package beside what else there is, on the same measurements.

Denoising, deblurring, super-resolution, single-coil MRI and tomography of photographs.
Each method has one free parameter; it is chosen on other images, by the same search
with the same number of trials for all. Finished rows are kept in a file, and a second
call goes on where the first one ended.

    python benchmarks/comparison.py --baselines FOLDER --picture comparison.png

``FOLDER`` holds weights of others; without them their rows are left out, and the script
says so. Seconds are processor time with one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch
from _common import crop
from _rivals import OTHERS, OURS, Method, make_methods
from deepinv.loss.metric import PSNR, Metric
from deepinv.physics import Tomography
from torch import Tensor
from tqdm import tqdm

import deepinv_deal
from deepinv_deal import tune
from deepinv_deal._atomic import replacing
from deepinv_deal.evaluation import TASKS, Condition, Task, quality
from deepinv_deal.files import load_image_folder

#: Photographs of scikit-image: reported, and tuned on.
REPORTED = ("camera", "astronaut", "grass", "chelsea", "brick")
TUNING = ("coffee", "rocket")

#: Noise of deblurring, super-resolution and tomography, in gray levels: 0.01.
NOISE = 2.55


Image = tuple[str, Tensor]


# -- tasks ---------------------------------------------------------------------------


@lru_cache
def tomography(side: int) -> Tomography:
    """60 parallel-beam projections, of norm one."""
    with torch.random.fork_rng(devices=[]):  # deepinv finds the norm by chance
        torch.manual_seed(0)
        return Tomography(60, img_width=side, normalize=True)


def make_tasks() -> dict[str, Task]:
    """Returns the tasks, each with one condition."""
    blurred = TASKS["super-resolution-x2"](noise=[NOISE])
    (medium,) = (c for c in blurred.conditions if c.setting == "blur 1.2")
    scan = Condition("", NOISE, lambda x: tomography(x.shape[-1]))
    return {
        "denoising 5": TASKS["denoising"](noise=[5]),
        "denoising 15": TASKS["denoising"](noise=[15]),
        "denoising 25": TASKS["denoising"](noise=[25]),
        "deblurring": TASKS["deblurring"](kernels=["gaussian:1.6"], noise=[NOISE]),
        "super-res. x2": replace(blurred, conditions=(medium,)),
        "MRI 4x": TASKS["mri-single-coil-4x"](),
        "MRI 8x": TASKS["mri-single-coil-8x"](),
        "CT, 60 angles": Task("tomography", (scan,)),
    }


def photographs(names: Sequence[str], side: int, folder: Path | None) -> list[Image]:
    """Returns the central squares of photographs, or of the images of a folder."""
    if folder is None:
        return [(name, crop(name, side)[0]) for name in names]
    images = []
    for name, x in load_image_folder(folder, 1, progress=False):
        top, left = ((n - side) // 2 for n in x.shape[-2:])
        if min(top, left) < 0:
            raise ValueError(f"{name} is smaller than {side} x {side} pixels.")
        images.append((name, x[..., top : top + side, left : left + side]))
    return images


def fingerprint(y: Tensor) -> str:
    """Tells measurements apart."""
    return hashlib.sha256(y.contiguous().numpy().tobytes()).hexdigest()[:12]


# -- one row -------------------------------------------------------------------------


def tuned_weight(
    method: Method, task: Task, images: Sequence[Image], max_trials: int
) -> tuple[float, list[list[float]]]:
    """Returns the free parameter with the best mean PSNR, and what was tried."""
    if not method.tuned:
        return 1.0, []

    def compared(x_hat: Tensor, x: Tensor) -> Tensor:
        return PSNR()(task.compare(x_hat).clamp(0, 1), task.compare(x))

    metric = Metric(metric=compared)
    metric.lower_better = False
    truths = [task.ground_truth(x) for _, x in images]
    measured = [task.conditions[0].measure(x) for x in truths]
    batch = torch.cat(truths), torch.cat([y for y, _ in measured])
    result = tune(
        method,
        measured[0][1],
        [batch],
        metric=metric,
        lambda_reg=method.start,
        spread=method.spread,
        precision=method.spread**0.5,
        max_trials=max_trials,
        progress=False,
    )
    return result.lambda_reg, [[t.lambda_reg, t.score] for t in result.trials]


@torch.no_grad()
def run_row(
    method: Method,
    task: Task,
    images: Sequence[Image],
    tuning: Sequence[Image],
    max_trials: int,
) -> dict[str, Any]:
    """Tunes a method, and reports it on other images; one entry for each of them."""
    weight, trials = tuned_weight(method, task, tuning, max_trials)
    row: dict[str, Any] = {"weight": weight, "trials": trials, "images": []}
    for name, image in images:
        x = task.ground_truth(image)
        y, physics = task.conditions[0].measure(x)
        start = time.process_time()
        solution = method.solve(y, physics, weight)
        seconds = time.process_time() - start
        psnr, ssim = quality(task.compare(solution.x), task.compare(x))
        row["images"].append(
            {
                "name": name,
                "measurements": fingerprint(y),
                "psnr": psnr,
                "ssim": ssim,
                "seconds": seconds,
                "n_iter": solution.n_iter,
                "converged": solution.converged,
            }
        )
    return row


# -- all rows ------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What the seconds depend on."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            n.split(":")[1].strip() for n in lines if n.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    versions = {m.__name__: m.__version__ for m in (torch, dinv, deepinv_deal)}
    return {"processor": name, "python": platform.python_version(), **versions}


class Store:
    """
    The rows that are done, in a JSON file.

    :param pathlib.Path path: the file.
    :param dict settings: what rows depend on; those of other settings do not count.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "rows": {}}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != settings:
                raise ValueError(
                    f"{path} holds rows of other settings. Give another --json, or "
                    "remove it."
                )
            self.content = found

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows by task, then by method."""
        rows: dict[str, dict[str, Any]] = self.content["rows"]
        return rows

    def add(self, task: str, method: str, row: dict[str, Any]) -> None:
        """Writes a row."""
        self.rows.setdefault(task, {})[method] = row
        self.content["machine"] = machine()
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1), encoding="utf-8")


def check_measurements(rows: dict[str, Any]) -> None:
    """
    Checks that all methods of a task saw the same.

    :raises AssertionError: if not.
    """
    seen = {
        tuple((image["name"], image["measurements"]) for image in row["images"])
        for row in rows.values()
    }
    if len(seen) > 1:
        raise AssertionError("The methods did not get the same measurements.")


def compare(args: argparse.Namespace) -> Store:
    """Runs what is not done yet."""
    names = args.only or list(make_tasks())
    settings = {
        "size": args.size,
        "tuning_size": args.tuning_size,
        "trials": args.trials,
        "data": args.data and str(args.data),
        "tune": args.tune and str(args.tune),
        "number": args.number,
    }
    store = Store(args.json, settings)
    tasks = {name: task for name, task in make_tasks().items() if name in names}
    images = photographs(REPORTED, args.size, args.data)[: args.number]
    tuning = photographs(TUNING, args.tuning_size, args.tune)
    rows = []
    for name, task in tasks.items():
        methods, missing = make_methods(task, args.baselines)
        rows += [(name, task, m, make) for m, make in methods.items()]
    if missing:
        print("Left out:", "; ".join(missing))
    if args.methods:
        rows = [row for row in rows if row[2] in args.methods]
    rows = [row for row in rows if row[2] not in store.rows.get(row[0], {})]
    if args.report:
        print(f"Not done: {len(rows)} rows")
        rows = []
    bar = tqdm(rows, "Rows", disable=None if args.progress is None else False)
    for name, task, method, make in bar:
        bar.set_postfix_str(f"{name}: {method}")
        row = run_row(make(), task, images, tuning, args.trials)
        store.add(name, method, row)
        if args.verbose:
            print(f"{name}: {method}: {_shown(row)}", flush=True)
    for done in store.rows.values():
        check_measurements(done)
    return store


# -- what is printed and drawn -------------------------------------------------------


def mean(row: dict[str, Any], name: str) -> float:
    """Mean over the images; NaN where there is no number."""
    values = [image[name] for image in row["images"]]
    if None in values:
        return float("nan")
    return float(sum(values) / len(values))


def _shown(row: dict[str, Any]) -> str:
    return (
        f"{mean(row, 'psnr'):.2f} dB, SSIM {mean(row, 'ssim'):.3f}, "
        f"{mean(row, 'seconds'):.2f} s, {iterations(row)} iterations, weight "
        f"{row['weight']:.3g}, tried "
        + " ".join(f"{w:.3g}:{s:.2f}" for w, s in row["trials"])
    )


def iterations(row: dict[str, Any]) -> str:
    """Mean number of iterations; with a star where not all images converged."""
    number = mean(row, "n_iter")
    if number != number:
        return ""
    converged = [image["converged"] for image in row["images"]]
    if None in converged:
        return f"{number:.0f} fixed"
    return f"{number:.0f}" + r"\*" * (not all(converged))


def table(rows: dict[str, dict[str, Any]], cell: Any, lead: bool = False) -> str:
    """
    Returns a table, methods by tasks, in reStructuredText.

    :param dict rows: by task, then by method.
    :param Callable cell: text of a row.
    :param bool lead: add how far the best of ours is above the best of others, in dB.
    """
    tasks = [name for name in make_tasks() if name in rows]
    methods = [m for m in (*OURS, *OTHERS) if any(m in rows[t] for t in tasks)]
    cells = [["method", *tasks]]
    for method in methods:
        found = (rows[t].get(method) for t in tasks)
        cells.append([method, *(cell(row) if row else "" for row in found)])
    if lead:
        cells.append(["lead of ours", *(_lead(rows[t], methods) for t in tasks)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(tasks) + 1)]
    rule = "  ".join("=" * width for width in widths)
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def _lead(rows: dict[str, Any], methods: Sequence[str]) -> str:
    if any(name not in rows for name in methods):
        return ""  # not all are done
    ours, others = (
        max(mean(rows[name], "psnr") for name in methods if name in names)
        for names in (OURS, OTHERS)
    )
    return f"{ours - others:+.2f}"


def report(store: Store, only: Sequence[str] | None = None) -> str:
    """Returns all tables, of some tasks on request."""
    rows = {name: row for name, row in store.rows.items() if name in (only or [name])}
    parts = {
        "PSNR in dB": lambda row: f"{mean(row, 'psnr'):.2f}",
        "SSIM": lambda row: f"{mean(row, 'ssim'):.3f}",
        "Seconds": lambda row: f"{mean(row, 'seconds'):.2f}",
        "Iterations, with a star where not all images converged": iterations,
        "The free parameter": lambda row: f"{row['weight']:.3g}",
    }
    return "\n\n".join(
        f"**{name}**\n\n{table(rows, cell, lead=name.startswith('PSNR'))}"
        for name, cell in parts.items()
    )


def draw(store: Store, args: argparse.Namespace, name: str, path: Path) -> None:
    """Draws the reconstructions of the first image of a task side by side."""
    from matplotlib.figure import Figure

    task, rows = make_tasks()[name], store.rows[name]
    image = photographs(REPORTED, args.size, args.data)[0]
    x = task.ground_truth(image[1])
    y, physics = task.conditions[0].measure(x)
    makers, _ = make_methods(task, args.baselines)
    shown = {"ground truth": task.compare(x)}
    for method in (*OTHERS, *OURS):
        if method in rows and method in makers:
            with torch.no_grad():
                x_hat = makers[method]().solve(y, physics, rows[method]["weight"]).x
            psnr = quality(task.compare(x_hat), task.compare(x))[0]
            shown[f"{method}, {psnr:.2f}"] = task.compare(x_hat)
    columns = 5
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (title, picture) in zip(axes, shown.items(), strict=False):
        axis.imshow(picture[0, 0].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> Store:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--size", type=int, default=48, help="side of the images")
    parser.add_argument("--tuning-size", type=int, default=48, help="of those tuned on")
    parser.add_argument("--number", type=int, default=3, help="images to report")
    parser.add_argument("--trials", type=int, default=4, help="for every method")
    parser.add_argument("--data", type=Path, help="folder of images to report")
    parser.add_argument("--tune", type=Path, help="folder of images to tune on")
    parser.add_argument("--baselines", type=Path, help="folder of others' weights")
    parser.add_argument("--only", nargs="+", metavar="TASK", choices=list(make_tasks()))
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", choices=[*OURS, *OTHERS]
    )
    parser.add_argument("--json", type=Path, default=Path("comparison.json"))
    parser.add_argument("--tables", type=Path, help="file for the tables, too")
    parser.add_argument("--picture", type=Path, help="file for the reconstructions")
    parser.add_argument("--picture-task", default="MRI 4x", metavar="TASK")
    parser.add_argument("--report", action="store_true", help="only what is done")
    parser.add_argument("--small", action="store_true", help="tiny images, to try it")
    parser.add_argument("--verbose", action="store_true", help="print every row")
    parser.add_argument("--progress", action="store_true", default=None)
    args = parser.parse_args(arguments)
    if args.small:
        args.size, args.tuning_size, args.number, args.trials = 16, 16, 1, 2
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for what is not torch
    with warnings.catch_warnings():
        # Both are in the tables: who converged, and that all have few trials.
        warnings.simplefilter("ignore", deepinv_deal.ConvergenceWarning)
        warnings.filterwarnings("ignore", "Tuning stopped at max_trials")
        store = compare(args)
    tables = report(store, args.only)
    print(tables)
    if args.tables:
        args.tables.write_text(tables + "\n", encoding="utf-8")
    if args.picture:
        draw(store, args, args.picture_task, args.picture)
    return store


if __name__ == "__main__":
    main()
