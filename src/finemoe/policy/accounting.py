"""Optional statistics of the cache: accesses and prefetches by expert, and by what loaded the expert.

`CacheManager` updates them in constant time per access; both are off by default.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finemoe.metrics import COUNTS, ExplainRow
from finemoe.policy.cache_state import ABSENT, LOADING, RESIDENT

MISSES, LATE, HITS = ABSENT, LOADING, RESIDENT  # an access is counted by the status that it found
PREFETCHED, WASTED = 3, 4


class ExpertCounts:
    """Counts per expert.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.

    Attributes:
        counts: `[5, L * E]`, rows `MISSES`, `LATE`, `HITS`, `PREFETCHED`, `WASTED`.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros((5, layers * experts), np.int64)

    def access(self, index: int, status: int) -> None:
        """A layer needs the expert, which has this status."""
        self.counts[status, index] += 1

    def prefetched(self, index: int) -> None:
        """A prefetch begins."""
        self.counts[PREFETCHED, index] += 1

    def wasted(self, index: int) -> None:
        """A prefetch was evicted or cancelled unused."""
        self.counts[WASTED, index] += 1


_DEMAND, _KEPT = 0, 1  # sources; then `_KEPT + d`: prefetched d layers ahead; then: prefetched for the next iteration
_PREDICTED_COLUMN, _HIT_COLUMN, _LATE_COLUMN, _MISS_COLUMN, _WASTED_COLUMN = range(len(COUNTS))


class SourceCounts:
    """Counts per layer and source, i.e. what loaded the expert that an access finds (`--explain`).

    Sources: a demand load, a prefetch for a layer d ahead in the same iteration, a prefetch for the next iteration.
    From its second access on, an expert loaded by prefetch counts as kept.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.

    Attributes:
        counts: `[L, L + 3, len(COUNTS)]`: layer, source, column of `metrics.COUNTS`.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._experts = experts
        self._next_iteration = layers + _KEPT + 1
        self._current_layer = -1  # of this iteration's latest routing; -1 before the first
        self._source: npt.NDArray[np.int32] = np.zeros(layers * experts, np.int32)  # what loaded each expert last
        self.counts: npt.NDArray[np.int64] = np.zeros((layers, self._next_iteration + 1, len(COUNTS)), np.int64)

    def begin(self) -> None:
        """An iteration begins."""
        self._current_layer = -1

    def routed(self, layer: int) -> None:
        """The routing of a layer is known."""
        self._current_layer = layer

    def access(self, index: int, status: int, *, unused_prefetch: bool) -> None:
        """A layer needs the expert, which has this status; `unused_prefetch` as in `CacheState`."""
        source = int(self._source[index])
        if status == ABSENT:
            self._count(index, _DEMAND, _MISS_COLUMN)
        else:
            found = source if unused_prefetch else min(source, _KEPT)
            self._count(index, found, _HIT_COLUMN if status == RESIDENT else _LATE_COLUMN)

    def prefetched(self, index: int) -> None:
        """A prefetch begins."""
        distance = index // self._experts - self._current_layer
        source = distance + _KEPT if distance > 0 else self._next_iteration
        self._source[index] = source
        self._count(index, source, _PREDICTED_COLUMN)

    def demanded(self, index: int) -> None:
        """A demand load begins."""
        self._source[index] = _DEMAND

    def wasted(self, index: int) -> None:
        """A prefetch was evicted or cancelled unused."""
        self._count(index, int(self._source[index]), _WASTED_COLUMN)

    def rows(self) -> tuple[ExplainRow, ...]:
        """All rows that are not zero, by layer, then by source."""
        rows = []
        for layer, source in np.argwhere(self.counts.sum(axis=2)).tolist():
            counted = dict(zip(COUNTS, self.counts[layer, source].tolist(), strict=True))
            if source == _DEMAND:
                rows.append(ExplainRow(layer, "demand", None, **counted))
            elif source == _KEPT:
                rows.append(ExplainRow(layer, "kept", None, **counted))
            elif source == self._next_iteration:
                rows.append(ExplainRow(layer, "prefetch-next", None, **counted))
            else:
                rows.append(ExplainRow(layer, "prefetch", source - _KEPT, **counted))
        return tuple(rows)

    def _count(self, index: int, source: int, column: int) -> None:
        self.counts[index // self._experts, source, column] += 1
