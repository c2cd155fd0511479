"""Events in, `Plan` out.

The controller is the pure half of the cache: it knows what is resident, in flight and in
use, and decides what to fetch and whose slot to take. It does no I/O, reads no clock and owns no bytes, so that the
engine and the simulator drive the same object.

Life of an expert here: absent -> in flight (a `Fetch` was planned) -> resident (`landed`) -> absent (a later `Fetch`
names it as victim). From `routed` until `used` it is pinned and can't be a victim.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from finemoe.errors import InvariantError
from finemoe.policy.cache import Eviction, least_worthy
from finemoe.types import ExpertId, Fetch, Plan, Routed


class Controller:
    """On-demand loading with a given eviction.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `C`, the number of slots; in-flight experts own one too.
        eviction: ranks the residents.
    """

    def __init__(self, layers: int, experts: int, capacity: int, eviction: Eviction) -> None:
        if capacity < 1:
            raise InvariantError(f"a pool needs at least one slot, got {capacity}")
        self.capacity = capacity
        self.eviction = eviction
        self._resident = np.zeros((layers, experts), dtype=bool)  # [L, E]
        self._pinned = np.zeros((layers, experts), dtype=bool)  # [L, E], needed and not used yet
        self._in_flight: set[ExpertId] = set()
        self._waiting: deque[ExpertId] = deque()  # needed, not resident, no slot to be had yet
        self._occupied = 0  # resident or in flight

    def routed(self, event: Routed) -> Plan:
        """A layer's needs are known: pins them, and plans the fetch of each that is neither resident nor in flight.

        Where slots run out, the rest wait for `used`: a layer that needs more than the pool holds runs in waves.
        """
        self.eviction.access(event.layer, event.experts)
        for expert in event.experts:
            needed = ExpertId(event.layer, expert)
            self._pinned[needed] = True
            if not self._resident[needed] and needed not in self._in_flight:
                self._waiting.append(needed)
        return self._fill()

    def landed(self, expert: ExpertId) -> Plan:
        """A planned fetch is complete: the expert is resident now."""
        self._in_flight.remove(expert)
        self._resident[expert] = True
        return self._fill()

    def failed(self, expert: ExpertId) -> None:
        """A planned fetch came to nothing: its slot is free again. The expert is not retried by itself."""
        self._in_flight.remove(expert)
        self._occupied -= 1

    def used(self, expert: ExpertId) -> Plan:
        """The layer is done with this expert: it may be evicted from now on."""
        self._pinned[expert] = False
        return self._fill()

    def clear(self) -> None:
        """The pool was emptied (after an error or Ctrl-C): nothing is resident, in flight or needed any more."""
        self._resident[:] = False
        self._pinned[:] = False
        self._in_flight.clear()
        self._waiting.clear()
        self._occupied = 0

    def is_resident(self, expert: ExpertId) -> bool:
        return bool(self._resident[expert])

    def is_in_flight(self, expert: ExpertId) -> bool:
        return expert in self._in_flight

    def check_integrity(self) -> None:
        """Raises `InvariantError` if the bookkeeping contradicts itself. For tests and debug runs."""
        occupied = int(self._resident.sum()) + len(self._in_flight)
        if occupied != self._occupied:
            raise InvariantError(f"controller counts {self._occupied} occupied slots, but {occupied} are")
        if occupied > self.capacity:
            raise InvariantError(f"{occupied} experts in {self.capacity} slots")
        for expert in self._in_flight:
            if self._resident[expert]:
                raise InvariantError(f"{expert} is both resident and in flight")

    def _fill(self) -> Plan:
        """Plans as many waiting fetches as there are slots: free ones first, then those of the least worthy."""
        if not self._waiting:
            return Plan()
        fetches: list[Fetch] = []
        while self._waiting:
            victim: ExpertId | None = None
            if self._occupied == self.capacity:
                victim = least_worthy(self.eviction.worth(), self._resident & ~self._pinned)
                if victim is None:
                    break
                self._resident[victim] = False
            else:
                self._occupied += 1
            expert = self._waiting.popleft()
            self._in_flight.add(expert)
            fetches.append(Fetch(expert, victim))
        return Plan(tuple(fetches))
