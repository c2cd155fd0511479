"""Settings for a process that is ours alone: the command line, a benchmark's child. Call before torch is imported."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

# glibc's mallopt parameters
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
_LARGE_BYTES = 1 << 20


def prepare_process() -> None:
    """Keep idle matmul threads from burning the cores that readers need, and freed memory from staying with us.

    OpenMP's threads spin for milliseconds after each matmul by default; experts are read on the same cores meanwhile.
    A short spin still bridges the gap between two matmuls. What the user has set stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    with suppress(OSError, AttributeError, TypeError):  # glibc only
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
