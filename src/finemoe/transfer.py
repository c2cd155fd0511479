"""Executes plans: moves experts into slots with a few reader threads. Chooses nothing.

An expert is cut into chunks, so that one expert alone keeps all readers busy, and so that an urgent one overtakes a
prefetch after the chunk under way.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from dataclasses import dataclass

from finemoe.store.disk import CHUNK_BYTES
from finemoe.types import ExpertId, ExpertSource, Landed, Run


@dataclass
class _Job:
    """An expert under way: `left` chunks are not done yet."""

    expert: ExpertId
    left: int
    error: Exception | None = None


@dataclass(frozen=True)
class _Chunk:
    job: _Job
    run: Run
    start_bytes: int
    into: memoryview


class ReaderThreads:
    """A `Transfer` that reads with `threads` threads. `submit`, `poll` and `wait` belong to one consumer thread."""

    def __init__(self, source: ExpertSource, threads: int = 4, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._source = source
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._queue: list[tuple[bool, int, _Chunk]] = []  # urgent first, then in the order of submission
        self._order = itertools.count()
        self._landed: list[Landed] = []
        self._under_way = 0  # experts submitted and not reported yet
        self._reading = 0  # threads inside a read
        self._cancelling = False
        self._moved_bytes = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"finemoe-reader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def moved_bytes(self) -> int:
        """Bytes read so far; grows chunk by chunk."""
        return self._moved_bytes

    def submit(self, expert: ExpertId, slot: memoryview, *, urgent: bool = True) -> None:
        """Start reading `expert` into `slot`. Returns at once."""
        chunks: list[tuple[Run, int, int]] = []
        for run in self._source.runs(expert):
            starts = range(0, run.length_bytes, self._chunk_bytes)
            chunks += [(run, start, min(self._chunk_bytes, run.length_bytes - start)) for start in starts]
        job = _Job(expert, len(chunks))
        with self._lock:
            if self._closed:
                raise RuntimeError("the transfer is closed")
            self._under_way += 1
            for run, start, length in chunks:
                begin = run.slot_offset_bytes + start
                chunk = _Chunk(job, run, start, slot[begin : begin + length])
                heapq.heappush(self._queue, (not urgent, next(self._order), chunk))
            self._work.notify(len(chunks))

    def poll(self) -> list[Landed]:
        """What has landed since the last call. Never blocks."""
        if not self._landed:
            return []
        with self._lock:
            return self._take()

    def wait(self) -> list[Landed]:
        """What has landed since the last call; blocks until that is at least one.

        Raises:
            RuntimeError: nothing is in flight, or the transfer was closed, so that this would never return.
        """
        with self._done:
            if not self._under_way:
                raise RuntimeError("nothing is in flight")
            while not self._landed:
                if self._closed:
                    raise RuntimeError("the transfer is closed")
                self._done.wait()
            return self._take()

    def cancel(self) -> None:
        """Drop everything in flight; returns when no slot is written to any more."""
        with self._done:
            self._queue.clear()
            self._cancelling = True
            try:
                while self._reading:
                    self._done.wait()
            finally:
                self._cancelling = False
            self._landed = []
            self._under_way = 0

    def close(self) -> None:
        """Finish the chunks under way, drop the others, and end the threads."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
            self._done.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self) -> list[Landed]:
        landed, self._landed = self._landed, []
        self._under_way -= len(landed)
        return landed

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                chunk = heapq.heappop(self._queue)[2]
                self._reading += 1
            error: Exception | None = None
            if chunk.job.error is None:  # a failed expert's other chunks are not worth reading
                try:
                    self._source.read(chunk.run, chunk.start_bytes, chunk.into)
                except Exception as caught:  # noqa: BLE001 - handed to the consumer, whatever it is: a dead reader would hang it
                    error = caught
            with self._done:
                self._reading -= 1
                job = chunk.job
                job.error = job.error or error
                job.left -= 1
                if error is None:
                    self._moved_bytes += len(chunk.into)
                if not job.left:
                    self._landed.append(Landed(job.expert, job.error))
                if not job.left or self._cancelling:
                    self._done.notify_all()
