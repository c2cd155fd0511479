"""Reader threads: read experts from disk into slots, demand loads before prefetches; promote, cancel.

An expert is split into chunks, so that all threads can read one expert, and a demand load overtakes a prefetch after
the chunk being read. The readers choose nothing: the cache manager decides what is fetched into which slot.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from dataclasses import dataclass
from itertools import pairwise

from finemoe.checkpoint.expert_index import PAGE_BYTES
from finemoe.store.bandwidth import LinkAccounting, LinkTotals, ReadStart, Throttle, TransferRecord
from finemoe.store.direct_io import CHUNK_BYTES
from finemoe.store.transfer_results import BaseTransfer
from finemoe.system import available_cores
from finemoe.types import ByteRange, Cancelled, ExpertId, ExpertSource, Landed


@dataclass
class _Job:
    """An expert in flight."""

    expert: ExpertId
    chunks_left: int
    urgent: bool
    error: Exception | None = None
    cancelled: bool = False
    record: TransferRecord | None = None  # None: not accounted, or cancelled


@dataclass
class _Chunk:
    job: _Job
    byte_range: ByteRange
    start_bytes: int
    into: memoryview
    submitted_s: float
    is_prefetch: bool = False  # when its read began
    read_start: ReadStart | None = None  # None: not accounted


class ReaderThreads(BaseTransfer[_Job]):
    """A `Transfer` that reads with `threads` threads.

    Args:
        source: where experts are read from.
        threads: number of reader threads.
        chunk_bytes: size of one read.
        bandwidth_bytes_s: throttle to this bandwidth, for experiments; `None`: no limit.
        prefetch_threads: at most so many threads read prefetches at a time, by default half the cores: prefetches are
            read while the model computes, and more threads would take its cores.
    """

    def __init__(
        self,
        source: ExpertSource,
        threads: int = 4,
        chunk_bytes: int = CHUNK_BYTES,
        bandwidth_bytes_s: float | None = None,
        prefetch_threads: int | None = None,
    ) -> None:
        super().__init__()
        self._source = source
        self._prefetch_threads = prefetch_threads or max(1, available_cores() // 2)
        self._throttle = None if bandwidth_bytes_s is None else Throttle(bandwidth_bytes_s)
        self._chunk_bytes = chunk_bytes
        self._work = threading.Condition(self._lock)  # there may be something to read, or to ask for
        self._arrival = threading.Condition(self._lock)  # a throttled read waits for its time of arrival
        self._queue: list[tuple[bool, int, _Chunk]] = []  # heap: urgent first, then in the order of submission
        self._order = itertools.count()
        self._reading = 0  # threads in a read
        self._prefetching = 0  # of these, threads that read a prefetch
        self._timed_wait = False  # one thread waits until the throttled link is free; the others wait for work
        self._cancelling = False
        self._ask = False  # whether `when_idle` may have a new prefetch
        self._asked_s = 0.0  # when `when_idle` was last called
        self._accounting: LinkAccounting | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"finemoe-reader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        self._thread_ids = {thread.ident for thread in self._threads}

    @property
    def bandwidth_bytes_s(self) -> float | None:
        """The throttle's bandwidth; `None` without a throttle."""
        return None if self._throttle is None else self._throttle.bandwidth_bytes_s

    def attach_accounting(self) -> None:
        """Account link time and bytes from now on, for benchmarks. Transfers in flight are left out."""
        with self._lock:
            if self._accounting is None:
                self._accounting = LinkAccounting()
                self._accounting.advance(time.perf_counter())

    def link_totals(self) -> LinkTotals:
        """Link time and bytes since `attach_accounting`; all 0 without it."""
        with self._lock:
            return LinkTotals() if self._accounting is None else self._accounting.totals(time.perf_counter())

    def submit(self, expert: ExpertId, slot: memoryview, *, urgent: bool = True) -> None:
        """Start reading `expert` into `slot`. Returns at once."""
        chunks: list[tuple[ByteRange, int, int]] = []
        for byte_range in self._source.byte_ranges(expert):
            # cut at page boundaries of the file, so that no two chunks share a page
            first_bytes = self._chunk_bytes - byte_range.file_offset_bytes % min(PAGE_BYTES, self._chunk_bytes)
            cuts = [0, *range(first_bytes, byte_range.length_bytes, self._chunk_bytes), byte_range.length_bytes]
            chunks += [(byte_range, start, end - start) for start, end in pairwise(cuts)]
        job = _Job(expert, len(chunks), urgent)
        with self._lock:
            if self._closed:
                raise RuntimeError("the transfer is closed")
            self._jobs[expert] = job
            self._ask = True  # readers that find nothing more to read may ask for the next prefetch
            now_s = time.perf_counter()
            if self._accounting is not None:
                since_s = now_s if urgent else self._asked_s  # choosing a prefetch is a part of its time
                job.record = self._accounting.submit(urgent=urgent, now_s=now_s, since_s=since_s)
            for byte_range, start, length in chunks:
                begin = byte_range.slot_offset_bytes + start
                chunk = _Chunk(job, byte_range, start, slot[begin : begin + length], now_s)
                heapq.heappush(self._queue, (not urgent, next(self._order), chunk))
            is_reader = threading.get_ident() in self._thread_ids  # it takes a chunk itself
            self._work.notify(
                len(chunks) if urgent else max(0, min(len(chunks), self._free_prefetch_threads()) - is_reader)
            )

    def promote(self, expert: ExpertId) -> None:
        """Turn a prefetch in flight into a demand load: its remaining chunks go before all prefetches."""
        with self._lock:
            job = self._jobs.get(expert)
            if job is None or job.urgent:
                return
            job.urgent = True
            if self._accounting is not None:
                job.record = self._accounting.promote(job.record, time.perf_counter())
            self._queue = [(late and chunk.job is not job, order, chunk) for late, order, chunk in self._queue]
            heapq.heapify(self._queue)
            self._work.notify(job.chunks_left)

    def cancel(self, expert: ExpertId) -> None:
        """Cancel a prefetch in flight. It is reported as `Cancelled`, unless it was complete."""
        with self._lock:
            job = self._jobs.get(expert)
            if job is None or job.urgent or job.cancelled:
                return
            job.cancelled = True
            job.error = job.error or Cancelled()
            if self._accounting is not None and job.record is not None:
                self._accounting.cancel(job.record, time.perf_counter())
                job.record = None
            kept = [entry for entry in self._queue if entry[2].job is not job]
            job.chunks_left -= len(self._queue) - len(kept)
            self._queue = kept
            heapq.heapify(self._queue)
            if not job.chunks_left:
                self._report(job)

    def wake(self) -> None:
        """Have an idle reader call `when_idle` again: prefetch priorities may have changed."""
        if self.when_idle is not None and not self._queue:
            with self._lock:
                self._ask = True
                if self._free_prefetch_threads():  # if not, the next thread that ends a chunk asks
                    self._work.notify()

    def cancel_all(self) -> None:
        """Drop everything in flight; returns when no slot is written to any more."""
        with self._lock:
            self._queue.clear()
            self._jobs.clear()
            if self._accounting is not None:
                self._accounting.clear(time.perf_counter())
            self._cancelling = True
            self._arrival.notify_all()
            try:
                while self._reading:
                    self._done.wait()
            finally:
                self._cancelling = False
            self._landed = []
            self._fault = None

    def close(self) -> None:
        """Finish the chunks being read, drop the others, and end the threads."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
            self._arrival.notify_all()
            self._done.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        """Reader thread: read chunk after chunk until closed."""
        while (following := self._next()) is not None:
            chunk, arrival_s = following
            error: Exception | None = None
            read_bytes, start_s = 0, time.perf_counter()
            if chunk.job.error is None:  # the other chunks of a failed expert are not read
                try:
                    self._source.read(chunk.byte_range, chunk.start_bytes, chunk.into)
                    read_bytes = len(chunk.into)
                except Exception as caught:  # noqa: BLE001 - any error goes to the consumer: a dead reader would hang it
                    error = caught
            with self._lock:
                while not (self._cancelling or self._closed) and (left_s := arrival_s - time.perf_counter()) > 0:
                    self._arrival.wait(left_s)
                self._end_chunk(chunk, error, read_bytes, start_s)

    def _next(self) -> tuple[_Chunk, float] | None:
        """The next chunk to read, and the throttled link's time of arrival; `None` once closed.

        Asks for prefetches before going idle. A chunk is chosen only once the throttled link is free, so that a demand
        load overtakes everything that waits for the link.
        """
        while True:
            with self._lock:
                while not (self._closed or self._may_read() or self._may_ask()):
                    self._wait_for_work()
                if self._closed:
                    return None
                if self._queue:
                    return self._begin_chunk()
                self._ask = False
                if self._accounting is not None:
                    self._asked_s = time.perf_counter()
                ask = self.when_idle
            assert ask is not None
            try:
                ask()  # without the lock: it submits
            except BaseException as fault:  # noqa: BLE001 - goes to the consumer; a dead reader would hang it
                self._fail(fault)

    def _may_read(self) -> bool:
        """Whether a queued chunk may be read now: the link is free, and a prefetch has a thread."""
        if not self._queue or self._prefetches_held_back():
            return False
        return self._throttle is None or self._throttle.delay_s(time.perf_counter()) <= 0

    def _may_ask(self) -> bool:
        """Whether to call `when_idle`: it may have a prefetch, which could be read at once."""
        return self._ask and self.when_idle is not None and not self._queue and self._free_prefetch_threads() > 0

    def _prefetches_held_back(self) -> bool:
        """Whether only prefetches are queued, and none may be read now."""
        return self._queue[0][0] and not self._free_prefetch_threads()

    def _free_prefetch_threads(self) -> int:
        """How many more threads may read prefetches; 0 until the last demand load is complete."""
        if self._reading > self._prefetching:
            return 0
        return self._prefetch_threads - self._prefetching

    def _wait_for_work(self) -> None:
        """Wait for a notification; one thread at a time also wakes up when the throttled link is free."""
        if self._throttle is None or not self._queue or self._timed_wait or self._prefetches_held_back():
            self._work.wait()
            return
        self._timed_wait = True
        self._work.wait(max(0.0, self._throttle.delay_s(time.perf_counter())))
        self._timed_wait = False

    def _begin_chunk(self) -> tuple[_Chunk, float]:
        """Take the first chunk of the queue. Returns it and its time of arrival, 0 without a throttle."""
        is_prefetch, _, chunk = heapq.heappop(self._queue)
        self._reading += 1
        self._prefetching += is_prefetch
        chunk.is_prefetch = is_prefetch
        arrival_s = 0.0
        if self._throttle is not None:
            if self._queue and not self._timed_wait:
                self._work.notify()  # another thread waits until the link is free for the next chunk
            if chunk.job.error is None:
                arrival_s = self._throttle.begin(len(chunk.into), chunk.submitted_s, time.perf_counter())
        if self._accounting is not None:
            chunk.read_start = self._accounting.begin_read(time.perf_counter())
        return chunk, arrival_s

    def _end_chunk(self, chunk: _Chunk, error: Exception | None, read_bytes: int, start_s: float) -> None:
        job = chunk.job
        self._reading -= 1
        self._prefetching -= chunk.is_prefetch
        if not chunk.is_prefetch and self._reading == self._prefetching:  # prefetches were held back until now
            self._work.notify(self._prefetch_threads - 1)  # this thread reads one itself
        job.error = job.error or error
        job.chunks_left -= 1
        self._moved_bytes += read_bytes
        self._waited_bytes += read_bytes * self._waited_share(start_s)
        if self._accounting is not None and chunk.read_start is not None:
            now_s = time.perf_counter()
            self._accounting.end_read(read_bytes, chunk.read_start, now_s, accounted=job.record is not None)
        if not job.chunks_left and self._jobs.get(job.expert) is job:
            self._report(job)
        if self._cancelling:
            self._done.notify_all()

    def _report(self, job: _Job) -> None:
        self._jobs.pop(job.expert, None)
        if self._accounting is not None and job.record is not None:
            self._accounting.land(job.record, time.perf_counter())
        self._landed.append(Landed(job.expert, job.error))
        self._done.notify_all()

    def _waited_share(self, start_s: float) -> float:
        """The share of the time since `start_s` in which the consumer waited."""
        if self._waiting_since_s is None:
            return 0.0
        now_s = time.perf_counter()
        return min(1.0, (now_s - self._waiting_since_s) / max(now_s - start_s, 1e-9))
