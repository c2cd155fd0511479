"""The cache manager: routing events in, `Plan` of fetches and evictions out.

It tracks what is resident, in flight and pinned, and decides what to fetch and what to evict by its policy's scores.
Pure: no I/O, no clock, no bytes; the engine executes the plans and reports completions. The simulator does not use this
class: it runs the kernels of `cache_state` directly, and tests compare the two.

Life of an expert: absent -> in flight (a `Fetch` was planned) -> resident (`landed`) -> absent (victim of a later
`Fetch`). It is pinned, i.e. can't be a victim, from `routed` until `used`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from finemoe.errors import InvariantError
from finemoe.jit import Jit, interpreted
from finemoe.policy.accounting import ExpertCounts, SourceCounts
from finemoe.policy.base import Policy
from finemoe.policy.cache_state import (
    ABSENT,
    LOADING,
    NO_EXPERT,
    NONE,
    RESIDENT,
    WASTED,
    access_all,
    allocate_slot,
    begin_next_prefetch,
    begin_prefetch,
    make_cache_state,
    release_slot,
    should_continue_prefetch,
    throttle_prefetch,
)
from finemoe.types import ExpertId, Fetch, Plan, Routed, Step

_NOTHING = Plan()


class CacheManager:
    """A cache of experts under a policy.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `C`, the number of slots; experts in flight own one too.
        policy: provides the scores.
        devices: over how many devices the slots are spread; experts are assigned to devices round-robin.
        sizes: `[L]`, the number of experts of each layer, if some have fewer than `E`.
        explain: keep `source_counts`.
        jit: compiles the kernels of `cache_state`.

    Attributes:
        cache: the state.
        source_counts: statistics by source, with `explain`.
        expert_counts: statistics by expert, after `enable_expert_counts`.

    Raises:
        InvariantError: fewer slots than devices.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        capacity: int,
        policy: Policy,
        devices: int = 1,
        *,
        sizes: Sequence[int] | None = None,
        explain: bool = False,
        jit: Jit[Any] = interpreted,
    ) -> None:
        if capacity < devices:
            raise InvariantError(f"a pool needs at least one slot per device, got {capacity} for {devices}")
        self.capacity = capacity
        self.policy = policy
        self.cache = make_cache_state(layers, experts, capacity, devices)
        for layer, size in enumerate(sizes or ()):
            self.cache.device[layer * experts + size : (layer + 1) * experts] = NO_EXPERT
        self.source_counts = SourceCounts(layers, experts) if explain else None
        self.expert_counts: ExpertCounts | None = None
        self._experts = experts
        self._retention_priority, self._prefetch_priority = (
            policy.retention_priority.reshape(-1),
            policy.prefetch_priority.reshape(-1),
        )
        self._throttle_prefetch, self._access_all, self._allocate_slot, self._release_slot = map(
            jit, (throttle_prefetch, access_all, allocate_slot, release_slot)
        )
        self._begin_next_prefetch, self._begin_prefetch, self._should_continue_prefetch = map(
            jit, (begin_next_prefetch, begin_prefetch, should_continue_prefetch)
        )
        self._chosen = np.zeros(2, np.int64)  # output of `begin_next_prefetch`
        self._waiting: deque[int] = deque()  # experts to load as soon as a slot can be allocated

    def enable_expert_counts(self) -> None:
        """Keep `expert_counts` from now on."""
        self.expert_counts = self.expert_counts or ExpertCounts(len(self.cache.status) // self._experts, self._experts)

    def begin(self, steps: Sequence[Step]) -> None:
        """An iteration begins."""
        if self.policy.throttles_prefetch:
            self._throttle_prefetch(self.cache)
        self.policy.begin(steps)
        if self.source_counts is not None:
            self.source_counts.begin()

    def routed(self, event: Routed, *, observe: bool = True, computed_on_host: Container[int] = ()) -> Plan:
        """A layer's routing is known: pins its experts, and plans demand loads of those that are absent.

        If slots run out, the remaining loads are planned by later calls of `used`: a layer that needs more experts than
        there are slots runs in waves.

        Args:
            event: the layer and the experts that it needs.
            observe: whether to pass the event to the policy.
            computed_on_host: absent experts of the layer that are computed where they are, and so not loaded.
        """
        if observe:
            self.policy.routed(event)
        if self.source_counts is not None:
            self.source_counts.routed(event.layer)
        first = event.layer * self._experts
        if self.source_counts is not None or self.expert_counts is not None:
            self._count_accesses([first + int(expert) for expert in event.experts])
        needed = np.array([first + int(expert) for expert in event.experts if expert not in computed_on_host], np.int64)
        statuses = np.empty(len(needed), np.uint8)
        if self._access_all(self.cache, needed, statuses):
            self._waiting.extend(needed[statuses == ABSENT].tolist())
        return self._plan_waiting()

    def end(self) -> None:
        """The iteration is over."""
        self.policy.end()

    def landed(self, expert: ExpertId) -> Plan:
        """A planned fetch is complete: the expert is resident. Returns demand loads that had waited for a slot."""
        self._check_in_flight(expert)
        self.cache.status[self._index(expert)] = RESIDENT
        return self._plan_waiting()

    def failed(self, expert: ExpertId) -> None:
        """A planned fetch failed or was cancelled: frees its slot. `retry` plans the expert again if it is needed."""
        self._check_in_flight(expert)
        index, wasted = self._index(expert), self.cache.counters[WASTED]
        self._release_slot(self.cache, index)
        self._count_waste(index, wasted)

    def retry(self) -> Plan:
        """After `failed`: plans loads of all pinned experts that are absent, as far as there are slots."""
        cache = self.cache
        for index in np.flatnonzero(cache.pinned & (cache.status == ABSENT)).tolist():
            if index not in self._waiting:
                self._waiting.append(index)
        return self._plan_waiting()

    def used(self, expert: ExpertId) -> Plan:
        """The layer has computed this expert: unpins it. Returns demand loads that had waited for a slot."""
        self.cache.pinned[self._index(expert)] = False
        return self._plan_waiting()

    def prefetch(self, device: int = 0) -> Fetch | None:
        """The link of `device` is idle: the next prefetch, or `None` (see `cache_state.next_prefetch_candidate`)."""
        wasted = self.cache.counters[WASTED]
        self._begin_next_prefetch(
            self.cache, self._retention_priority, self._prefetch_priority, self.policy.margin, device, self._chosen
        )
        index, victim = self._chosen.tolist()
        if index == NONE:
            return None
        self._count_waste(victim, wasted)
        if self.source_counts is not None:
            self.source_counts.prefetched(index)
        if self.expert_counts is not None:
            self.expert_counts.prefetched(index)
        return Fetch(self._id(index), self._id(victim) if victim >= 0 else None, urgent=False)

    def prefetch_if_free(self, expert: ExpertId) -> Fetch | None:
        """A prefetch into a free slot, whatever the scores; `None` if the expert is not absent or no slot is free."""
        index = self._index(expert)
        if self.cache.status[index] != ABSENT or self.cache.free_slots[self.cache.device[index]] <= 0:
            return None
        self._begin_prefetch(self.cache, self._retention_priority, index)
        if self.source_counts is not None:
            self.source_counts.prefetched(index)
        if self.expert_counts is not None:
            self.expert_counts.prefetched(index)
        return Fetch(expert, None, urgent=False)

    def should_continue_prefetch(self, expert: ExpertId) -> bool:
        """Whether a prefetch in flight should continue; always if the current layer needs the expert by now."""
        index = self._index(expert)
        if self.cache.pinned[index]:
            return True
        margin, switch, device = self.policy.margin, self.policy.switch, int(self.cache.device[index])
        return bool(
            self._should_continue_prefetch(
                self.cache, self._retention_priority, self._prefetch_priority, margin, switch, device, index
            )
        )

    @property
    def short_of_slots(self) -> bool:
        """Whether demand loads wait for a slot; cancelling a prefetch in flight (`failed`) would free one."""
        return bool(self._waiting)

    def clear(self) -> None:
        """The pool was emptied (after an error or Ctrl-C): nothing is resident, in flight or pinned any more."""
        cache = self.cache
        cache.status[:] = ABSENT
        cache.pinned[:] = False
        cache.unused_prefetch[:] = False
        cache.evicted_for_prefetch[:] = False
        cache.free_slots[:] = make_cache_state(1, 1, self.capacity, len(cache.free_slots)).free_slots
        self._waiting.clear()

    def statuses(self, layer: int) -> list[int]:
        """`ABSENT`, `LOADING` or `RESIDENT`, for each expert of a layer."""
        first = layer * self._experts
        statuses: list[int] = self.cache.status[first : first + self._experts].tolist()
        return statuses

    def is_resident(self, expert: ExpertId) -> bool:
        return bool(self.cache.status[self._index(expert)] == RESIDENT)

    def is_in_flight(self, expert: ExpertId) -> bool:
        return bool(self.cache.status[self._index(expert)] == LOADING)

    def check_integrity(self) -> None:
        """Raises `InvariantError` if the state is inconsistent. For tests and debug runs."""
        cache = self.cache
        for device, free in enumerate(cache.free_slots):
            occupied = int(np.count_nonzero((cache.device == device) & (cache.status != ABSENT)))
            slots = int(make_cache_state(1, 1, self.capacity, len(cache.free_slots)).free_slots[device])
            if free < 0 or occupied + free != slots:
                raise InvariantError(f"device {device}: {occupied} experts and {free} free slots, of {slots} slots")
        if (cache.unused_prefetch & (cache.status == ABSENT)).any():
            raise InvariantError("an absent expert is marked as an unused prefetch")

    def _check_in_flight(self, expert: ExpertId) -> None:
        if not self.is_in_flight(expert):
            raise InvariantError(f"{expert}: a fetch was reported as finished, but none is in flight")

    def _count_accesses(self, needed: list[int]) -> None:
        for index in needed:
            status = int(self.cache.status[index])
            if self.source_counts is not None:
                self.source_counts.access(index, status, unused_prefetch=bool(self.cache.unused_prefetch[index]))
            if self.expert_counts is not None:
                self.expert_counts.access(index, status)

    def _plan_waiting(self) -> Plan:
        """Plans as many waiting loads as slots can be allocated, in order."""
        if not self._waiting:
            return _NOTHING
        fetches: list[Fetch] = []
        still_waiting: deque[int] = deque()
        while self._waiting:
            index = self._waiting.popleft()
            wasted = self.cache.counters[WASTED]
            victim = self._allocate_slot(self.cache, self._retention_priority, int(self.cache.device[index]))
            if victim == NONE:
                still_waiting.append(index)
                continue
            self._count_waste(victim, wasted)
            if self.source_counts is not None:
                self.source_counts.demanded(index)
            self.cache.status[index] = LOADING
            fetches.append(Fetch(self._id(index), self._id(victim) if victim >= 0 else None))
        self._waiting = still_waiting
        return Plan(tuple(fetches))

    def _count_waste(self, index: int, before: int) -> None:
        """Counts `index`, which lost its slot, as a wasted prefetch if counter `WASTED` has changed from `before`."""
        if self.cache.counters[WASTED] == before:
            return
        if self.source_counts is not None:
            self.source_counts.wasted(index)
        if self.expert_counts is not None:
            self.expert_counts.wasted(index)

    def _index(self, expert: ExpertId) -> int:
        return expert.layer * self._experts + expert.expert

    def _id(self, index: int) -> ExpertId:
        return ExpertId(*divmod(index, self._experts))
