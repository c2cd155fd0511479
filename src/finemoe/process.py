"""Settings for a process that is ours alone: the command line, a benchmark's child. Call before torch is imported."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

# OpenMP's idle threads spin for milliseconds after each matmul by default, on the cores that readers need meanwhile.
# A short spin still bridges the gap between two matmuls.
_SETTINGS = {"GOMP_SPINCOUNT": "20000"}
# glibc's mallopt parameters
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
_LARGE_BYTES = 1 << 20


def prepare_process() -> None:
    """Keep idle matmul threads off the readers' cores, and freed memory from staying with us.

    What the user has set stays.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    return_freed_memory()


def return_freed_memory() -> None:
    """Let glibc give large blocks back when they are freed. Without effect on other platforms."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def environment(*, prepared: bool) -> dict[str, str]:
    """The environment for a child: with our settings, or as if `prepare_process` had never been called here."""
    plain = {name: value for name, value in os.environ.items() if _SETTINGS.get(name) != value}
    return _SETTINGS | plain if prepared else plain
