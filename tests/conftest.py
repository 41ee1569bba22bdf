"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os

import pretend_accelerator
import pytest
import torch
from hypothesis import settings

# The same examples in every run: a failure that comes and goes helps nobody.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; threads on top of that only wait for each other.
    torch.set_num_threads(1)


if pretend_accelerator.AVAILABLE:
    # The first backward pass of a process fixes which devices there are.
    pretend_accelerator.register()


def pytest_runtest_setup():
    """The same weights for new models whatever ran before, here or in a worker."""
    torch.manual_seed(0)


@pytest.fixture
def rng() -> torch.Generator:
    """A freshly seeded random generator."""
    return torch.Generator().manual_seed(20250101)
