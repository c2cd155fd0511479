"""A link that is held to a bandwidth: exact over time, fair between chunks, and never in anyone's way."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.config import parse_bandwidth
from finemoe.errors import ConfigError
from finemoe.store.bandwidth import LAG_S, Throttle
from finemoe.store.reader import ReaderThreads
from finemoe.types import ByteRange, ExpertId, Landed
from tests.fakes import MemorySource

MIB = 1 << 20


def source(count: int, size_bytes: int = 100) -> MemorySource:
    return MemorySource({ExpertId(0, i): bytes([i % 256]) * size_bytes for i in range(count)})


def moved(transfer: ReaderThreads, held: MemorySource, *, urgent: bool = True) -> float:
    """Moves everything; how long that took."""
    start_s = time.perf_counter()
    slots = {expert: bytearray(len(data)) for expert, data in held.experts.items()}
    for expert, slot in slots.items():
        transfer.submit(expert, memoryview(slot), urgent=urgent)
    landed: list[Landed] = []
    while len(landed) < len(slots):
        landed += transfer.wait()
    assert slots == held.experts
    return time.perf_counter() - start_s


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 0.02)), min_size=1, max_size=60))
def test_whoever_wakes_up_late_loses_nothing(pieces: list[tuple[int, float]]) -> None:
    throttle = Throttle(1000)
    now_s = asked_s = 100.0
    for length_bytes, late_s in pieces:
        now_s = max(now_s, now_s + throttle.delay_s(now_s)) + late_s
        come_s = throttle.begin(length_bytes, asked_s, now_s)
    assert come_s == pytest.approx(asked_s + sum(length for length, _ in pieces) / 1000)


def test_an_idle_link_saves_nothing_up() -> None:
    throttle = Throttle(1000)
    assert throttle.begin(500, asked_s=10.0, now_s=10.0) == 10.5
    assert throttle.begin(500, asked_s=20.0, now_s=20.0) == 20.5


def test_a_slow_disk_does_not_save_up_more_than_the_lag() -> None:
    throttle = Throttle(1000)
    assert throttle.begin(1000, asked_s=0.0, now_s=9.0) == pytest.approx(10.0 - LAG_S)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_link_moves_what_its_bandwidth_allows(threads: int) -> None:
    held = source(40, 10_000)
    transfer = ReaderThreads(held, threads, chunk_bytes=1_000, bandwidth_bytes_s=800_000)
    try:
        assert moved(transfer, held) == pytest.approx(0.5, rel=0.15)  # other work shares the machine
        assert transfer.moved_bytes == 400_000
        assert transfer.bandwidth_bytes_s == 800_000
    finally:
        transfer.close()


def test_one_expert_alone_takes_its_own_time() -> None:
    held = source(1, 100_000)
    transfer = ReaderThreads(held, 4, chunk_bytes=25_000, bandwidth_bytes_s=500_000)
    try:
        assert moved(transfer, held) >= 0.199
    finally:
        transfer.close()


def test_a_link_that_is_faster_than_the_disk_leaves_it_its_own_speed() -> None:
    held = source(10, 100)
    held.before = lambda *_: time.sleep(0.01)
    transfer = ReaderThreads(held, 1, chunk_bytes=100, bandwidth_bytes_s=1e9)
    try:
        assert moved(transfer, held) >= 0.1
    finally:
        transfer.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_urgent_overtakes_all_that_waits_for_the_link(threads: int) -> None:
    begun = threading.Event()
    held = source(3)
    held.before = lambda *_: begun.set()
    slots = {expert: bytearray(100) for expert in held.experts}
    first, second, urgent = slots
    transfer = ReaderThreads(held, threads, chunk_bytes=10, bandwidth_bytes_s=100)  # a chunk takes 0.1 s
    try:
        for expert in (first, second):
            transfer.submit(expert, memoryview(slots[expert]), urgent=False)
        assert begun.wait(30)
        transfer.submit(urgent, memoryview(slots[urgent]), urgent=True)
        assert [landed.expert for landed in transfer.wait()] == [urgent]
        assert held.reads[:11].count(urgent) >= 10 - 1
        assert held.reads[0] == first
    finally:
        transfer.close()


def test_cancel_and_close_do_not_wait_for_a_slow_link() -> None:
    held = source(2)
    transfer = ReaderThreads(held, 4, chunk_bytes=50, bandwidth_bytes_s=1)  # a chunk takes 50 s
    slots = {expert: bytearray(100) for expert in held.experts}
    start_s = time.perf_counter()
    for expert, slot in slots.items():
        transfer.submit(expert, memoryview(slot))
    while not held.reads:
        time.sleep(0.001)
    transfer.cancel_all()
    transfer.submit(ExpertId(0, 0), memoryview(slots[ExpertId(0, 0)]))
    transfer.close()
    assert time.perf_counter() - start_s < 20


def test_failures_are_reported_over_a_slow_link_too() -> None:
    def fail(expert: ExpertId, _: ByteRange, start_bytes: int) -> None:
        if start_bytes == 20:
            raise OSError(5, "Input/output error")

    held = source(1)
    held.before = fail
    transfer = ReaderThreads(held, 2, chunk_bytes=10, bandwidth_bytes_s=10_000)
    try:
        transfer.submit(ExpertId(0, 0), memoryview(bytearray(100)))
        assert isinstance(transfer.wait()[0].error, OSError)
    finally:
        transfer.close()


@pytest.mark.parametrize(
    ("text", "bandwidth_bytes_s"), [("500MiB", 500 * MIB), ("1.5GB/s", 1.5e9), ("2 gib", 2048 * MIB), ("4096", 4096)]
)
def test_a_bandwidth_is_read(text: str, bandwidth_bytes_s: float) -> None:
    assert parse_bandwidth(text) == bandwidth_bytes_s


@pytest.mark.parametrize("text", ["", "fast", "-1MiB", "0", "25%", "5 parsecs", "0.1B"])
def test_what_is_no_bandwidth_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--link-bandwidth"):
        parse_bandwidth(text)
