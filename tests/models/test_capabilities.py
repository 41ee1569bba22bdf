"""
What every model can do: one table, of which every cell is tried out.

``python tests/models/test_capabilities.py`` writes it into the user guide.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import capabilities as can  # noqa: E402 - it lies beside the folder of this file
from capabilities import COLUMNS, DICTIONARIES, L1  # noqa: E402

PAGE = ROOT / "docs" / "user_guide" / "capabilities.rst"

Refusals = dict[str, tuple[type[Exception], str]]


def refused(names, error, message) -> Refusals:
    return dict.fromkeys(names, (error, message))


def no_setting(*names: str) -> Refusals:
    return refused(names, ValueError, "is no setting of")


NONE_FOR_L1 = no_setting(*L1, *DICTIONARIES)

#: The rows: what is tried, and which models refuse it with which error.
ROWS: dict[str, tuple[Callable[[str], None], Refusals]] = {
    "Denoising": (can.denoises, {}),
    "Any linear physics": (can.solves_any_linear_physics, {}),
    "Noise level from the physics": (can.takes_the_level_of_the_physics, {}),
    'Noise level ``"estimate"``': (can.estimates_the_level, {}),
    "No noise level": (
        can.needs_no_level,
        refused(["DEAL"], ValueError, "sigma is missing"),
    ),
    "``lambda_reg``, also per sample": (can.takes_a_weight, {}),
    '``lambda_mode="relative"``': (
        can.takes_relative_weights,
        refused(DICTIONARIES, ValueError, "lambda_mode='relative'.*threshold"),
    ),
    "``bounds``": (can.keeps_bounds, {}),
    "Gradients with ``bounds``": (can.differentiates_with_bounds, {}),
    '``scale="auto"``': (can.rescales_by_itself, {}),
    "``scale`` as a number": (can.takes_a_scale, {}),
    '``complex_mode="real_imag"``, ``"real"``': (can.takes_complex_pairs, {}),
    "Complex numbers": (can.takes_complex_numbers, {}),
    "Volumes and series, ``slices``": (can.takes_volumes, {}),
    'Volumes with ``slices="mean"``': (can.takes_all_orientations, {}),
    "``init`` by name, image, function": (can.starts_anywhere, {}),
    "``x_gt``, ``compute_metrics``": (can.computes_metrics, {}),
    "``return_info``": (can.reports, {}),
    "``info.mask``": (
        can.shows_masks,
        refused(DICTIONARIES, AttributeError, "num_filters|no mask"),
    ),
    "Exact gradients": (can.differentiates_exactly, {}),
    "Jacobian-free gradients": (can.differentiates_without_jacobian, {}),
    "Trainable ``lambda_reg``, ``sigma``": (can.trains_hyperparameters, {}),
    "``anderson``": (can.option_changes_the_way(anderson=0), NONE_FOR_L1),
    "``preconditioner``": (
        can.option_changes_the_way(preconditioner="diagonal"),
        NONE_FOR_L1,
    ),
    "``inner_dtype``": (
        can.option_changes_the_way(inner_dtype=torch.bfloat16),
        NONE_FOR_L1,
    ),
    "``forcing``": (
        can.option_changes_the_way(forcing=0.01),
        no_setting(*DICTIONARIES),
    ),
    "``examine``": (can.knows_a_physics, {}),
    "Batches equal their samples": (can.batches, {}),
    "``strict``": (can.is_strict, {}),
    "``show_progress_bar``": (can.shows_progress, {}),
}


def cell(row: str, name: str) -> str:
    refusal = ROWS[row][1].get(name)
    return "yes" if refusal is None else refusal[0].__name__


def page() -> str:
    """The page of the user guide."""
    lines = [
        ".. Written by tests/models/test_capabilities.py, which tries every cell.",
        "",
        "What every model can do",
        "=======================",
        "",
        "All models share calls and settings. What a model does not have raises the",
        "error that is named here. CPR and NCPR are",
        ":class:`deepinv_deal.SmoothPlusSparse`. Every cell is a test.",
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
        "   * -",
        *(f"     - {name}" for name in COLUMNS),
    ]
    for row in ROWS:
        lines += [f"   * - {row}", *(f"     - {cell(row, n)}" for n in COLUMNS)]
    return "\n".join(lines) + "\n"


#: MMR and NCPR run the code of SAFI and CPR, for longer.
CELLS = [
    pytest.param(row, name, marks=[pytest.mark.slow] * (name in ("MMR", "NCPR")))
    for row in ROWS
    for name in COLUMNS
]


@pytest.mark.parametrize(("row", "name"), CELLS)
def test_every_cell(row, name):
    check, refusals = ROWS[row]
    if name in refusals:
        error, message = refusals[name]
        with pytest.raises(error, match=message):
            check(name)
    else:
        check(name)


def test_the_user_guide_has_this_table():
    assert PAGE.read_text() == page(), "run python tests/models/test_capabilities.py"


if __name__ == "__main__":
    PAGE.write_text(page())
