"""Pages and scripts that state what the package does cannot go stale."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def script(name):
    """A script of the folder benchmarks, as a module."""
    path = ROOT / "benchmarks" / f"{name}.py"
    if not path.exists():
        pytest.skip("the scripts are not part of this distribution")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_of_errors_is_what_happens():
    errors = script("errors")
    # If this fails on purpose: python benchmarks/errors.py
    assert errors.PAGE.read_text().splitlines() == errors.page().splitlines()


def test_every_fault_of_the_mutation_check_can_be_made():
    mutations = script("mutations")
    assert len(mutations.FAULTS) >= 10
    for fault in mutations.FAULTS:
        text = (ROOT / "deepinv_deal" / fault.file).read_text()
        assert text.count(fault.before) == 1, fault.name
        for test in fault.tests:
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test
