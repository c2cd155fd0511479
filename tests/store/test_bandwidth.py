"""Link accounting and the bandwidth throttle."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.budget import parse_bandwidth
from finemoe.errors import ConfigError
from finemoe.metrics import NEVER, Durations
from finemoe.store.bandwidth import CATCH_UP_S, LinkAccounting, Throttle
from finemoe.store.reader_threads import ReaderThreads
from finemoe.types import ByteRange, ExpertId, Landed
from tests.fakes import MemorySource

MIB = 1 << 20


def test_time_counts_for_demand_loads_first_and_not_on_an_idle_link() -> None:
    accounting = LinkAccounting()
    prefetch = accounting.submit(urgent=False, now_s=10, since_s=10)
    urgent = accounting.submit(urgent=True, now_s=12, since_s=12)
    accounting.land(urgent, 15)
    accounting.land(prefetch, 16)
    totals = accounting.totals(20)
    assert (totals.urgent_s, totals.prefetch_s) == (3, 3)


def test_time_of_a_transfer_in_flight_counts() -> None:
    accounting = LinkAccounting()
    accounting.submit(urgent=True, now_s=1, since_s=1)
    assert accounting.totals(4).urgent_s == 3
    accounting.clear(5)
    assert accounting.totals(9).urgent_s == 4


@pytest.mark.parametrize(("asked_s", "begins_s"), [(8.0, 8.0), (2.0, 6.0)])
def test_a_prefetch_begins_when_it_was_chosen_but_not_before_the_link_was_idle(asked_s: float, begins_s: float) -> None:
    accounting = LinkAccounting()
    accounting.land(accounting.submit(urgent=True, now_s=5, since_s=5), 6)
    accounting.land(accounting.submit(urgent=False, now_s=9, since_s=asked_s), 10)
    assert accounting.totals(10).prefetch_s == 10 - begins_s


def test_bytes_of_a_read_are_split_by_its_time() -> None:
    accounting = LinkAccounting()
    prefetch = accounting.submit(urgent=False, now_s=0, since_s=0)
    read_start = accounting.begin_read(0)
    accounting.promote(prefetch, 3)
    accounting.end_read(100, read_start, 4, accounted=True)
    totals = accounting.totals(4)
    assert (totals.prefetch_bytes, totals.urgent_bytes) == pytest.approx((75, 25))


def test_bytes_read_after_a_cancellation_count_for_nothing() -> None:
    accounting = LinkAccounting()
    prefetch = accounting.submit(urgent=False, now_s=0, since_s=0)
    read_start = accounting.begin_read(0)
    accounting.cancel(prefetch, 2)
    accounting.submit(urgent=True, now_s=2, since_s=2)
    accounting.end_read(100, read_start, 4, accounted=False)
    totals = accounting.totals(4)
    assert (totals.prefetch_bytes, totals.urgent_bytes) == pytest.approx((50, 0))


def test_prefetches_without_other_demand_loads_are_timed() -> None:
    accounting = LinkAccounting()
    first = accounting.submit(urgent=False, now_s=0, since_s=0)
    second = accounting.submit(urgent=False, now_s=1, since_s=1)
    accounting.land(first, 2)  # took 2
    accounting.land(second, 5)  # from 2 on: 3
    promoted = accounting.submit(urgent=False, now_s=6, since_s=6)
    accounting.promote(promoted, 7)
    accounting.submit(urgent=True, now_s=7, since_s=7)
    accounting.land(promoted, 10)  # 4: the other demand load was submitted after the promotion
    totals = accounting.totals(10)
    assert totals.passages == sum(map(Durations.one, (2, 3, 4)), NEVER)


@pytest.mark.parametrize("promoted", [False, True])
def test_a_prefetch_delayed_by_a_demand_load_is_not_timed(*, promoted: bool) -> None:
    accounting = LinkAccounting()
    prefetch = accounting.submit(urgent=False, now_s=0, since_s=0)
    accounting.land(accounting.submit(urgent=True, now_s=1, since_s=1), 2)
    if promoted:
        accounting.promote(prefetch, 3)
    accounting.land(prefetch, 4)
    assert accounting.totals(4).passages == NEVER


def make_source(count: int, size_bytes: int = 100) -> MemorySource:
    return MemorySource({ExpertId(0, i): bytes([i % 256]) * size_bytes for i in range(count)})


def read_all(transfer: ReaderThreads, source: MemorySource, *, urgent: bool = True) -> float:
    """Reads all experts. Returns how long that took."""
    start_s = time.perf_counter()
    slots = {expert: bytearray(len(data)) for expert, data in source.experts.items()}
    for expert, slot in slots.items():
        transfer.submit(expert, memoryview(slot), urgent=urgent)
    landed: list[Landed] = []
    while len(landed) < len(slots):
        landed += transfer.wait()
    assert slots == source.experts
    return time.perf_counter() - start_s


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 0.02)), min_size=1, max_size=60))
def test_late_readers_catch_up(pieces: list[tuple[int, float]]) -> None:
    throttle = Throttle(1000)
    now_s = submitted_s = 100.0
    for length_bytes, late_s in pieces:
        now_s = max(now_s, now_s + throttle.delay_s(now_s)) + late_s
        arrival_s = throttle.begin(length_bytes, submitted_s, now_s)
    assert arrival_s == pytest.approx(submitted_s + sum(length for length, _ in pieces) / 1000)


def test_idle_time_is_not_saved_up() -> None:
    throttle = Throttle(1000)
    assert throttle.begin(500, submitted_s=10.0, now_s=10.0) == 10.5
    assert throttle.begin(500, submitted_s=20.0, now_s=20.0) == 20.5


def test_a_slow_disk_catches_up_at_most_the_limit() -> None:
    throttle = Throttle(1000)
    assert throttle.begin(1000, submitted_s=0.0, now_s=9.0) == pytest.approx(10.0 - CATCH_UP_S)


@pytest.mark.parametrize("threads", [1, 4])
def test_reads_are_throttled_to_the_bandwidth(threads: int) -> None:
    source = make_source(40, 10_000)
    transfer = ReaderThreads(source, threads, chunk_bytes=1_000, bandwidth_bytes_s=800_000)
    try:
        assert read_all(transfer, source) == pytest.approx(0.5, rel=0.15)  # other work shares the machine
        assert transfer.moved_bytes == 400_000
        assert transfer.bandwidth_bytes_s == 800_000
    finally:
        transfer.close()


def test_a_single_expert_takes_its_bytes_over_the_bandwidth() -> None:
    source = make_source(1, 100_000)
    transfer = ReaderThreads(source, 4, chunk_bytes=25_000, bandwidth_bytes_s=500_000)
    try:
        assert read_all(transfer, source) >= 0.199
    finally:
        transfer.close()


def test_a_bandwidth_above_the_disks_has_no_effect() -> None:
    source = make_source(10, 100)
    source.before = lambda *_: time.sleep(0.01)
    transfer = ReaderThreads(source, 1, chunk_bytes=100, bandwidth_bytes_s=1e9)
    try:
        assert read_all(transfer, source) >= 0.1
    finally:
        transfer.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_demand_load_overtakes_all_prefetches_that_wait_for_the_link(threads: int) -> None:
    begun = threading.Event()
    source = make_source(3)
    source.before = lambda *_: begun.set()
    slots = {expert: bytearray(100) for expert in source.experts}
    first, second, urgent = slots
    transfer = ReaderThreads(source, threads, chunk_bytes=10, bandwidth_bytes_s=100)  # a chunk takes 0.1 s
    try:
        for expert in (first, second):
            transfer.submit(expert, memoryview(slots[expert]), urgent=False)
        assert begun.wait(30)
        transfer.submit(urgent, memoryview(slots[urgent]), urgent=True)
        assert [landed.expert for landed in transfer.wait()] == [urgent]
        assert source.reads[:11].count(urgent) >= 10 - 1
        assert source.reads[0] == first
    finally:
        transfer.close()


def test_cancel_and_close_do_not_wait_for_a_throttled_read() -> None:
    source = make_source(2)
    transfer = ReaderThreads(source, 4, chunk_bytes=50, bandwidth_bytes_s=1)  # a chunk takes 50 s
    slots = {expert: bytearray(100) for expert in source.experts}
    start_s = time.perf_counter()
    for expert, slot in slots.items():
        transfer.submit(expert, memoryview(slot))
    while not source.reads:
        time.sleep(0.001)
    transfer.cancel_all()
    transfer.submit(ExpertId(0, 0), memoryview(slots[ExpertId(0, 0)]))
    transfer.close()
    assert time.perf_counter() - start_s < 20


def test_errors_are_reported_with_a_throttle() -> None:
    def fail(expert: ExpertId, _: ByteRange, start_bytes: int) -> None:
        if start_bytes == 20:
            raise OSError(5, "Input/output error")

    source = make_source(1)
    source.before = fail
    transfer = ReaderThreads(source, 2, chunk_bytes=10, bandwidth_bytes_s=10_000)
    try:
        transfer.submit(ExpertId(0, 0), memoryview(bytearray(100)))
        assert isinstance(transfer.wait()[0].error, OSError)
    finally:
        transfer.close()


@pytest.mark.parametrize(
    ("text", "bandwidth_bytes_s"), [("500MiB", 500 * MIB), ("1.5GB/s", 1.5e9), ("2 gib", 2048 * MIB), ("4096", 4096)]
)
def test_a_bandwidth_is_parsed(text: str, bandwidth_bytes_s: float) -> None:
    assert parse_bandwidth(text) == bandwidth_bytes_s


@pytest.mark.parametrize("text", ["", "fast", "-1MiB", "0", "25%", "5 parsecs", "0.1B"])
def test_an_invalid_bandwidth_is_refused_with_the_flag_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--link-bandwidth"):
        parse_bandwidth(text)
