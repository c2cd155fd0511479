"""Settings for a process that is ours alone: the command line, a benchmark's child."""

from __future__ import annotations

import ctypes
from contextlib import suppress

# glibc's mallopt parameters
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
_LARGE_BYTES = 1 << 20


def return_freed_memory() -> None:
    """Let glibc give large blocks back when they are freed. Without effect on other platforms."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
