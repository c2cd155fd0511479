"""A stand-in for `model.finemoe` whose state the test sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from finemoe.metrics import PerExpert, Stats
from tests.serving.serve import STATS


class FakeModelHandle:
    """A `StatsProvider`; `sizes` are the numbers of experts of each layer."""

    def __init__(self, *sizes: int) -> None:
        shape = len(sizes), max(sizes)
        zeros = {name: np.zeros(shape, np.int64) for name in ("hits", "late", "misses", "prefetched", "wasted")}
        self.state = np.zeros(shape, np.uint8)
        self.pinned = np.zeros(shape, np.bool_)
        self.counts = zeros
        self.sizes = sizes
        self.figures = replace(STATS, layers=len(sizes), experts=sum(sizes), expert_bytes=1000, expert_memory_bytes=400)
        self.watched = self.taken = 0

    def watch(self) -> None:
        self.watched += 1

    def experts(self) -> PerExpert:
        self.taken += 1
        copies = {name: counts.copy() for name, counts in self.counts.items()}
        return PerExpert(tuple(self.sizes), self.state.copy(), self.pinned.copy(), **copies)

    def stats(self) -> Stats:
        return self.figures

    def advance(self, **figures: Any) -> None:
        """Adds to the totals."""
        self.figures = replace(self.figures, **{name: getattr(self.figures, name) + n for name, n in figures.items()})
