"""Reader threads: bytes land in place, demand loads go first, errors are reported, nothing blocks for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.store.bandwidth import LinkTotals
from finemoe.store.reader_threads import ReaderThreads
from finemoe.types import ByteRange, ExpertId, Landed
from tests.fakes import MemorySource
from tests.store.readers import Gate, collect, experts, reading, slots_for, submit


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 200), st.integers(1, 5), st.integers(1, 64), st.integers(1, 8))
def test_every_byte_lands_in_its_place(
    count: int, size_bytes: int, pieces: int, chunk_bytes: int, threads: int
) -> None:
    source = MemorySource(experts(count, size_bytes), pieces)
    slots = slots_for(source)
    with reading(source, threads, chunk_bytes) as transfer:
        submit(transfer, slots)
        landed = collect(transfer, count)
        assert transfer.moved_bytes == count * size_bytes
    assert all(item.error is None for item in landed.values())
    assert slots == source.experts


def test_nothing_is_accounted_unless_attached() -> None:
    source = MemorySource(experts(2))
    with reading(source) as transfer:
        submit(transfer, slots_for(source))
        collect(transfer, 2)
        assert transfer.link_totals() == LinkTotals()


def test_accounting_can_be_attached_while_experts_are_in_flight() -> None:
    gate = Gate()
    source = MemorySource(experts(3), before=gate)
    with reading(source, threads=1, chunk_bytes=1000) as transfer:
        submit(transfer, slots_for(source), urgent=False)
        assert gate.entered.wait(30)
        transfer.attach_accounting()
        transfer.cancel(ExpertId(0, 2))
        gate.open.set()
        collect(transfer, 3)
        slots = slots_for(source)
        submit(transfer, slots)
        collect(transfer, 3)
        totals = transfer.link_totals()
    assert totals.urgent_bytes == pytest.approx(300)
    assert totals.prefetch_s == 0
    assert slots == source.experts


def test_link_time_counts_while_experts_are_in_flight() -> None:
    gate = Gate()
    source = MemorySource(experts(2), before=gate)
    with reading(source) as transfer:
        transfer.attach_accounting()
        assert transfer.link_totals() == LinkTotals()
        submit(transfer, slots_for(source))
        assert gate.entered.wait(30)
        before_s = transfer.link_totals().urgent_s
        time.sleep(0.01)
        assert transfer.link_totals().urgent_s >= before_s + 0.01
        gate.open.set()
        collect(transfer, 2)
        totals = transfer.link_totals()
        time.sleep(0.01)
        assert transfer.link_totals() == totals
    assert totals.urgent_bytes == pytest.approx(200)
    assert totals.prefetch_s == totals.prefetch_bytes == 0


def test_bytes_of_prefetched_promoted_and_cancelled_experts_are_accounted_apart() -> None:
    gate = Gate()
    source = MemorySource(experts(3), before=gate)
    with reading(source, threads=1, chunk_bytes=1000) as transfer:
        transfer.attach_accounting()
        submit(transfer, slots_for(source), urgent=False)
        assert gate.entered.wait(30)
        transfer.promote(ExpertId(0, 1))
        transfer.cancel(ExpertId(0, 2))
        gate.open.set()
        collect(transfer, 3)
        totals = transfer.link_totals()
    assert totals.urgent_bytes + totals.prefetch_bytes == pytest.approx(200)
    assert totals.urgent_s > 0
    assert totals.prefetch_s > 0


def test_many_threads_over_many_rounds_lose_nothing() -> None:
    source = MemorySource(experts(20, 500), 3)
    with reading(source, threads=16, chunk_bytes=7) as transfer:
        for _ in range(10):
            slots = slots_for(source)
            submit(transfer, slots)
            collect(transfer, 20)
            assert slots == source.experts


def test_a_demand_load_overtakes_prefetches_after_the_chunk_being_read() -> None:
    gate = Gate()
    source = MemorySource(experts(3), before=gate)
    slots = slots_for(source)
    prefetched, also_prefetched, urgent = slots
    with reading(source, threads=1, chunk_bytes=10) as transfer:
        transfer.submit(prefetched, memoryview(slots[prefetched]), urgent=False)
        transfer.submit(also_prefetched, memoryview(slots[also_prefetched]), urgent=False)
        assert gate.entered.wait(30)
        transfer.submit(urgent, memoryview(slots[urgent]), urgent=True)
        gate.open.set()
        collect(transfer, 3)
    assert source.reads == [prefetched, *[urgent] * 10, *[prefetched] * 9, *[also_prefetched] * 10]


def test_an_error_is_reported_for_its_expert_only() -> None:
    broken = ExpertId(0, 3)

    def fail(expert: ExpertId, *_: object) -> None:
        if expert == broken:
            raise OSError(5, "Input/output error", "shard-2.safetensors")

    source = MemorySource(experts(6), before=fail)
    slots = slots_for(source)
    with reading(source) as transfer:
        submit(transfer, slots)
        landed = collect(transfer, 6)
    error = landed.pop(broken).error
    assert isinstance(error, OSError)
    assert error.filename == "shard-2.safetensors"
    assert all(item.error is None for item in landed.values())
    assert all(slots[expert] == source.experts[expert] for expert in landed)


@pytest.mark.parametrize("kind", [ValueError, MemoryError, RuntimeError])
def test_an_error_of_any_type_is_reported_and_the_reader_continues(kind: type[Exception]) -> None:
    broken = [True]

    def fail(*_: object) -> None:
        if broken[0]:
            raise kind("broken")

    source = MemorySource(experts(1), before=fail)
    slots = slots_for(source)
    with reading(source, threads=1) as transfer:
        submit(transfer, slots)
        assert isinstance(transfer.wait()[0].error, kind)
        broken[0] = False
        submit(transfer, slots)
        assert transfer.wait()[0].error is None
    assert slots == source.experts


def test_the_rest_of_a_failed_expert_is_not_read() -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    source = MemorySource(experts(1), before=fail)
    with reading(source, threads=1, chunk_bytes=10) as transfer:
        submit(transfer, slots_for(source))
        collect(transfer, 1)
    assert len(source.reads) == 1


def test_cancel_all_returns_only_once_no_slot_is_written_to() -> None:
    gate = Gate()
    source = MemorySource(experts(4), before=gate)
    slots = slots_for(source)
    with reading(source) as transfer:
        submit(transfer, slots)
        assert gate.entered.wait(30)
        cancelling = threading.Thread(target=transfer.cancel_all)
        cancelling.start()
        cancelling.join(0.05)
        assert cancelling.is_alive(), "cancel returned while a reader was writing"
        gate.open.set()
        cancelling.join(30)
        assert not cancelling.is_alive()
        held = {expert: bytes(slot) for expert, slot in slots.items()}
        time.sleep(0.05)
        assert held == slots, "a reader wrote after cancel"
        assert transfer.poll() == []
        with pytest.raises(RuntimeError, match="nothing is in flight"):
            transfer.wait()


def test_cancel_all_drops_unreported_transfers_and_the_next_fetch_works() -> None:
    source = MemorySource(experts(3))
    with reading(source) as transfer:
        for _ in range(20):
            submit(transfer, slots_for(source))
            transfer.cancel_all()
            slots = slots_for(source)
            submit(transfer, slots)
            assert len(collect(transfer, 3)) == 3
            assert slots == source.experts


def test_poll_reports_finished_transfers_and_never_blocks() -> None:
    gate = Gate()
    source = MemorySource(experts(1), before=gate)
    with reading(source) as transfer:
        assert transfer.poll() == []
        submit(transfer, slots_for(source))
        assert transfer.poll() == []
        gate.open.set()
        landed: list[Landed] = []
        deadline_s = time.monotonic() + 30
        while not landed and time.monotonic() < deadline_s:
            landed = transfer.poll()
        assert landed == [Landed(ExpertId(0, 0))]


def test_wait_with_nothing_in_flight_is_an_error() -> None:
    with reading(MemorySource({})) as transfer, pytest.raises(RuntimeError, match="nothing is in flight"):
        transfer.wait()


def test_close_ends_the_threads_and_refuses_more() -> None:
    before = threading.active_count()
    source = MemorySource(experts(8))
    transfer = ReaderThreads(source, 4, 8)
    submit(transfer, slots_for(source))
    transfer.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        transfer.submit(ExpertId(0, 0), memoryview(bytearray(100)))
    transfer.close()


def test_close_releases_a_waiting_consumer() -> None:
    gate = Gate()
    source = MemorySource(experts(2), before=gate)
    transfer = ReaderThreads(source, 1, 10)
    submit(transfer, slots_for(source))
    outcome: list[object] = []

    def wait() -> None:
        try:
            outcome.append(transfer.wait())
        except RuntimeError as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert gate.entered.wait(30)
    closing = threading.Thread(target=transfer.close)
    closing.start()
    time.sleep(0.05)
    gate.open.set()
    closing.join(30)
    waiting.join(10)
    assert not waiting.is_alive(), "the consumer still waits for a closed transfer"
    assert isinstance(outcome[0], RuntimeError)


def test_a_read_that_comes_up_short_is_an_error() -> None:
    def short(_: ExpertId, byte_range: ByteRange, start_bytes: int) -> None:
        if start_bytes + 30 > byte_range.length_bytes:
            raise OSError(5, "file ends", "short.safetensors")

    source = MemorySource(experts(1), before=short)
    with reading(source, chunk_bytes=25) as transfer:
        submit(transfer, slots_for(source))
        assert "short.safetensors" in str(transfer.wait()[0].error)


def test_chunks_are_cut_at_page_boundaries_of_the_file() -> None:
    expert, reads = ExpertId(0, 0), []

    class RecordingSource(MemorySource):
        def byte_ranges(self, expert: ExpertId) -> Sequence[ByteRange]:
            return [
                replace(each, file_offset_bytes=each.file_offset_bytes + 100) for each in super().byte_ranges(expert)
            ]

        def read(self, byte_range: ByteRange, start_bytes: int, into: memoryview) -> None:
            reads.append((byte_range.file_offset_bytes + start_bytes, len(into)))
            super().read(byte_range, start_bytes, into)

    source = RecordingSource({expert: b"x" * 30_000})
    slots = slots_for(source)
    with reading(source, threads=1, chunk_bytes=8192) as transfer:
        submit(transfer, slots)
        collect(transfer, 1)
    assert slots == source.experts
    assert sorted(reads) == [(100, 8092), (8192, 8192), (16384, 8192), (24576, 5524)]
