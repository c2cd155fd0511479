"""Copy jobs, and the queue of each device: demand loads before prefetches, a bounded number of chunks in flight."""

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

PREFETCH_CHUNK_BYTES = 4 << 20  # small: a demand load waits for the chunks in flight
MAX_PREFETCH_CHUNKS = 2  # in flight; more than one keeps the copy stream busy between chunks
URGENT_CHUNK_BYTES = 32 << 20  # large: nothing overtakes a demand load
MAX_URGENT_CHUNKS = 8


class CopyPiece(NamedTuple):
    """A contiguous part of an expert: its offset in the host tier's slot, and in the device's slot."""

    source_bytes: int
    target_bytes: int
    length_bytes: int


ExpertPieces = Callable[[ExpertId], Sequence[CopyPiece]]


def slice_pieces(pieces: Sequence[CopyPiece], begin: int, end: int) -> Iterator[CopyPiece]:
    """The bytes `begin` to `end` of an expert, counted over its pieces in order."""
    for source_bytes, target_bytes, length_bytes in pieces:
        first, last = max(begin, 0), min(end, length_bytes)
        if first < last:
            yield CopyPiece(source_bytes + first, target_bytes + first, last - first)
        begin, end = begin - length_bytes, end - length_bytes


@dataclass(eq=False)
class CopyJob:
    """The copy of one expert into a slot."""

    expert: ExpertId
    slot: DeviceSlot
    pieces: Sequence[CopyPiece]
    length_bytes: int
    urgent: bool
    source: Tensor | None = None  # its slot in the host tier, pinned; None: not read yet, or released
    start: Event | None = None  # before the first chunk
    submitted_bytes: int = 0  # to the copy stream
    chunks_in_flight: int = 0  # being submitted, or not copied yet
    reported: bool = False

    @property
    def left_bytes(self) -> int:
        return self.length_bytes - self.submitted_bytes


@dataclass(eq=False)
class CopyChunk:
    """Bytes submitted to the copy stream."""

    job: CopyJob
    end: Event
    length_bytes: int


@dataclass(eq=False)
class CopyQueue:
    """One device's jobs and chunks in flight. Used under the copier's lock."""

    index: int
    device: Device
    work: threading.Condition  # notifies the device's copy thread
    urgent: deque[CopyJob] = field(default_factory=deque)
    prefetches: deque[CopyJob] = field(default_factory=deque)
    in_flight: deque[CopyChunk] = field(default_factory=deque)  # in order of submission
    submitting: bool = False  # the copy thread is submitting a chunk
    ask: bool = False  # whether `when_idle` may have a new prefetch

    def next(self) -> CopyJob | None:
        """The job whose next chunk may be submitted now."""
        if self.urgent and len(self.in_flight) < MAX_URGENT_CHUNKS:
            return self.urgent[0]
        if not self.urgent and self.prefetches and len(self.in_flight) < MAX_PREFETCH_CHUNKS:
            return self.prefetches[0]
        return None

    def add(self, job: CopyJob) -> None:
        """Queue a job that has a source."""
        (self.urgent if job.urgent else self.prefetches).append(job)
        self.work.notify()

    def remove(self, job: CopyJob) -> bool:
        """Remove a job. Returns whether it was queued: not if it was submitted, or has no source yet."""
        for queue in (self.urgent, self.prefetches):
            if job in queue:
                queue.remove(job)
                return True
        return False

    def begin_chunk(self, job: CopyJob) -> None:
        """Account for the job's next chunk, which is about to be submitted; with its last one it leaves the queue."""
        job.submitted_bytes += min(job.left_bytes, URGENT_CHUNK_BYTES if job.urgent else PREFETCH_CHUNK_BYTES)
        job.chunks_in_flight += 1
        self.submitting = True
        if not job.left_bytes:
            self.remove(job)

    @property
    def idle(self) -> bool:
        """Whether a prefetch could be submitted at once."""
        return not self.urgent and not self.prefetches and len(self.in_flight) < MAX_PREFETCH_CHUNKS
