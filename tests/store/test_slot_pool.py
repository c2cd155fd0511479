"""The slot pool never reuses a slot that is loading or pinned, which would give wrong weights."""

from __future__ import annotations

import mmap
import sys
from types import FrameType
from typing import NoReturn

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from finemoe.budget import format_bytes
from finemoe.errors import BudgetError, InvariantError
from finemoe.policy import POLICIES, make_cache_manager
from finemoe.store import RamSlotPool, slot_pool
from finemoe.types import ExpertId, Plan, Routed

A, B, C = ExpertId(0, 0), ExpertId(0, 1), ExpertId(1, 0)
SLOT_BYTES = 64


def ready(under_test: RamSlotPool, expert: ExpertId) -> None:
    under_test.reserve(expert, None)
    under_test.landed(expert)


def test_a_loading_slot_cannot_be_taken() -> None:
    under_test = RamSlotPool(1, SLOT_BYTES)
    under_test.reserve(A, None)
    with pytest.raises(InvariantError, match="is not ready and can't make room"):
        under_test.reserve(B, A)


def test_a_pinned_slot_cannot_be_taken_until_its_last_pin_is_gone() -> None:
    under_test = RamSlotPool(1, SLOT_BYTES)
    ready(under_test, A)
    assert under_test.pin(A) == under_test.pin(A)
    under_test.unpin(A)
    with pytest.raises(InvariantError, match="is in use and can't make room"):
        under_test.reserve(B, A)
    under_test.unpin(A)
    under_test.reserve(B, A)


def test_an_expert_that_is_not_ready_cannot_be_pinned_or_evicted() -> None:
    under_test = RamSlotPool(2, SLOT_BYTES)
    under_test.reserve(A, None)
    with pytest.raises(InvariantError, match="used without being ready"):
        under_test.pin(A)
    with pytest.raises(InvariantError, match="used without being ready"):
        under_test.pin(B)
    with pytest.raises(InvariantError, match="is not ready and can't make room"):
        under_test.reserve(C, B)


def test_an_expert_has_one_slot() -> None:
    under_test = RamSlotPool(2, SLOT_BYTES)
    under_test.reserve(A, None)
    with pytest.raises(InvariantError, match="has a slot already"):
        under_test.reserve(A, None)


def test_a_full_pool_has_no_free_slot() -> None:
    under_test = RamSlotPool(1, SLOT_BYTES)
    under_test.reserve(A, None)
    with pytest.raises(InvariantError, match="no free slot"):
        under_test.reserve(B, None)


def test_an_unexpected_landing_or_failure_is_an_error() -> None:
    under_test = RamSlotPool(1, SLOT_BYTES)
    with pytest.raises(InvariantError, match="landed without being expected"):
        under_test.landed(A)
    with pytest.raises(InvariantError, match="failed without being expected"):
        under_test.failed(A)
    ready(under_test, A)
    with pytest.raises(InvariantError, match="unpinned more often"):
        under_test.unpin(A)


def test_an_expert_in_flight_is_never_counted_as_resident() -> None:
    under_test = RamSlotPool(2, SLOT_BYTES)
    ready(under_test, A)
    seen = set()

    def ask(
        _frame: FrameType, _event: str, _argument: object
    ) -> object:  # between any two lines, as another thread may
        seen.add(under_test.resident)
        return ask

    before = sys.gettrace()
    sys.settrace(ask)  # type: ignore[arg-type] # it returns itself
    try:
        under_test.reserve(B, None)
        under_test.failed(B)
    finally:
        sys.settrace(before)
    assert seen == {1}


def test_slots_do_not_overlap_and_are_written_in_place() -> None:
    under_test = RamSlotPool(3, SLOT_BYTES)
    for slot in range(3):
        under_test.writable(slot)[:] = bytes([slot + 1]) * SLOT_BYTES
    for slot in range(3):
        assert under_test.bytes_of(slot).tolist() == [slot + 1] * SLOT_BYTES


def test_the_integrity_check_finds_lost_and_shared_slots() -> None:
    lost, shared, pinned = RamSlotPool(2, SLOT_BYTES), RamSlotPool(2, SLOT_BYTES), RamSlotPool(2, SLOT_BYTES)
    lost._free.pop()
    shared._slot[A] = 0
    pinned._pins[A] = 1
    for broken in (lost, shared, pinned):
        with pytest.raises(InvariantError):
            broken.check_integrity()


def test_a_pool_beyond_the_machine_is_refused_with_the_flag_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_pool, "available_bytes", lambda: 5 << 20)
    with pytest.raises(BudgetError, match=r"--expert-memory: 6.0 MiB for 6 experts, but only 5.0 MiB"):
        RamSlotPool(6, 1 << 20)
    RamSlotPool(5, 1 << 20).close()


def test_a_failed_allocation_is_a_budget_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(BudgetError, match=r"^--expert-memory: .*give a smaller budget$"):
        RamSlotPool(2, SLOT_BYTES)


def test_an_absurdly_large_pool_is_refused_before_memory_is_allocated() -> None:
    with pytest.raises(BudgetError, match="--expert-memory"):
        RamSlotPool(1 << 40, 1 << 30)


def test_a_closed_pool_frees_its_memory_once_nothing_views_it() -> None:
    under_test = RamSlotPool(2, SLOT_BYTES)
    view = under_test.bytes_of(0)
    under_test.close()
    assert view.tolist() == [0] * SLOT_BYTES  # a view keeps the memory
    again = RamSlotPool(2, SLOT_BYTES)
    again.close()
    assert again._memory.closed
    again.close()
    assert format_bytes(again.size_bytes) == "128 B"


class PoolAndCacheManager(RuleBasedStateMachine):
    """Pool and cache manager agree after any legal series of events; a slot's bytes name its expert."""

    LAYERS, EXPERTS = 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.pool: RamSlotPool | None = None
        self.in_flight: list[ExpertId] = []
        self.needed: set[ExpertId] = set()
        self.pinned: dict[ExpertId, int] = {}

    @precondition(lambda self: self.pool is None)
    @rule(policy=st.sampled_from(POLICIES), capacity=st.integers(1, 9))
    def start(self, policy: str, capacity: int) -> None:
        self.pool = RamSlotPool(capacity, SLOT_BYTES)
        self.cache_manager = make_cache_manager(policy, self.LAYERS, self.EXPERTS, capacity)

    @precondition(lambda self: self.pool is not None and not self.needed)
    @rule(layer=st.integers(0, 1), experts=st.sets(st.integers(0, 3)))
    def route(self, layer: int, experts: set[int]) -> None:
        assert self.pool is not None
        for expert in sorted(experts):
            needed = ExpertId(layer, expert)
            self.needed.add(needed)
            if self.cache_manager.is_resident(needed):
                self.pinned[needed] = self.pool.pin(needed)
        self._execute(self.cache_manager.routed(Routed(layer, tuple(sorted(experts)))))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        assert self.pool is not None
        expert = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(expert)
        self.pool.landed(expert)
        if expert in self.needed:
            self.pinned[expert] = self.pool.pin(expert)
        self._execute(self.cache_manager.landed(expert))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        assert self.pool is not None
        expert = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(expert)
        self.needed.discard(expert)
        self.pool.failed(expert)
        self.cache_manager.failed(expert)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        assert self.pool is not None
        expert = data.draw(st.sampled_from(sorted(self.pinned)))
        slot = self.pinned.pop(expert)
        self.needed.remove(expert)
        assert self.pool.bytes_of(slot).unique().tolist() == [self._mark(expert)], "a slot was taken while in use"
        self.pool.unpin(expert)
        self._execute(self.cache_manager.used(expert))

    @precondition(lambda self: self.pool is not None)
    @rule()
    def clear(self) -> None:
        assert self.pool is not None
        self.pool.clear()
        self.cache_manager.clear()
        self.in_flight.clear()
        self.needed.clear()
        self.pinned.clear()

    @invariant()
    def pool_and_cache_manager_agree(self) -> None:
        if self.pool is None:
            return
        self.pool.check_integrity()
        self.cache_manager.check_integrity()
        ids = [ExpertId(layer, expert) for layer in range(self.LAYERS) for expert in range(self.EXPERTS)]
        assert self.pool.resident == sum(map(self.cache_manager.is_resident, ids))
        assert set(self.in_flight) == {expert for expert in ids if self.cache_manager.is_in_flight(expert)}

    def _execute(self, plan: Plan) -> None:
        assert self.pool is not None
        for expert, victim, _ in plan.fetches:
            slot = self.pool.reserve(expert, victim)
            self.pool.writable(slot)[:] = bytes([self._mark(expert)]) * SLOT_BYTES
            self.in_flight.append(expert)

    def _mark(self, expert: ExpertId) -> int:
        return 1 + expert.layer * self.EXPERTS + expert.expert


TestPoolAndCacheManager = PoolAndCacheManager.TestCase
TestPoolAndCacheManager.settings = settings(max_examples=60, stateful_step_count=40)
