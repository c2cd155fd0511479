"""Executes plans: moves experts into slots with a few reader threads. Chooses nothing.

An expert is cut into chunks, so that one expert alone keeps all readers busy, and so that an urgent one overtakes a
prefetch after the chunk under way.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from itertools import pairwise

from finemoe.checkpoint.expert_index import PAGE_BYTES
from finemoe.store.bandwidth import LinkAccounting, LinkTotals, Mark, Throttle, TransferRecord
from finemoe.store.disk import CHUNK_BYTES
from finemoe.system import available_cores
from finemoe.types import ByteRange, Cancelled, ExpertId, ExpertSource, Landed


@dataclass
class _Job:
    """An expert under way: `left` chunks are not done yet."""

    expert: ExpertId
    left: int
    urgent: bool
    error: Exception | None = None
    passage: TransferRecord | None = None  # None: withdrawn


@dataclass
class _Chunk:
    job: _Job
    run: ByteRange
    start_bytes: int
    into: memoryview
    asked_s: float
    aside: bool = False  # read as a prefetch


class ReaderThreads:
    """A `Transfer` that reads with `threads` threads. `wait` belongs to one consumer thread.

    Args:
        source: where experts are read from.
        threads: how many readers.
        chunk_bytes: what is read at once.
        bandwidth_bytes_s: never move more than this, as a slower link would; `None`: as fast as it goes.
        prefetch_threads: of the readers, how many may read prefetches at a time; by default half as many as there are
            cores. Prefetches are read while the model computes: more readers than that take its cores from it.
    """

    def __init__(
        self,
        source: ExpertSource,
        threads: int = 4,
        chunk_bytes: int = CHUNK_BYTES,
        bandwidth_bytes_s: float | None = None,
        prefetch_threads: int | None = None,
    ) -> None:
        self._source = source
        self._prefetch_threads = prefetch_threads or max(1, available_cores() // 2)
        self._prefetching = 0  # readers inside a chunk of a prefetch
        self._throttle = None if bandwidth_bytes_s is None else Throttle(bandwidth_bytes_s)
        self._pacing = False  # a reader waits for the link to be free; the others wait for work
        self._chunk_bytes = chunk_bytes
        # always entered itself, never by way of its conditions: theirs is Python code, in which a Ctrl-C would leak it
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._arrival = threading.Condition(self._lock)
        self._queue: list[tuple[bool, int, _Chunk]] = []  # urgent first, then in the order of submission
        self._order = itertools.count()
        self._landed: list[Landed] = []
        self._jobs: dict[ExpertId, _Job] = {}  # submitted and not complete yet
        self._under_way = 0  # experts submitted and not reported yet
        self._reading = 0  # threads inside a read
        self._cancelling = False
        self._link_accounting = LinkAccounting()
        self._asked_s = 0.0  # when `when_idle` was last asked
        self._moved_bytes = 0
        self._waited_bytes = 0.0
        self._waiting_since: float | None = None  # when the consumer began to wait
        self.when_idle: Callable[[], None] | None = None
        self._ask = False  # whether `when_idle` may have something new
        self._fault: BaseException | None = None  # what `when_idle` raised
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"finemoe-reader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        self._readers = {thread.ident for thread in self._threads}

    @property
    def moved_bytes(self) -> int:
        """Bytes read so far; grows chunk by chunk."""
        return self._moved_bytes

    def link_accounting(self) -> LinkTotals:
        """So far."""
        with self._lock:
            return self._link_accounting.totals(time.perf_counter())

    @property
    def waited_bytes(self) -> float:
        """Bytes read while `wait` blocked. A chunk that was under way before counts by the share of its time."""
        return self._waited_bytes

    @property
    def bandwidth_bytes_s(self) -> float | None:
        """What the link is held to; `None` where it is not."""
        return None if self._throttle is None else self._throttle.bandwidth_bytes_s

    def submit(self, expert: ExpertId, slot: memoryview, *, urgent: bool = True) -> None:
        """Start reading `expert` into `slot`. Returns at once."""
        chunks: list[tuple[ByteRange, int, int]] = []
        for run in self._source.byte_ranges(expert):
            # cut at borders of the file's pages, so that no two chunks share one
            first_bytes = self._chunk_bytes - run.file_offset_bytes % min(PAGE_BYTES, self._chunk_bytes)
            cuts = [0, *range(first_bytes, run.length_bytes, self._chunk_bytes), run.length_bytes]
            chunks += [(run, start, end - start) for start, end in pairwise(cuts)]
        job = _Job(expert, len(chunks), urgent)
        with self._lock:
            if self._closed:
                raise RuntimeError("the transfer is closed")
            self._under_way += 1
            self._jobs[expert] = job
            self._ask = True  # once this is under way, readers that find nothing more to do may ask
            now_s = time.perf_counter()
            since_s = now_s if urgent else self._asked_s  # choosing it is a part of its time
            job.passage = self._link_accounting.send(urgent=urgent, now_s=now_s, since_s=since_s)
            for run, start, length in chunks:
                begin = run.slot_offset_bytes + start
                chunk = _Chunk(job, run, start, slot[begin : begin + length], now_s)
                heapq.heappush(self._queue, (not urgent, next(self._order), chunk))
            awake = threading.get_ident() in self._readers  # and takes a chunk itself
            self._work.notify(len(chunks) if urgent else max(0, min(len(chunks), self._free()) - awake))

    def promote(self, expert: ExpertId) -> None:
        """A prefetch under way has become urgent: what is left of it goes before other prefetches."""
        with self._lock:
            job = self._jobs.get(expert)
            if job is None or job.urgent:
                return
            job.urgent = True
            now_s = time.perf_counter()
            if job.passage is None:
                job.passage = self._link_accounting.send(urgent=True, now_s=now_s, since_s=now_s)
            else:
                self._link_accounting.promote(job.passage, now_s)
            self._queue = [(late and entry.job is not job, order, entry) for late, order, entry in self._queue]
            heapq.heapify(self._queue)
            self._work.notify(job.left)

    def cancel(self, expert: ExpertId) -> None:
        """A prefetch under way is not wanted any more. It is reported as `Cancelled`, unless it was complete."""
        with self._lock:
            job = self._jobs.get(expert)
            if job is None or job.urgent or job.passage is None:
                return
            job.error = job.error or Cancelled()
            self._link_accounting.drop(job.passage, time.perf_counter())
            job.passage = None
            kept = [entry for entry in self._queue if entry[2].job is not job]
            job.left -= len(self._queue) - len(kept)
            self._queue = kept
            heapq.heapify(self._queue)
            if not job.left:
                self._report(job)

    def wake(self) -> None:
        """What is worth prefetching may have changed: ask `when_idle` again."""
        if self.when_idle is not None and not self._queue:
            with self._lock:
                self._ask = True
                if self._free():  # if not, whoever ends a chunk asks
                    self._work.notify()

    def poll(self, which: Container[ExpertId] | None = None) -> list[Landed]:
        """What has landed and was not reported yet, of `which` alone if given. Never blocks."""
        if not self._landed and self._fault is None:
            return []
        with self._lock:
            return self._take(which)

    def wait(self) -> list[Landed]:
        """What has landed since the last call; blocks until that is at least one.

        Raises:
            RuntimeError: nothing is in flight, or the transfer was closed, so that this would never return.
        """
        with self._lock:
            if not self._under_way:
                raise RuntimeError("nothing is in flight")
            self._waiting_since = time.perf_counter()
            try:
                while not self._landed and self._fault is None:
                    if self._closed:
                        raise RuntimeError("the transfer is closed")
                    self._done.wait()
            finally:
                self._waiting_since = None
            return self._take()

    def cancel_all(self) -> None:
        """Drop everything in flight; returns when no slot is written to any more."""
        with self._lock:
            self._queue.clear()
            self._jobs.clear()
            self._link_accounting.clear(time.perf_counter())
            self._cancelling = True
            self._arrival.notify_all()
            try:
                while self._reading:
                    self._done.wait()
            finally:
                self._cancelling = False
            self._landed = []
            self._under_way = 0
            self._fault = None

    def close(self) -> None:
        """Finish the chunks under way, drop the others, and end the threads."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
            self._arrival.notify_all()
            self._done.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self, which: Container[ExpertId] | None = None) -> list[Landed]:
        if self._fault is not None and which is None:
            fault, self._fault = self._fault, None
            raise fault
        landed = [each for each in self._landed if which is None or each.expert in which]
        self._landed = [each for each in self._landed if which is not None and each.expert not in which]
        self._under_way -= len(landed)
        return landed

    def _report(self, job: _Job) -> None:
        self._jobs.pop(job.expert, None)
        if job.passage is not None:
            self._link_accounting.land(job.passage, time.perf_counter())
        self._landed.append(Landed(job.expert, job.error))
        self._done.notify_all()

    def _next(self) -> tuple[_Chunk, float, Mark] | None:
        """The next chunk to read, the time before which it can't have come, and when it begins; `None` once closed.

        Asks for prefetches before going idle. A chunk is chosen when the link is free, so that what is urgent overtakes
        all that wait for a paced link.
        """
        while True:
            with self._lock:
                while not (self._closed or self._may_begin() or self._may_ask()):
                    self._rest()
                if self._closed:
                    return None
                if self._queue:
                    return *self._begin(), self._link_accounting.mark(time.perf_counter())
                self._ask = False
                self._asked_s = time.perf_counter()
                ask = self.when_idle
            assert ask is not None
            try:
                ask()  # without our lock: it submits
            except BaseException as fault:  # noqa: BLE001 - belongs to the consumer; a dead reader would hang it
                with self._lock:
                    self._fault = fault
                    self._done.notify_all()

    def _may_begin(self) -> bool:
        """Whether there is a chunk, a link free to move it, and, for a prefetch, fewer readers at that than may be."""
        if not self._queue or self._held():
            return False
        return self._throttle is None or self._throttle.delay_s(time.perf_counter()) <= 0

    def _may_ask(self) -> bool:
        """Whether a prefetch could begin at once, and there may be one that nobody has submitted yet."""
        return self._ask and self.when_idle is not None and not self._queue and self._free() > 0

    def _held(self) -> bool:
        """Whether prefetches are all there is to read, and something urgent, or enough of them, are being read."""
        return self._queue[0][0] and not self._free()

    def _free(self) -> int:
        """How many more readers may read prefetches."""
        if self._reading > self._prefetching:  # something urgent: the link is its own until the last has come
            return 0
        return self._prefetch_threads - self._prefetching

    def _rest(self) -> None:
        """Waits until something may have changed. Of readers that wait for the link, only one keeps its time."""
        if self._throttle is None or not self._queue or self._pacing or self._held():
            self._work.wait()
            return
        self._pacing = True
        self._work.wait(max(0.0, self._throttle.delay_s(time.perf_counter())))
        self._pacing = False

    def _begin(self) -> tuple[_Chunk, float]:
        late, _, chunk = heapq.heappop(self._queue)
        self._reading += 1
        chunk.aside = late
        self._prefetching += late
        if self._throttle is None:
            return chunk, 0.0
        if self._queue and not self._pacing:
            self._work.notify()  # another reader is to keep the time of the next chunk
        if chunk.job.error is not None:  # it will not be read
            return chunk, 0.0
        return chunk, self._throttle.begin(len(chunk.into), chunk.asked_s, time.perf_counter())

    def _run(self) -> None:
        while (following := self._next()) is not None:
            chunk, comes_s, mark = following
            error: Exception | None = None
            moved_bytes, start_s = 0, time.perf_counter()
            if chunk.job.error is None:  # a failed expert's other chunks are not worth reading
                try:
                    self._source.read(chunk.run, chunk.start_bytes, chunk.into)
                    moved_bytes = len(chunk.into)
                except Exception as caught:  # noqa: BLE001 - handed to the consumer, whatever it is: a dead reader would hang it
                    error = caught
            with self._lock:
                while not (self._cancelling or self._closed) and (left_s := comes_s - time.perf_counter()) > 0:
                    self._arrival.wait(left_s)
                self._reading -= 1
                self._prefetching -= chunk.aside
                if not chunk.aside and self._reading == self._prefetching:  # prefetches were held back until now
                    self._work.notify(self._prefetch_threads - 1)  # this thread is one
                job = chunk.job
                job.error = job.error or error
                job.left -= 1
                self._moved_bytes += moved_bytes
                self._link_accounting.move(moved_bytes, mark, time.perf_counter(), wanted=job.passage is not None)
                self._waited_bytes += moved_bytes * self._waited_share(start_s)
                if not job.left and self._jobs.get(job.expert) is job:
                    self._report(job)
                if self._cancelling:
                    self._done.notify_all()

    def _waited_share(self, start_s: float) -> float:
        """Of the time since `start_s`, the share in which the consumer waited."""
        if self._waiting_since is None:
            return 0.0
        now_s = time.perf_counter()
        return min(1.0, (now_s - self._waiting_since) / max(now_s - start_s, 1e-9))
