"""Counts what each access found by what had brought its expert in. A constant cost each, and none where nobody asks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finemoe.metrics import COUNTS, ExplainRow
from finemoe.policy.cache_state import ABSENT, LOADING, RESIDENT

DEMAND, KEPT = 0, 1  # then, of prefetches, the distance plus KEPT; then those for the next iteration
PREDICTED, HITS, LATE, MISSES, WASTED = range(len(COUNTS))


class SourceCounts:
    """What a controller tells of its cache, kept for `ExplainRow`.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._experts = experts
        self._next = layers + KEPT + 1
        self._gate = -1  # the layer whose gate spoke last; -1 before the first of an iteration
        self._source: npt.NDArray[np.int32] = np.zeros(layers * experts, np.int32)  # what brought each expert in
        self.counts: npt.NDArray[np.int64] = np.zeros((layers, self._next + 1, len(COUNTS)), np.int64)

    def begin(self) -> None:
        """An iteration begins."""
        self._gate = -1

    def gate(self, layer: int) -> None:
        """A layer's routing is known."""
        self._gate = layer

    def access(self, index: int, status: int, *, unused_prefetch: bool) -> None:
        """An expert is needed, and was found so; `unused_prefetch` if it was prefetched and not needed before."""
        source = int(self._source[index])
        if status == ABSENT:
            self._count(index, DEMAND, MISSES)
        else:
            kept = source if unused_prefetch else min(source, KEPT)
            self._count(index, kept, HITS if status == RESIDENT else LATE)

    def prefetched(self, index: int) -> None:
        """A prefetch begins."""
        ahead = index // self._experts - self._gate
        source = ahead + KEPT if ahead > 0 else self._next
        self._source[index] = source
        self._count(index, source, PREDICTED)

    def demanded(self, index: int) -> None:
        """An urgent fetch begins."""
        self._source[index] = DEMAND

    def wasted(self, index: int) -> None:
        """A prefetch was evicted or withdrawn without having been needed."""
        self._count(index, int(self._source[index]), WASTED)

    def explained(self) -> tuple[ExplainRow, ...]:
        """All counts that are not 0, by layer, then by source."""
        rows = []
        for layer, source in np.argwhere(self.counts.sum(axis=2)).tolist():
            counted = dict(zip(COUNTS, self.counts[layer, source].tolist(), strict=True))
            if source == DEMAND:
                rows.append(ExplainRow(layer, "demand", None, **counted))
            elif source == KEPT:
                rows.append(ExplainRow(layer, "kept", None, **counted))
            elif source == self._next:
                rows.append(ExplainRow(layer, "prefetch-next", None, **counted))
            else:
                rows.append(ExplainRow(layer, "prefetch", source - KEPT, **counted))
        return tuple(rows)

    def _count(self, index: int, source: int, what: int) -> None:
        self.counts[index // self._experts, source, what] += 1


MISSES, LATE, HITS = ABSENT, LOADING, RESIDENT  # an access is counted by what it found
PREFETCHED, WASTED = 3, 4


class ExpertCounts:
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
