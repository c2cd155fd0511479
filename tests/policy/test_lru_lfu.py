"""Eviction policies against simple reference implementations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.policy import make_cache_manager
from finemoe.policy.cache_state import ABSENT, NONE, RESIDENT, choose_victim, make_cache_state
from finemoe.policy.lru_lfu import LFRU, LFU, LRU
from finemoe.types import ExpertId, Fetch
from tests.policy.cache_driver import CacheDriver

LAYERS, EXPERTS = 3, 6
ALL = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
Trace = list[tuple[int, list[int]]]
needs = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3, unique=True).map(sorted)
traces = st.lists(st.tuples(st.integers(0, LAYERS - 1), needs), max_size=60)


class PlainLRU:
    """A list, least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: list[ExpertId] = []

    def layer(self, layer: int, experts: list[int]) -> list[Fetch]:
        needed = [ExpertId(layer, expert) for expert in experts]
        missing = [expert for expert in needed if expert not in self.held]
        idle = [expert for expert in self.held if expert not in needed]
        victims = idle[: max(0, len(self.held) + len(missing) - self.capacity)]
        free = len(missing) - len(victims)
        self.held = [expert for expert in self.held if expert not in needed + victims] + needed
        return [Fetch(e, v) for e, v in zip(missing, [*[None] * free, *victims], strict=True)]


@given(traces, st.integers(3, LAYERS * EXPERTS))
def test_lru_matches_a_list(trace: Trace, capacity: int) -> None:
    plain, driver = PlainLRU(capacity), CacheDriver(make_cache_manager("lru", LAYERS, EXPERTS, capacity))
    for layer, experts in trace:
        assert driver.layer(layer, experts) == plain.layer(layer, experts)
    assert driver.resident == set(plain.held)


class PlainVisits:
    """All visits with their iterations; an iteration ends when the layer index does not increase."""

    def __init__(self, trace: Trace) -> None:
        self.iteration = 0
        self.of: dict[ExpertId, list[int]] = {}
        previous = -1
        for layer, experts in trace:
            self.iteration += layer <= previous
            previous = layer
            for expert in experts:
                self.of.setdefault(ExpertId(layer, expert), []).append(self.iteration)

    def decayed(self, expert: ExpertId, decay: float) -> float:
        return sum(decay ** (self.iteration - then) for then in self.of.get(expert, []))


@given(traces)
def test_lfu_counts_visits_decayed_by_a_tenth_per_iteration(trace: Trace) -> None:
    lfu, plain = LFU(LAYERS, EXPERTS), PlainVisits(trace)
    for layer, experts in trace:
        lfu.visit(layer, experts)
    for expert in ALL:
        assert lfu.retention_priority[expert] == pytest.approx(plain.decayed(expert, 0.9))


@given(traces)
def test_lfru_divides_decayed_visits_by_the_age_of_the_last(trace: Trace) -> None:
    lfru, plain = LFRU(LAYERS, EXPERTS), PlainVisits(trace)
    for layer, experts in trace:
        lfru.visit(layer, experts)
    for expert in ALL:
        age = plain.iteration - max(plain.of.get(expert, [0]))
        assert lfru.retention_priority[expert] == pytest.approx(plain.decayed(expert, 0.98) / (age + 1))


def test_lru_orders_the_experts_of_one_event() -> None:
    lru = LRU(1, 3)
    lru.visit(0, [0, 1, 2])
    assert lru.retention_priority[0].tolist() == sorted(lru.retention_priority[0].tolist())


@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, np.inf, -np.inf]), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_victim_is_the_first_unpinned_resident_of_lowest_priority(
    retention_priority: list[float], resident: list[bool], pinned: list[bool]
) -> None:
    cache = make_cache_state(2, 3, 6)
    cache.status[:] = np.where(resident, RESIDENT, ABSENT)
    cache.pinned[:] = pinned
    allowed = [(retention_priority[i], i) for i in range(6) if resident[i] and not pinned[i]]
    assert choose_victim(cache, np.array(retention_priority), 0) == (min(allowed)[1] if allowed else NONE)
