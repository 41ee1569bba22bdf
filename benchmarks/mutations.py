"""
Does the test suite notice a wrong formula? Deliberate faults, one at a time.

Each fault is one replacement in a copy of the package; a few named tests are run
against the copy, and the table says which of them failed. A fault that no test notices,
or whose text no longer occurs exactly once, ends the script with an error.

    python benchmarks/mutations.py [--only kappa]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    """One wrong formula: ``before`` in ``file`` becomes ``after``; ``tests`` notice."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "sign of the regularizer",
        "problems/quadratic.py",
        "self.data_force - self.force",
        "self.data_force + self.force",
        ("models/test_deal.py::test_convergence_means_that_the_forces_balance",),
    ),
    Fault(
        "counts divided by the gain once too often",
        "problems/likelihood.py",
        "/ self._variance(n) / parameter(self.gain, u)",
        "/ self._variance(n) / parameter(self.gain, u).square()",
        (
            "equations/test_likelihood.py"
            "::test_value_and_derivative_are_those_of_the_data_fidelity",
        ),
    ),
    Fault(
        "scale left out of the adjoint of a likelihood",
        "problems/likelihood_term.py",
        "x * expand(self.scale, x)\n        return x if self.factor",
        "x\n        return x if self.factor",
        ("models/test_likelihoods.py::test_scaling_law",),
    ),
    Fault(
        "curvature of a likelihood instead of its second derivative",
        "problems/likelihood_term.py",
        "self.likelihood.slope(self._predict(x.detach()), self.y)",
        "self.likelihood.curvature(self._predict(x.detach()), self.y)",
        ("models/test_likelihoods_of_families.py::test_gradients",),
    ),
    Fault(
        "correlated noise mixed by the transposed root",
        "problems/likelihood.py",
        "mixed(self.root.mH, v, self.dim)",
        "mixed(self.root, v, self.dim)",
        ("models/test_likelihoods.py::test_noise_that_is_correlated_between_coils",),
    ),
    Fault(
        "kernels of the adjoint not transposed",
        "operators/multi_conv.py",
        "Convolution(kernel.flip(-2, -1).transpose(0, 1))\n            for",
        "Convolution(kernel.transpose(0, 1))\n            for",
        ("operators/test_multi_conv.py::test_adjoint_matches_in_inner_products",),
    ),
    Fault(
        "mask not squared",
        "problems/quadratic.py",
        "self.squared_mask = equation.regularizer.squared_mask(x)",
        "self.squared_mask = equation.regularizer.mask(x)",
        ("models/test_deal.py::test_convergence_means_that_the_forces_balance",),
    ),
    Fault(
        "weight of the regularizer",
        "problems/quadratic.py",
        "expand(self.lambda_reg, x) * regularizer.normal",
        "expand(self.lambda_reg.sqrt(), x) * regularizer.normal",
        (
            "models/test_deal.py"
            "::test_scaled_operator_with_scaled_weight_gives_the_same_image",
        ),
    ),
    Fault(
        "no warm start of the image",
        "problems/synthesis_solvers.py",
        "problem.image_of(new_synthesis, init=image)",
        "problem.image_of(new_synthesis)",
        ("equations/test_synthesis.py::test_image_solves_start_at_the_last_image",),
    ),
    Fault(
        "tolerance compared with the squared norm",
        "solvers/conjugate_gradient.py",
        "nonzero.to(b_norm.dtype) * rtol,",
        "nonzero.to(b_norm.dtype) * rtol**0.5,",
        (
            "solvers/test_conjugate_gradient.py"
            "::test_stops_at_the_first_iterate_within_the_tolerance",
        ),
    ),
    Fault(
        "samples that have stopped move on",
        "solvers/picard.py",
        "x=select(working, moved, x),",
        "x=moved,",
        (
            "solvers/test_fixed_point.py"
            "::test_samples_that_stopped_stay_even_if_the_inner_solver_moves_them",
        ),
    ),
    Fault(
        "inner product not conjugated",
        "_batch.py",
        "(a * b.conj()).real",
        "(a * b).real",
        ("solvers/test_conjugate_gradient.py::test_hermitian_systems_are_solved",),
    ),
    Fault(
        "bounds ignored",
        "problems/l1.py",
        "return clamp(x, self.bounds)",
        "return x",
        ("models/test_safi.py::test_the_result_solves_the_frozen_problem_at_itself",),
    ),
    Fault(
        "kappa ignored",
        "priors/attentive_quadratic.py",
        "weight = self.default_lambda(sigma, data.b)",
        "weight = torch.ones_like(data.b[:, 0, 0, 0])",
        ("models/test_deal.py::test_denoising_uses_the_learned_weight_unless_given",),
    ),
)


def mutate(root: Path, fault: Fault) -> None:
    """Applies a fault to the copy of the package under ``root``."""
    path = root / "deepinv_deal" / fault.file
    text = path.read_text()
    if text.count(fault.before) != 1:
        raise SystemExit(
            f"{fault.name}: {fault.before!r} occurs {text.count(fault.before)} times "
            f"in {fault.file}, expected once. Update benchmarks/mutations.py."
        )
    path.write_text(text.replace(fault.before, fault.after))


def failures(root: Path, tests: tuple[str, ...]) -> list[str]:
    """Runs tests against the copy and returns the names of those that failed."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p"]
        + ["no:xdist", *(f"tests/{test}" for test in tests)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode not in (0, 1):  # tests passed, tests failed
        raise SystemExit(f"The tests did not run:\n{run.stdout}{run.stderr}")
    return re.findall(r"^FAILED \S*::(\w+)", run.stdout, re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.only in fault.name]
    missed = []
    print(f"{'fault':42} noticed by")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("deepinv_deal", "tests"):
            shutil.copytree(ROOT / part, root / part)
        shutil.copy(ROOT / "pyproject.toml", root)
        everything = tuple(dict.fromkeys(t for fault in faults for t in fault.tests))
        if failed := failures(root, everything):
            raise SystemExit(f"Without any fault, these fail: {', '.join(failed)}")
        for fault in faults:
            path = root / "deepinv_deal" / fault.file
            sound = path.read_text()
            mutate(root, fault)
            noticed = sorted(set(failures(root, fault.tests)))
            path.write_text(sound)
            print(f"{fault.name:42} {', '.join(noticed) or 'NOTHING'}", flush=True)
            missed += [] if noticed else [fault.name]
    if missed:
        raise SystemExit(f"Not noticed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
