"""Whether freed memory is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Counts the pages that the system provides for an array of 48 MB, made five times.
SCRIPT = """
import resource
import numpy as np
import deepinv_deal

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(6 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = pages()
deepinv_deal.keep_freed_memory()
pages()
print(plain, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_memory_of_large_arrays_is_used_again():
    command = [sys.executable, "-c", SCRIPT]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    plain, kept = map(int, found.stdout.split())
    assert kept < plain / 4
