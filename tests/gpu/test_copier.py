"""No slot is read before its bytes are there or written while in use, whatever the streams' delays."""

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
from finemoe.gpu import copy_queue as lane
from finemoe.gpu.copier import HostToDeviceCopier
from finemoe.gpu.copy_queue import CopyPiece, cut
from finemoe.gpu.expert_layer import DeviceExpertLayer, Touched
from finemoe.gpu.host_tier import HostTier
from finemoe.gpu.slot_pool import DeviceSlotPool, Stalls
from finemoe.policy import make_cache_manager
from finemoe.store.reader import ReaderThreads
from finemoe.types import ByteRange, ExpertId, Step
from tests.fakes import MemorySource
from tests.gpu.simulated import Clock, SimulatedDevice, SimulatedEvent

LAYERS, EXPERTS, SLOT_BYTES = 3, 6, 192
HALF = SLOT_BYTES // 2
PIECES = [CopyPiece(HALF, 0, HALF), CopyPiece(0, HALF, HALF)]  # the two halves change places on their way
BYTES = {
    ExpertId(n, e): bytes([n * 16 + e] * HALF + [128 + n * 16 + e] * HALF)
    for n in range(LAYERS)
    for e in range(EXPERTS)
}


@dataclass
class Rig:
    """An engine over simulated devices, and the real code between."""

    devices: list[SimulatedDevice]
    source: MemorySource
    link: HostToDeviceCopier
    pool: DeviceSlotPool
    engine: Engine
    layers: list[DeviceExpertLayer]
    stalls: Stalls

    def run(self, layer: int, experts: Sequence[int], *, until: int | None = None) -> None:
        """Serves a layer, with a kernel on each expert that checks its bytes; leaves off after `until` experts."""
        done = 0
        with torch.no_grad():
            waves = self.layers[layer].waves(sorted(experts))
            for at, wave in waves:
                for expert, slot in wave:
                    held = self.pool.bytes_of(slot)
                    data = BYTES[ExpertId(layer, expert)]
                    expected = torch.frombuffer(bytearray(data[HALF:] + data[:HALF]), dtype=torch.uint8)
                    self.devices[at].launch(slot - self.pool.starts[at], partial(torch.equal, held, expected))
                    done += 1
                    if done == until:
                        waves.close()  # type: ignore[attr-defined] # a generator
                        return
        self.stalls.settle()

    @property
    def faults(self) -> list[str]:
        return [fault for device in self.devices for fault in device.faults]


@contextmanager
def rig(
    seed: int = 0, devices: int = 1, capacity: int = 5, host_slots: int = 18, policy: str = "lru", *, fill: bool = True
) -> Iterator[Rig]:
    made = [SimulatedDevice(seed + 2 * i, SLOT_BYTES) for i in range(devices)]
    source = MemorySource(BYTES)
    pool = DeviceSlotPool(made, capacity, SLOT_BYTES, lambda e: (e.layer * EXPERTS + e.expert) % devices)
    host = HostTier(sorted(BYTES), host_slots, SLOT_BYTES, made)
    link = HostToDeviceCopier(host, ReaderThreads(source, 2, chunk_bytes=64), made, lambda _: PIECES, fill=fill)
    cache_manager = make_cache_manager(policy, LAYERS, EXPERTS, capacity, devices=devices)
    engine = Engine(pool, cache_manager, link)
    stalls = Stalls(engine.counters)
    layout = LayerLayout("m", EXPERTS, (), ((),) * EXPERTS, SLOT_BYTES)
    lock = threading.RLock()
    layers = [
        DeviceExpertLayer(engine, lock, n, layout, {}, pool, stalls=stalls, touched=Touched(engine.counters))
        for n in range(LAYERS)
    ]
    try:
        yield Rig(made, source, link, pool, engine, layers, stalls)
    finally:
        link.close()
        for device in made:
            device.close()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "CHUNK_BYTES", 40)  # neither a half nor an expert is a whole number of them
    monkeypatch.setattr(lane, "URGENT_CHUNK_BYTES", 100)


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to this")


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
    with rig(seed, devices, capacity, host_slots, policy) as under_test:
        under_test.engine.begin([Step(0, 0, torch.zeros(1, dtype=torch.int32).numpy())])
        for number, experts in enumerate(needs):
            under_test.run(number % LAYERS, sorted(experts), until=1 if number == broken else None)
            under_test.engine.check_integrity()
        under_test.engine.end()
    assert under_test.faults == []


@pytest.mark.parametrize("missing", ["used", "wait"])
def test_the_simulated_device_would_tell(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(capacity=2) as under_test:
        if missing == "used":
            monkeypatch.setattr(under_test.pool, "used", lambda *_: None)
        else:
            monkeypatch.setattr(under_test.devices[0], "compute_wait", lambda *_: None)
        for _ in range(10):
            under_test.run(0, [0, 1, 2])
            under_test.run(1, [3, 4, 5])
    told = "overwritten while a kernel may read it" if missing == "used" else "read before it was written"
    assert any(told in fault for fault in under_test.faults)


def test_what_the_host_tier_holds_is_not_read_again() -> None:
    with rig(capacity=2, fill=False) as under_test:
        for _ in range(3):
            under_test.run(0, [0, 1, 2, 3])
        under_test.engine.clear()  # which sees out what is under way
        assert under_test.link.moved_bytes >= 8 * SLOT_BYTES
        assert under_test.link.disk_bytes == 4 * SLOT_BYTES
        assert under_test.link.host.resident == 4


def test_the_host_tier_fills_by_itself() -> None:
    with rig() as under_test:
        wait_until(lambda: under_test.link.host.resident == len(BYTES))
        assert under_test.link.moved_bytes == 0


def test_stall_is_what_the_device_waited_for() -> None:
    with rig(capacity=6) as under_test:
        under_test.run(0, range(6))
        under_test.stalls.settle(wait=True)
        stall_s = under_test.engine.counters.stall_s
        assert stall_s > 0
        assert 0 < under_test.engine.counters.stalled_bytes <= 6 * SLOT_BYTES
        under_test.run(0, range(6))
        under_test.stalls.settle(wait=True)
        assert under_test.engine.counters.stall_s == stall_s
        assert (under_test.engine.counters.hits, under_test.engine.counters.misses) == (6, 6)


def test_a_read_that_fails_fails_the_layer_and_nothing_else() -> None:
    def broken(expert: ExpertId, run: ByteRange, start_bytes: int) -> None:
        if expert == ExpertId(0, 2):
            raise OSError(5, "Input/output error", "shard")

    with rig(fill=False) as under_test:
        under_test.source.before = broken
        with pytest.raises(ExpertReadError, match="shard: can't read expert 2 of MoE layer 0"):
            under_test.run(0, [0, 1, 2])
        under_test.run(0, [0, 1, 3])
        under_test.engine.check_integrity()
    assert under_test.faults == []


def test_a_device_that_fails_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with rig() as under_test:
        monkeypatch.setattr(under_test.devices[0], "copy", fails)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            under_test.run(0, [0, 1])


def test_a_device_that_fails_later_is_told_of_and_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("unspecified launch failure")

    with rig(fill=False) as under_test:
        device, link = under_test.devices[0], under_test.link
        mark = device.mark_copies

        def mark_broken() -> SimulatedEvent:
            event = mark()
            event.wait = fails  # type: ignore[method-assign]
            return event

        def run() -> None:
            under_test.run(0, [0])
            wait_until(lambda: link._fault is not None)
            under_test.run(0, [1])

        with monkeypatch.context() as patched:
            patched.setattr(device, "mark_copies", mark_broken)
            with pytest.raises(RuntimeError, match="unspecified launch failure"):
                run()
        under_test.run(0, [0, 1])
        under_test.engine.check_integrity()


def test_a_fault_while_the_disk_is_asked_to_fill_the_host_tier_hangs_nobody() -> None:
    def fails() -> None:
        raise RuntimeError("nothing to fill with")

    with rig(fill=False) as under_test:
        readers = under_test.link._readers
        readers.when_idle = fails
        readers.wake()
        wait_until(lambda: readers._fault is not None)
        readers.when_idle = None
        with pytest.raises(RuntimeError, match="nothing to fill with"):
            under_test.run(0, [0])
        under_test.run(0, [0, 1])
        under_test.engine.check_integrity()


def test_urgent_overtakes_a_prefetch_after_the_chunks_under_way() -> None:
    with rig(capacity=6) as under_test:
        under_test.run(0, [0, 1])  # the host tier has these
        under_test.engine.clear()
        device, pool, link = under_test.devices[0], under_test.pool, under_test.link
        gate = SimulatedEvent(device, Clock())
        device.copies_wait(gate)  # nothing moves until it fires
        copied: list[int] = []
        copy = device.copy

        def note(into: torch.Tensor, source: torch.Tensor) -> None:
            copied.append((into.data_ptr() - pool.memory[0].data_ptr()) // SLOT_BYTES)
            copy(into, source)

        device.copy = note  # type: ignore[method-assign]
        prefetched, urgent = (pool.reserve(ExpertId(0, e), None) for e in (0, 1))
        link.submit(ExpertId(0, 0), pool.writable(prefetched), urgent=False)
        link.submit(ExpertId(0, 1), pool.writable(urgent))
        gate.fire()
        landed: list[ExpertId] = []
        while len(landed) < 2:
            landed += [each.expert for each in link.wait()]
    assert landed == [ExpertId(0, 1), ExpertId(0, 0)]
    assert copied.index(urgent) <= lane.CHUNKS_AHEAD
    assert copied[-1] == prefetched


@given(st.integers(0, SLOT_BYTES), st.integers(0, SLOT_BYTES))
def test_chunks_are_cut_out_of_the_pieces(one: int, other: int) -> None:
    begin, end = sorted((one, other))
    data = bytes(range(SLOT_BYTES))
    moved = b"".join(data[p.source_bytes : p.source_bytes + p.length_bytes] for p in PIECES)
    into = bytearray(SLOT_BYTES)
    for source, target, length in cut(PIECES, begin, end):
        into[target : target + length] = data[source : source + length]
    assert into == bytes(begin) + moved[begin:end] + bytes(SLOT_BYTES - end)
