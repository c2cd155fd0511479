"""Eviction by what was used: recency, decayed frequency, and frequency over age. On-demand loading, no prefetch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import kernel
from finemoe.policy.base import Policy
from finemoe.policy.cache_state import Scores
from finemoe.types import Routed

RECENCY, FREQUENCY, FREQUENCY_OVER_AGE, NEXT_USE = range(4)
_VISITS, _ITERATION, _PREVIOUS_LAYER = range(3)


class Ranking(NamedTuple):
    """State of a ranking. Arrays `[L, E]` unless said otherwise."""

    retention_priority: Scores
    frequency: Scores
    last: Scores  # iteration of the last visit
    clock: npt.NDArray[np.int64]  # [3]: visits, iterations, the previous event's layer


def make_ranking(layers: int, experts: int, nothing: float = 0.0) -> Ranking:
    """A ranking without any visit; `nothing` is what an expert is worth that was never visited."""
    shape = (layers, experts)
    return Ranking(np.full(shape, nothing), np.zeros(shape), np.zeros(shape), np.array([0, 0, -1]))


@kernel
def visit(
    kind: int,
    decay: float,
    ranking: Ranking,
    layer: int,
    experts: npt.NDArray[np.int64],
    next_use: npt.NDArray[np.int64],
) -> None:
    """One access event: these experts `[n]` of `layer` were needed together, resident or not.

    Args:
        kind: how the worth follows from the visits.
        decay: what a visit is worth one iteration later. An iteration ends when the layer index does not grow.
        next_use: `[n]`, only of `NEXT_USE`: the event that needs each of `experts` next.
    """
    retention_priority, frequency, last, clock = ranking
    if layer <= clock[_PREVIOUS_LAYER]:
        clock[_ITERATION] += 1
        if kind == FREQUENCY:
            frequency *= decay
            retention_priority[:] = frequency
        elif kind == FREQUENCY_OVER_AGE:
            frequency *= decay
            retention_priority[:] = frequency / (clock[_ITERATION] - last + 1.0)
    clock[_PREVIOUS_LAYER] = layer
    for i in range(len(experts)):
        expert = experts[i]
        if kind == RECENCY:
            retention_priority[layer, expert] = clock[_VISITS]
            clock[_VISITS] += 1
        elif kind == NEXT_USE:
            retention_priority[layer, expert] = -next_use[i]
        else:
            frequency[layer, expert] += 1.0
            last[layer, expert] = clock[_ITERATION]
            retention_priority[layer, expert] = frequency[layer, expert]


_NO_FUTURE = np.empty(0, np.int64)


class OnDemand(Policy):
    """Loads what is needed when it is needed, and evicts by a ranking of what was used."""

    kind = RECENCY
    decay = 1.0
    next_use = _NO_FUTURE  # only of a ranking that knows it

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.ranking = make_ranking(layers, experts, -1.0 if self.kind == RECENCY else 0.0)
        self.retention_priority = self.ranking.retention_priority

    def routed(self, event: Routed) -> None:
        self.visit(event.layer, event.experts)

    def visit(self, layer: int, experts: Sequence[int]) -> None:
        """Books an access event."""
        visit(self.kind, self.decay, self.ranking, layer, np.asarray(experts, np.int64), _NO_FUTURE)


class LRU(OnDemand):
    """Least recently used goes first. Experts of one event are ordered by their index."""


class LFU(OnDemand):
    """Least frequently used goes first, by a frequency that decays once per iteration."""

    kind = FREQUENCY

    def __init__(self, layers: int, experts: int, decay: float = 0.9) -> None:
        super().__init__(layers, experts)
        self.decay = decay


class LFRU(OnDemand):
    """Frequency over age: `f / (age + 1)`, age in iterations since the last visit; the lowest goes first.

    Source: the least-frequently-recently-used score that a 2026 caching study found best among causal evictions.
    It leaves open what `f` counts; here visits that decay per iteration, slower than `LFU`'s as age already favours
    the recent.
    """

    kind = FREQUENCY_OVER_AGE

    def __init__(self, layers: int, experts: int, decay: float = 0.98) -> None:
        super().__init__(layers, experts)
        self.decay = decay
