"""What a link moves, and the queue of each device that it moves to."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from finemoe.gpu.device import Device, Event
from finemoe.gpu.slot_pool import DeviceSlot
from finemoe.types import ExpertId

CHUNK_BYTES = 4 << 20  # of a prefetch: what is urgent waits for those under way
CHUNKS_AHEAD = 2  # of prefetches, handed to the copy stream and not copied yet: keeps it busy between two chunks
URGENT_CHUNK_BYTES = 32 << 20  # nothing overtakes what is urgent
URGENT_AHEAD = 8


class CopyPiece(NamedTuple):
    """A stretch of an expert: where it lies in the host tier's slot, and where it goes in the device's."""

    source_bytes: int
    target_bytes: int
    length_bytes: int


Pieces = Callable[[ExpertId], Sequence[CopyPiece]]


def cut(pieces: Sequence[CopyPiece], begin: int, end: int) -> Iterator[CopyPiece]:
    """What lies between two places of an expert, counted over its pieces one after the other."""
    for source_bytes, target_bytes, length_bytes in pieces:
        first, last = max(begin, 0), min(end, length_bytes)
        if first < last:
            yield CopyPiece(source_bytes + first, target_bytes + first, last - first)
        begin, end = begin - length_bytes, end - length_bytes


@dataclass(eq=False)
class CopyJob:
    """An expert on its way to a slot."""

    expert: ExpertId
    slot: DeviceSlot
    pieces: Sequence[CopyPiece]
    length_bytes: int
    urgent: bool
    source: Tensor | None = None  # its bytes in host memory, held there; None: being read, or waiting for room
    start: Event | None = None
    sent_bytes: int = 0
    flying: int = 0  # chunks that are being handed over, or not copied yet
    over: bool = False  # reported

    @property
    def left_bytes(self) -> int:
        return self.length_bytes - self.sent_bytes


@dataclass(eq=False)
class CopyChunk:
    """Bytes that the copy stream has to copy."""

    job: CopyJob
    end: Event
    length_bytes: int


@dataclass(eq=False)
class CopyQueue:
    """The way to one device."""

    index: int
    device: Device
    work: threading.Condition
    urgent: deque[CopyJob] = field(default_factory=deque)
    later: deque[CopyJob] = field(default_factory=deque)
    flying: deque[CopyChunk] = field(default_factory=deque)  # handed over
    sending: bool = False
    ask: bool = False  # whether `when_idle` may have something new

    def next(self) -> CopyJob | None:
        """What to send a chunk of now."""
        if self.urgent and len(self.flying) < URGENT_AHEAD:
            return self.urgent[0]
        if not self.urgent and self.later and len(self.flying) < CHUNKS_AHEAD:
            return self.later[0]
        return None

    def add(self, job: CopyJob) -> None:
        """Queue a job, whose source is known."""
        (self.urgent if job.urgent else self.later).append(job)
        self.work.notify()

    def drop(self, job: CopyJob) -> bool:
        """Take a job out of its queue. Returns whether it was in one: not if it was sent, or has no source yet."""
        for queue in (self.urgent, self.later):
            if job in queue:
                queue.remove(job)
                return True
        return False

    def begin(self, job: CopyJob) -> None:
        """A chunk of the job is about to be sent; a job leaves its queue with its last one."""
        job.sent_bytes += min(job.left_bytes, URGENT_CHUNK_BYTES if job.urgent else CHUNK_BYTES)
        job.flying += 1
        self.sending = True
        if not job.left_bytes:
            self.drop(job)

    @property
    def idle(self) -> bool:
        """Whether a prefetch would be sent at once."""
        return not self.urgent and not self.later and len(self.flying) < CHUNKS_AHEAD
