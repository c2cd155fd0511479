"""Serving a layer, with a transfer that moves nothing unless the test lets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.engine.engine import Engine
from finemoe.engine.layer_timing import LayerTiming
from finemoe.errors import ExpertReadError, FinemoeError, InvariantError
from finemoe.metrics import NEVER, Durations
from finemoe.policy import POLICIES, CacheManager, make_cache_manager
from finemoe.policy.lru_lfu import LRU
from finemoe.store import RamSlotPool
from finemoe.types import ExpertId, Routed
from tests.fakes import ManualTransfer, MemorySource

LAYERS, EXPERTS = 3, 6
SLOT_BYTES = 64
SOURCE = MemorySource(
    {ExpertId(la, e): bytes([1 + la * EXPERTS + e]) * SLOT_BYTES for la in range(LAYERS) for e in range(EXPERTS)}
)


def make(capacity: int, policy: str = "lru", transfer: ManualTransfer | None = None) -> tuple[Engine, ManualTransfer]:
    transfer = transfer or ManualTransfer(SOURCE)
    engine = Engine(RamSlotPool(capacity, SLOT_BYTES), make_cache_manager(policy, LAYERS, EXPERTS, capacity), transfer)
    return engine, transfer


def run(engine: Engine, layer: int, experts: list[int]) -> list[int]:
    """Serves a layer, checking that each yielded slot holds its expert. Returns the experts in order."""
    order = []
    for expert, slot in engine.serve(Routed(layer, experts)):
        assert engine.pool.bytes_of(slot).unique().tolist() == [1 + layer * EXPERTS + expert]
        order.append(expert)
    engine.check_integrity()
    return order


def works(engine: Engine, transfer: ManualTransfer) -> bool:
    transfer.fail = lambda _: None
    return run(engine, 0, [0, 1, 2]) == [0, 1, 2]


def test_resident_experts_are_served_before_anything_is_waited_for() -> None:
    engine, transfer = make(4)
    run(engine, 0, [1, 3])
    waits = transfer.waits
    serving = engine.serve(Routed(0, [0, 1, 2, 3]))
    assert [next(serving)[0], next(serving)[0]] == [1, 3]
    assert transfer.waits == waits
    assert transfer.submitted[-2:] == [(0, 0), (0, 2)]  # they are being loaded
    assert sorted(expert for expert, _ in serving) == [0, 2]
    assert transfer.waits > waits


def test_experts_are_served_in_the_order_in_which_they_land() -> None:
    engine, transfer = make(6)
    transfer.choose = lambda in_flight: in_flight - 1
    assert run(engine, 0, [0, 1, 2, 3]) == [3, 2, 1, 0]


def test_an_expert_that_lands_while_another_is_computed_is_not_waited_for() -> None:
    engine, transfer = make(6)
    run(engine, 0, [0])
    serving = engine.serve(Routed(0, [0, 1, 2]))
    next(serving)
    transfer.ripe = lambda in_flight: in_flight
    waits = transfer.waits
    assert [expert for expert, _ in serving] == [1, 2]
    assert transfer.waits == waits


@given(
    st.sampled_from(POLICIES),
    st.integers(1, LAYERS * EXPERTS),
    st.lists(st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1))), max_size=15),
    st.data(),
)
def test_each_need_is_served_once_and_counted_once(
    policy: str, capacity: int, trace: list[tuple[int, set[int]]], data: st.DataObject
) -> None:
    engine, transfer = make(capacity, policy)
    transfer.choose = lambda in_flight: data.draw(st.integers(0, in_flight - 1))
    transfer.ripe = lambda in_flight: data.draw(st.integers(0, in_flight))
    accesses = 0
    for layer, experts in trace:
        assert sorted(run(engine, layer, sorted(experts))) == sorted(experts)
        accesses += len(experts)
    counters = engine.counters
    assert counters.hits + counters.late + counters.misses == counters.accesses == accesses
    if engine.cache_manager.policy.prefetches:
        assert counters.misses <= len(transfer.submitted)
        return
    assert counters.misses == len(transfer.submitted)
    assert counters.late == 0
    assert counters.evictions == max(0, counters.misses - engine.pool.resident)


def test_hits_and_misses_are_counted() -> None:
    engine, _ = make(6)
    run(engine, 0, [0, 1])
    run(engine, 0, [1, 2, 3])
    assert (engine.counters.hits, engine.counters.late, engine.counters.misses) == (1, 0, 4)


class NextLayerPrefetch(LRU):
    """Prefetches the first expert of a layer in the next layer too, and nothing else."""

    prefetches = True

    def routed(self, event: Routed) -> None:
        super().routed(event)
        self.prefetch_priority[:] = 0
        self.prefetch_priority[(event.layer + 1) % LAYERS, event.experts[0]] = 1


def prefetching(capacity: int = 8) -> tuple[Engine, ManualTransfer]:
    transfer = ManualTransfer(SOURCE)
    cache_manager = CacheManager(LAYERS, EXPERTS, capacity, NextLayerPrefetch(LAYERS, EXPERTS))
    return Engine(RamSlotPool(capacity, SLOT_BYTES), cache_manager, transfer), transfer


def test_an_expert_in_flight_when_it_is_needed_is_late_and_not_fetched_again() -> None:
    engine, transfer = prefetching()
    assert run(engine, 0, [2]) == [2]
    assert transfer.in_flight[0][0] == (1, 2)
    assert run(engine, 1, [2]) == [2]
    assert (engine.counters.hits, engine.counters.late, engine.counters.misses) == (0, 1, 1)
    assert transfer.submitted.count(ExpertId(1, 2)) == 1


def test_a_prefetch_that_landed_before_it_is_needed_is_a_hit() -> None:
    engine, transfer = prefetching()
    run(engine, 0, [2])
    transfer.ripe = lambda in_flight: in_flight
    assert run(engine, 1, [2]) == [2]
    assert (engine.counters.hits, engine.counters.late, engine.counters.misses) == (1, 0, 1)


def test_stalls_are_the_time_and_bytes_of_waiting() -> None:
    ticks = iter(range(100))
    transfer = ManualTransfer(SOURCE)
    cache_manager = make_cache_manager("lru", LAYERS, EXPERTS, 4)
    engine = Engine(RamSlotPool(4, SLOT_BYTES), cache_manager, transfer, clock=lambda: float(next(ticks)))
    run(engine, 0, [0, 1])
    run(engine, 0, [0, 1])
    assert engine.counters.stall_s == 2.0  # two waits of one tick each
    assert engine.counters.stalled_bytes == 2 * SLOT_BYTES


def timed() -> tuple[Engine, LayerTiming]:
    """An engine whose clock advances by 1 s whenever it is read."""
    ticks, timing = iter(range(1000)), LayerTiming(LAYERS)
    cache_manager, transfer = make_cache_manager("lru", LAYERS, EXPERTS, 4), ManualTransfer(SOURCE)
    engine = Engine(RamSlotPool(4, SLOT_BYTES), cache_manager, transfer, clock=lambda: float(next(ticks)))
    engine.layer_timing = timing
    return engine, timing


def test_time_is_split_at_layers_and_gates_without_waiting() -> None:
    engine, timing = timed()
    for _ in range(2):
        for layer in range(LAYERS):
            run(engine, layer, [0])  # reads the clock at the gate, twice for a wait, and at the end
    assert timing.befores == sum([Durations.one(1)] * 4, NEVER)
    assert timing.afters == sum([Durations.one(2)] * 3 + [Durations.one(1)] * 3, NEVER)  # misses, then hits
    assert timing.arounds == Durations.one(1)


def test_a_layer_served_expert_by_expert_is_timed_as_one() -> None:
    engine, timing = timed()
    for experts in ([0], [1]):
        run(engine, 0, experts)
    run(engine, 1, [2])
    assert timing.befores == Durations.one(1)
    assert timing.afters == Durations.one((2 + 2) + 1) + Durations.one(2)  # between its two experts, too


def test_the_time_after_an_aborted_layer_is_not_counted() -> None:
    engine, timing = timed()
    run(engine, 0, [0])
    close(engine.serve(Routed(1, [1])))
    run(engine, 2, [2])
    assert (timing.befores.count, timing.afters.count) == (1, 2)
    timing.reset()
    assert timing.befores == timing.afters == NEVER


def close(serving: Iterator[tuple[int, int]]) -> None:
    next(serving)
    serving.close()  # type: ignore[attr-defined] # a generator


def interrupt(serving: Iterator[tuple[int, int]]) -> None:
    next(serving)
    serving.throw(KeyboardInterrupt)  # type: ignore[attr-defined] # a generator


@pytest.mark.parametrize("stop", [close, interrupt])
def test_an_aborted_layer_empties_the_pool(stop: Callable[[Iterator[tuple[int, int]]], None]) -> None:
    engine, transfer = make(6)
    run(engine, 0, [0])
    serving = engine.serve(Routed(0, [0, 1, 2]))
    with suppress(KeyboardInterrupt):
        stop(serving)
    assert transfer.in_flight == []
    assert engine.pool.resident == 0
    engine.check_integrity()
    assert works(engine, transfer)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_waiting_empties_the_pool(kind: type[BaseException]) -> None:
    engine, transfer = make(6)
    run(engine, 0, [3])
    transfer.fail = lambda _: kind()
    with pytest.raises(kind):
        run(engine, 0, [0, 3])
    assert engine.pool.resident == 0
    engine.check_integrity()
    assert works(engine, transfer)


def test_an_interrupted_clear_is_repeated_by_the_next_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, transfer = make(6)
    transfer.fail = lambda _: KeyboardInterrupt()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "cancel_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(engine, 0, [0, 1, 2])
    assert works(engine, transfer)


def test_a_read_error_names_file_and_expert_and_the_next_layer_works() -> None:
    engine, transfer = make(6)
    broken = ExpertId(0, 2)
    transfer.fail = lambda e: OSError(5, "Input/output error", "shard-1.safetensors") if e == broken else None
    with pytest.raises(ExpertReadError) as caught:
        run(engine, 0, [1, 2, 4])
    assert str(caught.value) == "shard-1.safetensors: can't read expert 2 of MoE layer 0: Input/output error"
    assert isinstance(caught.value, OSError)
    assert engine.pool.resident == 0
    engine.check_integrity()
    assert works(engine, transfer)


@pytest.mark.parametrize("error", [InvariantError("broken rule"), ValueError("bug"), FinemoeError("its own message")])
def test_other_errors_are_raised_unchanged(error: Exception) -> None:
    engine, transfer = make(6)
    transfer.fail = lambda _: error
    with pytest.raises(type(error)) as caught:
        run(engine, 0, [1])
    assert caught.value is error


def test_every_landed_expert_is_verified_before_it_is_served() -> None:
    seen: list[tuple[ExpertId, int]] = []

    def verify(expert: ExpertId, slot: int) -> None:
        assert engine.pool.bytes_of(slot).unique().tolist() == [1 + expert.layer * EXPERTS + expert.expert]
        seen.append((expert, slot))

    transfer = ManualTransfer(SOURCE)
    engine = Engine(RamSlotPool(4, SLOT_BYTES), make_cache_manager("lru", LAYERS, EXPERTS, 4), transfer, verify)
    run(engine, 0, [0, 1])
    run(engine, 0, [0, 1, 2])
    assert [expert for expert, _ in seen] == [(0, 0), (0, 1), (0, 2)]


def test_a_failed_verification_is_never_served() -> None:
    def refuse(expert: ExpertId, _: int) -> None:
        raise InvariantError(f"{expert} is wrong")

    engine = Engine(RamSlotPool(4, 64), make_cache_manager("lru", LAYERS, EXPERTS, 4), ManualTransfer(SOURCE), refuse)
    with pytest.raises(InvariantError, match="is wrong"):
        next(engine.serve(Routed(0, [0, 1])))
    assert engine.pool.resident == 0


def test_a_layer_without_needs_yields_nothing() -> None:
    engine, transfer = make(2)
    assert run(engine, 0, []) == []
    assert transfer.submitted == []


def test_clear_empties_everything() -> None:
    engine, transfer = make(4)
    run(engine, 0, [0, 1])
    engine.clear()
    assert engine.pool.resident == 0
    assert transfer.cancels == 1
    run(engine, 0, [0, 1])
    assert engine.counters.misses == 4
