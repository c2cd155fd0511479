"""No slot is read before its bytes are there, nor overwritten while it is read, whatever the streams' delays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.checkpoint import LayerLayout
from finemoe.engine.engine import Engine
from finemoe.errors import ExpertReadError
from finemoe.gpu import copy_queue
from finemoe.gpu.copier import HostToDeviceCopier
from finemoe.gpu.copy_queue import CopyPiece, slice_pieces
from finemoe.gpu.counters import DeviceHitCounter, StallCounter
from finemoe.gpu.expert_layer import DeviceExpertLayer
from finemoe.gpu.host_tier import HostTier
from finemoe.gpu.slot_pool import DeviceSlotPool
from finemoe.policy import make_cache_manager
from finemoe.store.reader_threads import ReaderThreads
from finemoe.types import ByteRange, ExpertId, Step
from tests.fakes import MemorySource
from tests.gpu.simulated import Clock, SimulatedDevice, SimulatedEvent

LAYERS, EXPERTS, SLOT_BYTES = 3, 6, 192
HALF = SLOT_BYTES // 2
PIECES = [CopyPiece(HALF, 0, HALF), CopyPiece(0, HALF, HALF)]  # the two halves are swapped
BYTES = {
    ExpertId(n, e): bytes([n * 16 + e] * HALF + [128 + n * 16 + e] * HALF)
    for n in range(LAYERS)
    for e in range(EXPERTS)
}


@dataclass
class Rig:
    """Engine, copier, host tier and layers over simulated devices."""

    devices: list[SimulatedDevice]
    source: MemorySource
    copier: HostToDeviceCopier
    pool: DeviceSlotPool
    engine: Engine
    layers: list[DeviceExpertLayer]
    stalls: StallCounter

    def run(self, layer: int, experts: Sequence[int], *, until: int | None = None) -> None:
        """Serves a layer, with a kernel per expert that checks its bytes; aborts after `until` experts."""
        done = 0
        with torch.no_grad():
            waves = self.layers[layer].waves(sorted(experts))
            for device, wave in waves:
                for expert, slot in wave:
                    memory = self.pool.bytes_of(slot)
                    data = BYTES[ExpertId(layer, expert)]
                    expected = torch.frombuffer(bytearray(data[HALF:] + data[:HALF]), dtype=torch.uint8)
                    self.devices[device].launch(slot - self.pool.starts[device], partial(torch.equal, memory, expected))
                    done += 1
                    if done == until:
                        waves.close()  # type: ignore[attr-defined] # a generator
                        return
        self.stalls.collect()

    @property
    def faults(self) -> list[str]:
        return [fault for device in self.devices for fault in device.faults]


@contextmanager
def make_rig(
    seed: int = 0, devices: int = 1, capacity: int = 5, host_slots: int = 18, policy: str = "lru", *, fill: bool = True
) -> Iterator[Rig]:
    made = [SimulatedDevice(seed + 2 * i, SLOT_BYTES) for i in range(devices)]
    source = MemorySource(BYTES)
    pool = DeviceSlotPool(made, capacity, SLOT_BYTES, lambda e: (e.layer * EXPERTS + e.expert) % devices)
    host = HostTier(sorted(BYTES), host_slots, SLOT_BYTES, made)
    copier = HostToDeviceCopier(host, ReaderThreads(source, 2, chunk_bytes=64), made, lambda _: PIECES, fill=fill)
    cache_manager = make_cache_manager(policy, LAYERS, EXPERTS, capacity, devices=devices)
    engine = Engine(pool, cache_manager, copier)
    stalls = StallCounter(engine.counters)
    layout = LayerLayout("m", EXPERTS, (), ((),) * EXPERTS, SLOT_BYTES)
    lock = threading.RLock()
    layers = [
        DeviceExpertLayer(engine, lock, n, layout, {}, pool, stalls=stalls, hits=DeviceHitCounter(engine.counters))
        for n in range(LAYERS)
    ]
    try:
        yield Rig(made, source, copier, pool, engine, layers, stalls)
    finally:
        copier.close()
        for device in made:
            device.close()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_queue, "PREFETCH_CHUNK_BYTES", 40)  # divides neither a half nor an expert
    monkeypatch.setattr(copy_queue, "URGENT_CHUNK_BYTES", 100)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("the condition never became true")


Needs = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=LAYERS, max_size=2 * LAYERS)


@settings(max_examples=settings().max_examples // 2)
@given(
    seed=st.integers(0, 1 << 16),
    needs=Needs,
    devices=st.integers(1, 2),
    capacity=st.integers(2, 12),
    host_slots=st.integers(3, 18),
    policy=st.sampled_from(["lru", "deepspeed"]),
    broken=st.integers(0, 5),
)
def test_slots_are_safe_under_random_delays(
    seed: int, needs: list[set[int]], devices: int, capacity: int, host_slots: int, policy: str, broken: int
) -> None:
    with make_rig(seed, devices, capacity, host_slots, policy) as rig:
        rig.engine.begin([Step(0, 0, torch.zeros(1, dtype=torch.int32).numpy())])
        for number, experts in enumerate(needs):
            rig.run(number % LAYERS, sorted(experts), until=1 if number == broken else None)
            rig.engine.check_integrity()
        rig.engine.end()
    assert rig.faults == []


@pytest.mark.parametrize("missing", ["record_use", "compute_wait"])
def test_the_simulated_device_detects_missing_synchronization(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_rig(capacity=2) as rig:
        if missing == "record_use":
            monkeypatch.setattr(rig.pool, "record_use", lambda *_: None)
        else:
            monkeypatch.setattr(rig.devices[0], "compute_wait", lambda *_: None)
        for _ in range(10):
            rig.run(0, [0, 1, 2])
            rig.run(1, [3, 4, 5])
    expected = "overwritten while a kernel may read it" if missing == "record_use" else "read before it was written"
    assert any(expected in fault for fault in rig.faults)


def test_experts_in_the_host_tier_are_not_read_again() -> None:
    with make_rig(capacity=2, fill=False) as rig:
        for _ in range(3):
            rig.run(0, [0, 1, 2, 3])
        rig.engine.clear()  # waits for chunks in flight
        assert rig.copier.moved_bytes >= 8 * SLOT_BYTES
        assert rig.copier.disk_bytes == 4 * SLOT_BYTES
        assert rig.copier.host.resident == 4


def test_the_host_tier_fills_by_itself() -> None:
    with make_rig() as rig:
        wait_until(lambda: rig.copier.host.resident == len(BYTES))
        assert rig.copier.moved_bytes == 0


def test_stall_is_the_time_that_the_device_waited() -> None:
    with make_rig(capacity=6) as rig:
        rig.run(0, range(6))
        rig.stalls.collect(wait=True)
        stall_s = rig.engine.counters.stall_s
        assert stall_s > 0
        assert 0 < rig.engine.counters.stalled_bytes <= 6 * SLOT_BYTES
        rig.run(0, range(6))
        rig.stalls.collect(wait=True)
        assert rig.engine.counters.stall_s == stall_s
        assert (rig.engine.counters.hits, rig.engine.counters.misses) == (6, 6)


def test_a_read_error_fails_the_layer_and_nothing_else() -> None:
    def broken(expert: ExpertId, run: ByteRange, start_bytes: int) -> None:
        if expert == ExpertId(0, 2):
            raise OSError(5, "Input/output error", "shard")

    with make_rig(fill=False) as rig:
        rig.source.before = broken
        with pytest.raises(ExpertReadError, match="shard: can't read expert 2 of MoE layer 0"):
            rig.run(0, [0, 1, 2])
        rig.run(0, [0, 1, 3])
        rig.engine.check_integrity()
    assert rig.faults == []


def test_an_error_of_the_device_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with make_rig() as rig:
        monkeypatch.setattr(rig.devices[0], "copy", fails)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            rig.run(0, [0, 1])


def test_an_asynchronous_error_of_the_device_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("unspecified launch failure")

    with make_rig(fill=False) as rig:
        device, copier = rig.devices[0], rig.copier
        mark = device.record_copies

        def mark_broken() -> SimulatedEvent:
            event = mark()
            event.wait = fails  # type: ignore[method-assign]
            return event

        def run() -> None:
            rig.run(0, [0])
            wait_until(lambda: copier._fault is not None)
            rig.run(0, [1])

        with monkeypatch.context() as patched:
            patched.setattr(device, "record_copies", mark_broken)
            with pytest.raises(RuntimeError, match="unspecified launch failure"):
                run()
        rig.run(0, [0, 1])
        rig.engine.check_integrity()


def test_an_error_while_filling_the_host_tier_is_raised() -> None:
    def fails() -> None:
        raise RuntimeError("nothing to fill with")

    with make_rig(fill=False) as rig:
        readers = rig.copier._readers
        readers.when_idle = fails
        readers.wake()
        wait_until(lambda: readers._fault is not None)
        readers.when_idle = None
        with pytest.raises(RuntimeError, match="nothing to fill with"):
            rig.run(0, [0])
        rig.run(0, [0, 1])
        rig.engine.check_integrity()


def test_a_demand_load_overtakes_a_prefetch_after_the_chunks_in_flight() -> None:
    with make_rig(capacity=6) as rig:
        rig.run(0, [0, 1])  # the host tier has these
        rig.engine.clear()
        device, pool, copier = rig.devices[0], rig.pool, rig.copier
        gate = SimulatedEvent(device, Clock())
        device.copies_wait(gate)  # nothing moves until it fires
        copied: list[int] = []
        copy = device.copy

        def note(into: torch.Tensor, source: torch.Tensor) -> None:
            copied.append((into.data_ptr() - pool.memory[0].data_ptr()) // SLOT_BYTES)
            copy(into, source)

        device.copy = note  # type: ignore[method-assign]
        prefetched, urgent = (pool.reserve(ExpertId(0, e), None) for e in (0, 1))
        copier.submit(ExpertId(0, 0), pool.writable(prefetched), urgent=False)
        copier.submit(ExpertId(0, 1), pool.writable(urgent))
        gate.fire()
        landed: list[ExpertId] = []
        while len(landed) < 2:
            landed += [each.expert for each in copier.wait()]
    assert landed == [ExpertId(0, 1), ExpertId(0, 0)]
    assert copied.index(urgent) <= copy_queue.MAX_PREFETCH_CHUNKS
    assert copied[-1] == prefetched


@given(st.integers(0, SLOT_BYTES), st.integers(0, SLOT_BYTES))
def test_pieces_are_sliced_by_bytes_of_the_expert(one: int, other: int) -> None:
    begin, end = sorted((one, other))
    data = bytes(range(SLOT_BYTES))
    moved = b"".join(data[p.source_bytes : p.source_bytes + p.length_bytes] for p in PIECES)
    into = bytearray(SLOT_BYTES)
    for source, target, length in slice_pieces(PIECES, begin, end):
        into[target : target + length] = data[source : source + length]
    assert into == bytes(begin) + moved[begin:end] + bytes(SLOT_BYTES - end)
