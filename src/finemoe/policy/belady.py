"""Bounds that know the future, for the simulator: Belady's MIN (caching alone), and an oracle that also prefetches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import Jit, interpreted, kernel
from finemoe.policy.base import Policy
from finemoe.policy.lru_lfu import NEXT_USE, OnDemand, visit
from finemoe.types import Routed

NEVER = 1 << 40  # in place of an event's index: not needed again. float64 represents all indices below it exactly


class Future(NamedTuple):
    """All access events of a trace. Event i has the accesses `ptr[i]` to `ptr[i + 1] - 1`, in order of its experts."""

    ptr: npt.NDArray[np.int64]  # [events + 1]
    next_use: npt.NDArray[np.int64]  # [accesses], the next event that needs the same expert, or `NEVER`
    first_use: npt.NDArray[np.int64]  # [L, E], the first event that needs it, or `NEVER`


@kernel
def next_uses(
    ptr: npt.NDArray[np.int64],
    accesses: npt.NDArray[np.int64],
    next_use: npt.NDArray[np.int64],
    first_use: npt.NDArray[np.int64],
) -> None:
    """Fills in the next and first use of every expert, in one backward pass.

    Args:
        ptr: `[events + 1]`, as in `Future`.
        accesses: `[accesses]`, flat indices `l * E + e`, event after event; distinct within an event.
        next_use: `[accesses]`, filled in.
        first_use: `[L * E]`, filled in; must be `NEVER` everywhere.
    """
    for event in range(len(ptr) - 2, -1, -1):
        for i in range(ptr[event], ptr[event + 1]):
            expert = accesses[i]
            next_use[i] = first_use[expert]
            first_use[expert] = event


def compute_future(
    layers: int,
    experts: int,
    ptr: npt.NDArray[np.int64],
    accesses: npt.NDArray[np.int64],
    jit: Jit[Any] = interpreted,
) -> Future:
    """The future of a trace; `ptr` and `accesses` as in `next_uses`."""
    next_use = np.empty(len(accesses), np.int64)
    first_use = np.full(layers * experts, NEVER, np.int64)
    jit(next_uses)(ptr, accesses, next_use, first_use)
    return Future(ptr, next_use, first_use.reshape(layers, experts))


class Belady(OnDemand):
    """Belady's MIN: evicts the expert that is needed latest. No cache without prefetch has fewer misses.

    Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2),
    1966. Deviation: all experts that a layer needs in one iteration are one event, and none of them can be a victim
    during it. So it bounds the policies of this package, not caches that are asked for one expert at a time.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        future: the events to come: the i-th call of `routed` must be event i.
    """

    clairvoyant = True
    kind = NEXT_USE

    def __init__(self, layers: int, experts: int, future: Future) -> None:
        super().__init__(layers, experts)
        self.future = future
        self.next_use = future.next_use
        self.event = 0

    def routed(self, event: Routed) -> None:
        ptr, next_use, _ = self.future
        following = next_use[ptr[self.event] : ptr[self.event + 1]]
        visit(NEXT_USE, 1.0, self.ranking, event.layer, np.asarray(event.experts, np.int64), following)
        self.event += 1


class Oracle(Policy):
    """Prefetches the expert needed soonest and evicts the one needed latest, if the first is needed before the second.

    Prefetch in order of deadlines with Belady's eviction, after Cao et al., "A study of integrated prefetching and
    caching strategies" (SIGMETRICS 1995). It is greedy: a strong reference, not a proven bound.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        future: as for `Belady`.
    """

    prefetches = True
    clairvoyant = True
    margin = 0.0

    def __init__(self, layers: int, experts: int, future: Future) -> None:
        super().__init__(layers, experts)
        self.future = future
        self.event = 0
        self.retention_priority[:] = NEVER - future.first_use
        self.prefetch_priority = self.retention_priority  # the same scale for both: the sooner, the higher; 0: never

    def routed(self, event: Routed) -> None:
        ptr, next_use, _ = self.future
        following = next_use[ptr[self.event] : ptr[self.event + 1]]
        self.retention_priority[event.layer, np.asarray(event.experts, np.int64)] = NEVER - following
        self.event += 1
