"""The memory of the process, as the C library handles it."""

from __future__ import annotations

import contextlib
import ctypes

#: From malloc.h.
_MAX_MAPPINGS, _MAPPING_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1

#: Size in bytes of a block from which it is returned all the same: kept, it would leave
#: a hole that smaller blocks take up, and the next one of its size would not fit.
LARGEST_KEPT = 2**28


def keep_freed_memory() -> None:
    """
    Makes the C library reuse the memory of large tensors, on Linux.

    glibc returns every block above 32 MB, and much of what lies below, to the system
    when it is freed, and clears it anew at the next use, which takes longer than most
    arithmetic on it. Afterwards only blocks above 256 MB are returned, with most C
    libraries. Call this once, before large images are reconstructed on a CPU.
    It concerns the whole process, which keeps the memory until it ends; therefore only
    the command line does it by itself. With another C library nothing happens.

    |sep|

    :Example:

    >>> import deepinv_deal
    >>> deepinv_deal.keep_freed_memory()
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # Old versions allow no such threshold; there, keep everything.
        if not mallopt(_MAPPING_THRESHOLD, LARGEST_KEPT):
            mallopt(_MAX_MAPPINGS, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
