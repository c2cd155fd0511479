"""Eviction policies without prefetch: LRU, LFU and LFRU, and the access ranking that other policies share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import kernel
from finemoe.policy.base import Policy
from finemoe.policy.cache_state import Scores
from finemoe.types import Routed

RECENCY, FREQUENCY, FREQUENCY_OVER_AGE, NEXT_USE = range(4)  # kinds of ranking
_VISITS, _ITERATION, _PREVIOUS_LAYER = range(3)  # Ranking.clock


class Ranking(NamedTuple):
    """Retention priorities computed from past accesses. Arrays `[L, E]` unless a shape is given."""

    retention_priority: Scores
    frequency: Scores  # number of visits, decayed
    last_visit: Scores  # iteration of the last visit
    clock: npt.NDArray[np.int64]  # [3]: visits so far, iterations so far, layer of the previous event


def make_ranking(layers: int, experts: int, initial: float = 0.0) -> Ranking:
    """A ranking without visits; `initial` is the retention priority of experts that were never visited."""
    shape = (layers, experts)
    return Ranking(np.full(shape, initial), np.zeros(shape), np.zeros(shape), np.array([0, 0, -1]))


@kernel
def visit(
    kind: int,
    decay: float,
    ranking: Ranking,
    layer: int,
    experts: npt.NDArray[np.int64],
    next_use: npt.NDArray[np.int64],
) -> None:
    """Records one access event: `layer` needs these experts `[n]`, resident or not.

    With iteration i, and f the visits of an expert, each weighted by `decay` to the power of its age in iterations, the
    retention priority is, by `kind`:

    - `RECENCY`: the number of the last visit; experts of one event count in the order given;
    - `FREQUENCY`: `f`;
    - `FREQUENCY_OVER_AGE`: `f / (i - last_visit + 1)`;
    - `NEXT_USE`: `-next_use`.

    An iteration ends when the layer index does not increase.

    Args:
        kind: see above.
        decay: weight of a visit after one iteration.
        ranking: is updated.
        layer: of the event.
        experts: `[n]`, expert numbers within the layer.
        next_use: `[n]`, for `NEXT_USE` only: index of the event that needs each of `experts` next.
    """
    retention_priority, frequency, last_visit, clock = ranking
    if layer <= clock[_PREVIOUS_LAYER]:
        clock[_ITERATION] += 1
        if kind == FREQUENCY:
            frequency *= decay
            retention_priority[:] = frequency
        elif kind == FREQUENCY_OVER_AGE:
            frequency *= decay
            retention_priority[:] = frequency / (clock[_ITERATION] - last_visit + 1.0)
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
            last_visit[layer, expert] = clock[_ITERATION]
            retention_priority[layer, expert] = frequency[layer, expert]


_NO_NEXT_USE = np.empty(0, np.int64)


class OnDemand(Policy):
    """Base of the policies that load on demand only and evict by a `Ranking`.

    Attributes:
        kind: of ranking, see `visit`.
        decay: see `visit`.
        next_use: for `NEXT_USE`, aligned with all accesses to come; otherwise empty.
        ranking: the state.
    """

    kind = RECENCY
    decay = 1.0
    next_use = _NO_NEXT_USE

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.ranking = make_ranking(layers, experts, -1.0 if self.kind == RECENCY else 0.0)
        self.retention_priority = self.ranking.retention_priority

    def routed(self, event: Routed) -> None:
        self.visit(event.layer, event.experts)

    def visit(self, layer: int, experts: Sequence[int]) -> None:
        """Records an access event."""
        visit(self.kind, self.decay, self.ranking, layer, np.asarray(experts, np.int64), _NO_NEXT_USE)


class LRU(OnDemand):
    """Evicts the least recently used expert. Experts of one event are ordered by their index."""


class LFU(OnDemand):
    """Evicts the least frequently used expert, by a visit count that decays once per iteration.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        decay: weight of a visit after one iteration.
    """

    kind = FREQUENCY

    def __init__(self, layers: int, experts: int, decay: float = 0.9) -> None:
        super().__init__(layers, experts)
        self.decay = decay


class LFRU(OnDemand):
    """Evicts the expert with the lowest `f / (age + 1)`: frequency over iterations since the last visit.

    Source: the least-frequently-recently-used score that a 2026 caching study found best among evictions that don't
    know the future. The study does not define f. Here it is the decayed number of visits, with a slower decay than
    `LFU`'s, because the age already favours recent visits.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        decay: weight of a visit after one iteration.
    """

    kind = FREQUENCY_OVER_AGE

    def __init__(self, layers: int, experts: int, decay: float = 0.98) -> None:
        super().__init__(layers, experts)
        self.decay = decay
