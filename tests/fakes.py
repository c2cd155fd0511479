"""Fakes: an expert source in memory, and a transfer whose completions the test decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import pairwise

from finemoe.types import ByteRange, Cancelled, ExpertId, ExpertSource, Landed

Choose = Callable[[int], int]  # number of transfers in flight -> index of the one that completes next


def cut(data: bytes, pieces: int, file: int = 0, file_offset_bytes: int = 0) -> tuple[ByteRange, ...]:
    """`data` as byte ranges that are in reverse order in their file."""
    bounds = [len(data) * i // pieces for i in range(pieces + 1)]
    spans = [(a, b) for a, b in pairwise(bounds) if b > a]
    return tuple(ByteRange(file, file_offset_bytes + len(data) - b, b - a, a) for a, b in spans)


class MemorySource:
    """An `ExpertSource` over bytes. `before` is called before each read, and may block or raise."""

    def __init__(
        self,
        experts: Mapping[ExpertId, bytes],
        pieces: int = 1,
        before: Callable[[ExpertId, ByteRange, int], None] = lambda *_: None,
    ) -> None:
        self.experts = dict(experts)
        self.before = before
        self.reads: list[ExpertId] = []
        self._lock = threading.Lock()
        # each expert is a file of its own, so that a byte range identifies its expert
        self._ids = sorted(experts)
        self._byte_ranges = {e: cut(data, pieces, file) for file, (e, data) in enumerate(sorted(experts.items()))}

    def byte_ranges(self, expert: ExpertId) -> Sequence[ByteRange]:
        return self._byte_ranges[expert]

    def read(self, byte_range: ByteRange, start_bytes: int, into: memoryview) -> None:
        expert = self._ids[byte_range.file]
        with self._lock:
            self.reads.append(expert)
        self.before(expert, byte_range, start_bytes)
        begin = byte_range.slot_offset_bytes + start_bytes
        into[:] = self.experts[expert][begin : begin + len(into)]


class ManualTransfer:
    """A `Transfer` without threads.

    Args:
        source: where experts are read from.
        choose: which transfer completes next.
        ripe: how many of the transfers in flight a `poll` completes.
        fail: an expert's error: an `Exception` is reported, any other is raised.
    """

    def __init__(
        self,
        source: ExpertSource,
        choose: Choose = lambda _: 0,
        ripe: Callable[[int], int] = lambda _: 0,
        fail: Callable[[ExpertId], BaseException | None] = lambda _: None,
    ) -> None:
        self.source = source
        self.choose = choose
        self.ripe = ripe
        self.fail = fail
        self.in_flight: list[tuple[ExpertId, memoryview, bool]] = []
        self.submitted: list[ExpertId] = []
        self.cancelled: list[ExpertId] = []
        self.when_idle: Callable[[], None] | None = None
        self.waits = 0
        self.cancels = 0
        self.closed = False
        self._moved_bytes = 0
        self._waited_bytes = 0
        self._outcomes: list[Landed] = []

    @property
    def moved_bytes(self) -> int:
        return self._moved_bytes

    def submit(self, expert: ExpertId, slot: memoryview, *, urgent: bool = True) -> None:
        slot[:] = b"\xff" * len(slot)  # garbage until it is complete; NaN in every floating-point type
        self.submitted.append(expert)
        self.in_flight.append((expert, slot, urgent))

    @property
    def waited_bytes(self) -> float:
        return self._waited_bytes

    def promote(self, expert: ExpertId) -> None:
        self.in_flight = [(e, slot, urgent or e == expert) for e, slot, urgent in self.in_flight]

    def cancel(self, expert: ExpertId) -> None:
        self.in_flight = [entry for entry in self.in_flight if entry[0] != expert]
        self.cancelled.append(expert)
        self._outcomes.append(Landed(expert, Cancelled()))

    def wake(self) -> None:
        if self.when_idle is not None and not self.in_flight:
            self.when_idle()

    def poll(self, which: Container[ExpertId] | None = None) -> list[Landed]:
        if which is not None:
            return []
        if self._outcomes:
            outcomes, self._outcomes = self._outcomes, []
            return outcomes
        return [self._land() for _ in range(min(self.ripe(len(self.in_flight)), len(self.in_flight)))]

    def wait(self) -> list[Landed]:
        self.waits += 1
        assert self.in_flight, "waited for nothing"
        before_bytes = self._moved_bytes
        landed = self._land()
        self._waited_bytes += self._moved_bytes - before_bytes
        return [landed]

    def cancel_all(self) -> None:
        self.cancels += 1
        self.in_flight.clear()

    def close(self) -> None:
        self.closed = True

    def _land(self) -> Landed:
        expert, slot, _ = self.in_flight.pop(self.choose(len(self.in_flight)))
        error = self.fail(expert)
        if isinstance(error, Exception):
            return Landed(expert, error)
        if error is not None:
            raise error
        for byte_range in self.source.byte_ranges(expert):
            begin = byte_range.slot_offset_bytes
            for start in range(0, byte_range.length_bytes, 1 << 20):
                end = min(byte_range.length_bytes, start + (1 << 20))
                self.source.read(byte_range, start, slot[begin + start : begin + end])
            self._moved_bytes += byte_range.length_bytes
        return Landed(expert)
