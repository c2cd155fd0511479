"""Runs a cache manager layer by layer and checks its invariants after every event: no engine, no pool, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from finemoe.policy import CacheManager
from finemoe.types import ExpertId, Fetch, Plan, Routed

Choice = Callable[[int], int]  # picks one of n possible next actions


def first(_: int) -> int:
    return 0


class CacheDriver:
    """Runs a cache manager and mirrors its state from plans and events alone.

    Args:
        cache_manager: under test.
        choose: which action happens next, if several can.
        prefetch: whether the link may become idle: then prefetches are requested, and useless ones are cancelled.
    """

    def __init__(self, cache_manager: CacheManager, choose: Choice = first, *, prefetch: bool = False) -> None:
        self.cache_manager = cache_manager
        self.choose = choose
        self.prefetch = prefetch
        self.resident: set[ExpertId] = set()
        self.in_flight: list[ExpertId] = []
        self.needed: list[ExpertId] = []  # by the current layer, not used yet
        self.log: list[Fetch] = []

    def layer(self, layer: int, experts: Sequence[int]) -> list[Fetch]:
        """Runs one layer, of which only the needed experts are known. Returns its fetches."""
        return self.event(Routed(layer, tuple(experts)))

    def event(self, event: Routed) -> list[Fetch]:
        """Runs one layer: experts land and are used in any order. Returns its fetches."""
        start = len(self.log)
        self.needed = [ExpertId(event.layer, expert) for expert in event.experts]
        self.execute(self.cache_manager.routed(event))
        while self.needed:
            usable = [expert for expert in self.needed if expert in self.resident]
            assert usable or self.in_flight, f"{self.needed} will never be loaded"
            action = self.choose(len(usable) + len(self.in_flight) + 2 * self.prefetch)
            if action < len(usable):
                self.use(usable[action])
            elif action < len(usable) + len(self.in_flight):
                self.land(self.in_flight[action - len(usable)])
            elif action == len(usable) + len(self.in_flight):
                self.idle()
            else:
                self.cancel()
        while self.prefetch and (action := self.choose(4)):
            if action == 1 and self.in_flight:
                self.land(self.in_flight[0])
            else:
                self.idle()
        return self.log[start:]

    def use(self, expert: ExpertId) -> None:
        self.needed.remove(expert)
        self.execute(self.cache_manager.used(expert))

    def land(self, expert: ExpertId) -> None:
        self.in_flight.remove(expert)
        self.resident.add(expert)
        self.execute(self.cache_manager.landed(expert))

    def fail(self, expert: ExpertId) -> None:
        """A fetch fails; it is retried if the expert is needed."""
        self.in_flight.remove(expert)
        self.cache_manager.failed(expert)
        self.check()
        self.execute(self.cache_manager.retry())

    def idle(self) -> Fetch | None:
        """The link is idle: requests a prefetch."""
        before = self.cache_manager.policy.retention_priority.copy(), self.cache_manager.policy.prefetch_priority.copy()
        fetch = self.cache_manager.prefetch()
        assert np.array_equal(
            before, (self.cache_manager.policy.retention_priority, self.cache_manager.policy.prefetch_priority)
        )
        if fetch is None:
            return None
        assert not fetch.urgent
        assert fetch.expert not in self.needed, f"{fetch.expert} is needed and prefetched"
        prefetch_priority, retention_priority = (
            self.cache_manager.policy.prefetch_priority,
            self.cache_manager.policy.retention_priority,
        )
        assert prefetch_priority[fetch.expert] > 0, f"{fetch.expert} is prefetched with priority 0"
        if fetch.victim is not None:
            idle = [expert for expert in self.resident if expert not in self.needed]
            assert retention_priority[fetch.victim] == min(retention_priority[expert] for expert in idle), (
                "not the lowest retention priority"
            )
        self.execute(Plan((fetch,)))
        return fetch

    def cancel(self) -> None:
        """Cancels prefetches in flight that should not continue, or whose slot is needed."""
        for expert in [e for e in self.in_flight if e not in self.needed]:
            if self.cache_manager.short_of_slots or not self.cache_manager.should_continue_prefetch(expert):
                self.fail(expert)

    def execute(self, plan: Plan) -> None:
        """Executes a plan; fails on whatever a pool would refuse."""
        for expert, victim, _ in plan.fetches:
            assert expert not in self.resident, f"{expert} is resident and fetched"
            assert expert not in self.in_flight, f"{expert} is fetched twice"
            if victim is None:
                assert len(self.resident) + len(self.in_flight) < self.cache_manager.capacity, "no slot is free"
            else:
                assert victim in self.resident, f"{victim} is not resident and evicted"
                assert victim not in self.needed, f"{victim} is needed and evicted"
                self.resident.remove(victim)
            self.in_flight.append(expert)
        self.log += plan.fetches
        self.check()

    def check(self) -> None:
        self.cache_manager.check_integrity()
        assert len(self.resident) + len(self.in_flight) <= self.cache_manager.capacity
        assert all(self.cache_manager.is_resident(expert) for expert in self.resident)
        assert all(self.cache_manager.is_in_flight(expert) for expert in self.in_flight)
