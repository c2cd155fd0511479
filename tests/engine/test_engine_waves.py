"""Serving a layer in waves: ready experts at once, misses computed on the host, preloading while the link is idle."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.policy import POLICIES
from finemoe.types import ExpertId, Routed
from tests.engine.test_engine import EXPERTS, LAYERS, make


@given(
    needs=st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=1, max_size=6),
    capacity=st.integers(1, 6),
    policy=st.sampled_from(POLICIES),
    on_host=st.sets(st.integers(0, EXPERTS - 1)),
    random=st.randoms(use_true_random=False),
)
def test_each_need_is_in_one_wave_or_computed_on_the_host(
    needs: list[set[int]], capacity: int, policy: str, on_host: set[int], random: object
) -> None:
    engine, transfer = make(capacity, policy)
    transfer.choose = random.randrange  # type: ignore[attr-defined]
    transfer.ripe = lambda in_flight: random.randint(0, in_flight)  # type: ignore[attr-defined]
    for number, experts in enumerate(needs):
        layer, chosen = number % LAYERS, set[int]()

        def computed_on_host(missing: Sequence[int], chosen: set[int] = chosen) -> set[int]:
            chosen |= set(missing) & on_host
            return chosen

        event = Routed(layer, sorted(experts))
        served: list[int] = []
        with closing(engine.serve_waves(event, computed_on_host)) as waves:  # type: ignore[type-var] # a generator
            for wave in waves:
                assert len({slot for _, slot in wave}) == len(wave) <= capacity
                for expert, slot in wave:
                    assert engine.pool.bytes_of(slot).unique().tolist() == [1 + layer * EXPERTS + expert]
                    served.append(expert)
        assert sorted(served) == sorted(experts - chosen)
        engine.check_integrity()
    counters = engine.counters
    assert counters.accesses == sum(map(len, needs))
    assert counters.computed_on_host <= counters.misses


def test_all_resident_experts_are_one_wave() -> None:
    engine, transfer = make(6)
    list(engine.serve_waves(Routed(0, [1, 3, 4])))
    waits = transfer.waits
    waves = engine.serve_waves(Routed(0, [1, 2, 3, 4]))
    assert [expert for expert, _ in next(waves)] == [1, 3, 4]
    assert transfer.waits == waits
    assert [[expert for expert, _ in wave] for wave in waves] == [[2]]


def test_an_expert_computed_on_the_host_is_not_loaded_but_counts_as_a_miss() -> None:
    engine, transfer = make(3)
    list(engine.serve_waves(Routed(0, [0, 1])))
    waves = list(engine.serve_waves(Routed(0, [0, 4, 5]), lambda missing: missing[:1]))
    assert [[expert for expert, _ in wave] for wave in waves] == [[0], [5]]
    assert ExpertId(0, 4) not in transfer.submitted
    assert (engine.counters.hits, engine.counters.misses, engine.counters.computed_on_host) == (1, 4, 1)


def test_an_aborted_wave_empties_the_pool() -> None:
    engine, _ = make(3)
    waves = engine.serve_waves(Routed(0, [0, 1, 2, 3]))
    next(waves)
    waves.close()  # type: ignore[attr-defined] # a generator
    assert engine.pool.resident == 0
    engine.check_integrity()


@pytest.mark.parametrize("capacity", [4, LAYERS * EXPERTS])
def test_preloading_fills_free_slots_and_evicts_nothing(capacity: int) -> None:
    engine, transfer = make(capacity)
    list(engine.serve_waves(Routed(2, [5])))
    experts = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    engine.preload(experts)
    for _ in experts:
        transfer.ripe = lambda in_flight: in_flight
        list(engine.serve_waves(Routed(2, [5])))
    assert engine.pool.resident == capacity
    assert engine.cache_manager.is_resident(ExpertId(2, 5))
    assert engine.counters.evictions == 0
    engine.clear()
    list(engine.serve_waves(Routed(0, [0])))
    assert len(transfer.in_flight) + engine.pool.resident > 1  # preloading restarts
    engine.check_integrity()
