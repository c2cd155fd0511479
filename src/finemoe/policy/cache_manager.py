"""Events in, `Plan` out.

The controller is the pure half of the cache: it knows what is resident, in flight and in use, and decides what to
fetch and whose slot to take, by the scores of its policy. It does no I/O, reads no clock and owns no bytes, so that the
engine and the simulator drive the same object.

Life of an expert here: absent -> in flight (a `Fetch` was planned) -> resident (`landed`) -> absent (a later `Fetch`
names it as victim). From `routed` until `used` it is pinned and can't be a victim.
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
        capacity: `C`, the number of slots; in-flight experts own one too.
        policy: keeps the scores.
        devices: the slots are spread over so many; experts live on them round-robin.
        sizes: `[L]`, how many experts each layer has, where some have fewer; these are never asked for.
        explain: keep a `source_counts`.
        jit: compiles the bookkeeping.
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
            raise InvariantError(f"a pool needs at least one slot a device, got {capacity} for {devices}")
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
        self._begin_next_prefetch, self._begin_prefetch, self._still_wanted = map(
            jit, (begin_next_prefetch, begin_prefetch, should_continue_prefetch)
        )
        self._chosen = np.zeros(2, np.int64)  # by `begin_next_prefetch`
        self._waiting: deque[int] = deque()  # needed, not resident, no slot to be had yet

    def enable_expert_counts(self) -> None:
        """From now on, count every expert on its own: keep a `expert_counts`."""
        self.expert_counts = self.expert_counts or ExpertCounts(len(self.cache.status) // self._experts, self._experts)

    def begin(self, steps: Sequence[Step]) -> None:
        """An iteration begins."""
        if self.policy.throttles_prefetch:
            self._throttle_prefetch(self.cache)
        self.policy.begin(steps)
        if self.source_counts is not None:
            self.source_counts.begin()

    def routed(self, event: Routed, *, observe: bool = True, computed_on_host: Container[int] = ()) -> Plan:
        """A layer's needs are known: pins them, and plans the fetch of each that is neither resident nor in flight.

        Where slots run out, the rest wait for `used`: a layer that needs more than the pool holds runs in waves.

        Args:
            event: the layer and its needs.
            observe: whether the policy is told.
            elsewhere: what is absent and computed where it is: a miss that brings nothing in.
        """
        if observe:
            self.policy.routed(event)
        if self.source_counts is not None:
            self.source_counts.gate(event.layer)
        first = event.layer * self._experts
        if self.source_counts is not None or self.expert_counts is not None:
            self._note_accesses([first + int(expert) for expert in event.experts])
        needed = np.array([first + int(expert) for expert in event.experts if expert not in computed_on_host], np.int64)
        statuses = np.empty(len(needed), np.uint8)
        if self._access_all(self.cache, needed, statuses):
            self._waiting.extend(needed[statuses == ABSENT].tolist())
        return self._fill()

    def end(self) -> None:
        """The iteration is over."""
        self.policy.end()

    def landed(self, expert: ExpertId) -> Plan:
        """A planned fetch is complete: the expert is resident now."""
        self._leave_flight(expert)
        self.cache.status[self._index(expert)] = RESIDENT
        return self._fill()

    def failed(self, expert: ExpertId) -> None:
        """A planned fetch came to nothing: its slot is free again. The expert is not retried by itself."""
        self._leave_flight(expert)
        index, wasted = self._index(expert), self.cache.counters[WASTED]
        self._release_slot(self.cache, index)
        self._note_waste(index, wasted)

    def retry(self) -> Plan:
        """After `failed`: plans what is needed and neither here nor on its way, and what waited for a slot."""
        cache = self.cache
        for index in np.flatnonzero(cache.pinned & (cache.status == ABSENT)).tolist():
            if index not in self._waiting:
                self._waiting.append(index)
        return self._fill()

    def used(self, expert: ExpertId) -> Plan:
        """The layer is done with this expert: it may be evicted from now on."""
        self.cache.pinned[self._index(expert)] = False
        return self._fill()

    def prefetch(self, device: int = 0) -> Fetch | None:
        """The link of `device` is idle: what to bring in, if anything is worth its victim's slot."""
        wasted = self.cache.counters[WASTED]
        self._begin_next_prefetch(
            self.cache, self._retention_priority, self._prefetch_priority, self.policy.margin, device, self._chosen
        )
        index, victim = self._chosen.tolist()
        if index == NONE:
            return None
        self._note_waste(victim, wasted)
        if self.source_counts is not None:
            self.source_counts.prefetched(index)
        if self.expert_counts is not None:
            self.expert_counts.prefetched(index)
        return Fetch(self._id(index), self._id(victim) if victim >= 0 else None, urgent=False)

    def prefetch_if_free(self, expert: ExpertId) -> Fetch | None:
        """A prefetch of an absent expert into a free slot, wanted or not; `None` if it is here or no slot is free."""
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
        """Whether a prefetch under way is worth going on with. One that a layer needs by now always is."""
        index = self._index(expert)
        if self.cache.pinned[index]:
            return True
        margin, switch, device = self.policy.margin, self.policy.switch, int(self.cache.device[index])
        return bool(
            self._still_wanted(
                self.cache, self._retention_priority, self._prefetch_priority, margin, switch, device, index
            )
        )

    @property
    def short_of_slots(self) -> bool:
        """Whether something needed waits for a slot; a prefetch under way may give its own up (`failed`)."""
        return bool(self._waiting)

    def clear(self) -> None:
        """The pool was emptied (after an error or Ctrl-C): nothing is resident, in flight or needed any more."""
        cache = self.cache
        cache.status[:] = ABSENT
        cache.pinned[:] = False
        cache.unused_prefetch[:] = False
        cache.evicted_for_prefetch[:] = False
        cache.free_slots[:] = make_cache_state(1, 1, self.capacity, len(cache.free_slots)).free_slots
        self._waiting.clear()

    def statuses(self, layer: int) -> list[int]:
        """Of each expert of a layer: `ABSENT`, `LOADING` or `RESIDENT`."""
        first = layer * self._experts
        known: list[int] = self.cache.status[first : first + self._experts].tolist()
        return known

    def is_resident(self, expert: ExpertId) -> bool:
        return bool(self.cache.status[self._index(expert)] == RESIDENT)

    def is_in_flight(self, expert: ExpertId) -> bool:
        return bool(self.cache.status[self._index(expert)] == LOADING)

    def check_integrity(self) -> None:
        """Raises `InvariantError` if the bookkeeping contradicts itself. For tests and debug runs."""
        cache = self.cache
        for device, room in enumerate(cache.free_slots):
            here = cache.device == device
            occupied = int(np.count_nonzero(here & (cache.status != ABSENT)))
            slots = int(make_cache_state(1, 1, self.capacity, len(cache.free_slots)).free_slots[device])
            if room < 0 or occupied + room != slots:
                raise InvariantError(f"device {device}: {occupied} experts and {room} free slots, of {slots} slots")
        if (cache.unused_prefetch & (cache.status == ABSENT)).any():
            raise InvariantError("an absent expert counts as prefetched")

    def _leave_flight(self, expert: ExpertId) -> None:
        if not self.is_in_flight(expert):
            raise InvariantError(f"{expert} ended a flight that it was not on")

    def _note_accesses(self, needed: list[int]) -> None:
        for index in needed:
            status = int(self.cache.status[index])
            if self.source_counts is not None:
                self.source_counts.access(index, status, unused_prefetch=bool(self.cache.unused_prefetch[index]))
            if self.expert_counts is not None:
                self.expert_counts.access(index, status)

    def _fill(self) -> Plan:
        """Plans as many waiting fetches as there are slots: free ones first, then those of the least worthy."""
        if not self._waiting:
            return _NOTHING
        fetches: list[Fetch] = []
        stuck: deque[int] = deque()
        while self._waiting:
            index = self._waiting.popleft()
            wasted = self.cache.counters[WASTED]
            victim = self._allocate_slot(self.cache, self._retention_priority, int(self.cache.device[index]))
            if victim == NONE:
                stuck.append(index)
                continue
            self._note_waste(victim, wasted)
            if self.source_counts is not None:
                self.source_counts.demanded(index)
            self.cache.status[index] = LOADING
            fetches.append(Fetch(self._id(index), self._id(victim) if victim >= 0 else None))
        self._waiting = stuck
        return Plan(tuple(fetches))

    def _note_waste(self, index: int, before: int) -> None:
        """`index` lost its slot: was it a prefetch that nobody needed? The tally tells, as it was and as it is."""
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
