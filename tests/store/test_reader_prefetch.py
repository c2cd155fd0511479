"""Prefetches in reader threads: how many threads read them, and when the next one is asked for."""

from __future__ import annotations

import threading
import time

import pytest

from finemoe.store.reader_threads import ReaderThreads
from finemoe.types import ExpertId
from tests.fakes import MemorySource
from tests.store.readers import Gate, collect, experts, reading, slots_for, submit


class Concurrency:
    """Counts how many threads read at the same time, demand loads and prefetches apart."""

    def __init__(self, urgent: set[ExpertId]) -> None:
        self.urgent, self.lock = urgent, threading.Lock()
        self.inside, self.most = {True: 0, False: 0}, {True: 0, False: 0}

    def read(self, expert: ExpertId) -> None:
        is_urgent = expert in self.urgent
        with self.lock:
            self.inside[is_urgent] += 1
            self.most[is_urgent] = max(self.most[is_urgent], self.inside[is_urgent])
        time.sleep(0.003)
        with self.lock:
            self.inside[is_urgent] -= 1


@pytest.mark.parametrize("limit", [1, 2])
def test_prefetches_are_limited_to_some_threads_and_demand_loads_use_all(limit: int) -> None:
    urgent = {ExpertId(0, 2), ExpertId(0, 3)}
    concurrency = Concurrency(urgent)
    source = MemorySource(experts(4, 160), before=lambda expert, *_: concurrency.read(expert))
    slots = slots_for(source)
    transfer = ReaderThreads(source, 4, 16, prefetch_threads=limit)
    try:
        submit(transfer, {e: s for e, s in slots.items() if e not in urgent}, urgent=False)
        submit(transfer, {e: s for e, s in slots.items() if e in urgent})
        collect(transfer, 4)
    finally:
        transfer.close()
    assert concurrency.most[False] == limit
    assert concurrency.most[True] > 2
    assert all(bytes(slot) == source.experts[expert] for expert, slot in slots.items())


@pytest.mark.parametrize("limit", [1, 3])
def test_no_prefetch_begins_before_the_last_demand_load_is_complete(limit: int) -> None:
    urgent, gate = ExpertId(0, 0), Gate()
    concurrency = Concurrency(set())

    def before(expert: ExpertId, *_: object) -> None:
        gate() if expert == urgent else concurrency.read(expert)

    source = MemorySource(experts(2, 160), before=before)
    slots = slots_for(source)
    transfer = ReaderThreads(source, 4, 160, prefetch_threads=limit)
    try:
        submit(transfer, {urgent: slots[urgent]})
        assert gate.entered.wait(30)
        transfer._chunk_bytes = 16
        submit(transfer, {ExpertId(0, 1): slots[ExpertId(0, 1)]}, urgent=False)
        time.sleep(0.02)
        assert source.reads == [urgent]
        gate.open.set()
        collect(transfer, 2)
    finally:
        transfer.close()
    assert concurrency.most[False] == limit  # as many as may


@pytest.mark.parametrize("urgent", [False, True])
def test_the_next_prefetch_is_asked_for_once_it_may_begin(*, urgent: bool) -> None:
    gate, asked = Gate(), threading.Event()
    source = MemorySource(experts(1), before=gate)
    with reading(source, threads=3, chunk_bytes=100) as transfer:
        submit(transfer, slots_for(source), urgent=urgent)
        assert gate.entered.wait(30)
        transfer.when_idle = asked.set
        transfer.wake()
        assert not asked.wait(0.02)
        gate.open.set()
        assert asked.wait(30)


def test_prefetches_are_asked_for_one_after_the_other() -> None:
    source = MemorySource(experts(50))
    slots = slots_for(source)
    left = list(slots.items())

    with reading(source, threads=4) as transfer:

        def choose() -> None:
            if left:
                expert, slot = left.pop()
                transfer.submit(expert, memoryview(slot), urgent=False)

        transfer.when_idle = choose
        transfer.wake()
        deadline_s = time.monotonic() + 30
        while transfer.moved_bytes < 50 * 100 and time.monotonic() < deadline_s:
            time.sleep(0.001)
        collect(transfer, 50)
    assert slots == source.experts


def test_a_promoted_prefetch_gets_all_threads() -> None:
    concurrency = Concurrency(set())
    source = MemorySource(experts(1, 320), before=lambda expert, *_: concurrency.read(expert))
    slots = slots_for(source)
    transfer = ReaderThreads(source, 4, 16, prefetch_threads=1)
    try:
        submit(transfer, slots, urgent=False)
        time.sleep(0.005)
        transfer.promote(ExpertId(0, 0))
        collect(transfer, 1)
    finally:
        transfer.close()
    assert concurrency.most[False] > 2
