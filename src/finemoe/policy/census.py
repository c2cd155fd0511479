"""Counts each expert on its own: what its accesses found, and what became of its prefetches. A constant cost each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finemoe.policy.book import ABSENT, LOADING, RESIDENT

MISSES, LATE, HITS = ABSENT, LOADING, RESIDENT  # an access is counted by what it found
PREFETCHED, WASTED = 3, 4


class Census:
    """What a controller tells of its cache, expert by expert.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros((5, layers * experts), np.int64)

    def access(self, index: int, status: int) -> None:
        """An expert is needed, and was found so."""
        self.counts[status, index] += 1

    def prefetched(self, index: int) -> None:
        """A prefetch begins."""
        self.counts[PREFETCHED, index] += 1

    def wasted(self, index: int) -> None:
        """A prefetch was evicted or withdrawn without having been needed."""
        self.counts[WASTED, index] += 1
