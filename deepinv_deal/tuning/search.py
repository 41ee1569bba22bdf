"""The search on a logarithmic scale, which knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

#: Evaluations allowed if ``max_trials`` is not given, by number of parameters.
DEFAULT_MAX_TRIALS = {1: 15, 2: 60}


@dataclass(frozen=True)
class Search:
    r"""
    How far, how finely and how long :func:`tune` searches.

    :param float spread: first factor :math:`g` between neighbouring settings.
    :param float precision: last factor :math:`g`.
    :param int max_trials: largest number of settings; if ``None``, 15, or 60 for two
        parameters.
    :param bool batch_candidates: solve the candidates of a grid as one batch, with the
        same result; for images that are small for the machine. Each physics must serve
        batches larger than its data's.
    """

    spread: float = 4.0
    precision: float = 1.2
    max_trials: int | None = None
    batch_candidates: bool = False

    def __post_init__(self) -> None:
        if not math.inf > self.spread >= self.precision > 1:
            raise ValueError(
                "spread and precision are factors with spread >= precision > 1, got "
                f"spread={self.spread}, precision={self.precision}."
            )
        if self.max_trials is not None and self.max_trials < 1:
            raise ValueError(f"max_trials must be at least 1, got {self.max_trials}.")

    def budget(self, num_parameters: int) -> int:
        """Returns the largest number of settings."""
        if self.max_trials is None:
            return DEFAULT_MAX_TRIALS[num_parameters]
        return self.max_trials


def minimise(
    evaluate: Callable[[Sequence[np.ndarray]], list[float]],
    centre: np.ndarray,  # (n,) logarithms
    steps: np.ndarray,  # (n,)
    precision: float,
    budget: int,
) -> bool:
    """
    Minimises over 3^n points that move and contract; returns whether it ended itself.

    :param Callable evaluate: returns the costs of some points ``(n,)``.
    :param numpy.ndarray centre: first point.
    :param numpy.ndarray steps: first distances of the points from it.
    :param float precision: last distance in the first direction.
    :param int budget: largest number of points.
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
            last = vertex(np.array(offsets, float), np.array(values))
            return last is None or visit([centre + steps * last]) is not None


def vertex(points: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """
    Returns where the quadratic fitted to values is smallest, ``None`` if not convex.

    :param numpy.ndarray points: where the values are, ``(k, n)``.
    :param numpy.ndarray values: the values, ``(k,)``.
    :return: the place, moved into the cube from -1 to 1.
    """
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
