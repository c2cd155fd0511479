"""Policies that know the future: what caching alone, and caching with prefetch, could reach. For the simulator."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import Jit, interpreted, kernel
from finemoe.policy.base import Policy
from finemoe.policy.eviction import NEXT_USE, OnDemand, visit
from finemoe.types import Routed

NEVER = 1 << 40  # instead of an event's index: not needed again. A float64 tells events below it apart


class Future(NamedTuple):
    """The access events to come. Event `i` needs the accesses `ptr[i]` to `ptr[i + 1]`, in the order of its experts."""

    ptr: npt.NDArray[np.int64]  # [events + 1]
    next_use: npt.NDArray[np.int64]  # [accesses], the next event that needs the same expert, or `NEVER`
    first_use: npt.NDArray[np.int64]  # [L, E], the first event that needs it, or `NEVER`


@kernel
def uses(
    ptr: npt.NDArray[np.int64],
    accesses: npt.NDArray[np.int64],
    next_use: npt.NDArray[np.int64],
    first_use: npt.NDArray[np.int64],
) -> None:
    """Fills in `next_use` `[accesses]` and `first_use` `[L * E]`, going backwards.

    Args:
        ptr: as in `Future`.
        accesses: flat indices `l * E + e`, event after event, each event's distinct.
        next_use: is filled in.
        first_use: is filled in; `NEVER` everywhere at first.
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
    """The future of a trace, for `accesses` as in `uses`."""
    next_use = np.empty(len(accesses), np.int64)
    first_use = np.full(layers * experts, NEVER, np.int64)
    jit(uses)(ptr, accesses, next_use, first_use)
    return Future(ptr, next_use, first_use.reshape(layers, experts))


class Belady(OnDemand):
    """MIN: on demand only, and what is needed latest goes first. No cache without prefetch misses less often.

    Source: L. A. Belady, IBM Systems Journal 5(2), 1966. Event-atomic: all experts that a layer needs in an iteration
    are one event, at which none of them can be a victim, so it bounds the policies of this package rather than those
    of a cache that is asked for one expert at a time.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        future: of exactly the events that are coming: the i-th call of `routed` is event i.
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
        until = next_use[ptr[self.event] : ptr[self.event + 1]]
        visit(NEXT_USE, 1.0, self.ranking, event.layer, np.asarray(event.experts, np.int64), until)
        self.event += 1


class Oracle(Policy):
    """Prefetches what is needed soonest and evicts what is needed latest, if the one is sooner than the other.

    Deadline order with Belady's eviction, after Cao et al., "A study of integrated prefetching and caching strategies"
    (SIGMETRICS 1995): greedy, so a strong reference and not a proven bound.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        future: as of `Belady`.
    """

    prefetches = True
    clairvoyant = True
    margin = 0.0

    def __init__(self, layers: int, experts: int, future: Future) -> None:
        super().__init__(layers, experts)
        self.future = future
        self.event = 0
        self.retention_priority[:] = NEVER - future.first_use
        self.prefetch_priority = self.retention_priority  # one scale: the sooner, the higher; 0: never

    def routed(self, event: Routed) -> None:
        ptr, next_use, _ = self.future
        until = next_use[ptr[self.event] : ptr[self.event + 1]]
        self.retention_priority[event.layer, np.asarray(event.experts, np.int64)] = NEVER - until
        self.event += 1
