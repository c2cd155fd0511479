"""Memory brought in ahead of its first use, so that no request waits for the kernel to find and clear its pages.

A first touch costs a tenth of a second a GiB where memory is at hand, and seconds where a virtual machine has given its
free memory back to the host (docs/results): far more than to read an expert into it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count

import numpy as np
from numpy.typing import NDArray

from finemoe.process import available_cores

_MADV_POPULATE_WRITE = 23  # Linux 5.14; leaves what is in the pages as it is
_CHUNK_BYTES = 16 << 20
_MOST_THREADS = 4


class Prefault:
    """Brings memory in, from its start on, on threads that begin at once. The memory may be used meanwhile.

    Without effect where the kernel can't be asked.

    Args:
        memory: page-aligned, `[n]`.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory  # keeps it mapped
        self._next = count(0, _CHUNK_BYTES)  # taking from it is atomic
        self._over = threading.Event()
        advise = _madvise()
        chunks = -(-len(memory) // _CHUNK_BYTES)
        threads = 0 if advise is None else min(chunks, available_cores(), _MOST_THREADS)
        self._threads = [
            threading.Thread(target=self._run, args=(advise,), name="finemoe-prefault", daemon=True)
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until all of it is there."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Leave the rest as it is, and let go of the memory. Returns once no thread is at work."""
        self._over.set()
        self.wait()
        self._memory = self._memory[:0].copy()

    def _run(self, advise: Callable[..., int]) -> None:
        address = self._memory.ctypes.data
        for start in self._next:
            length = min(_CHUNK_BYTES, len(self._memory) - start)
            if length <= 0 or self._over.is_set():
                return
            if advise(ctypes.c_void_p(address + start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE) != 0:
                return  # an older kernel: the first use brings it in


def _madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    with suppress(OSError, AttributeError):
        found: Callable[..., int] = ctypes.CDLL(None).madvise  # mmap's own holds the GIL
        return found
    return None
