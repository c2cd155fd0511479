"""Copies experts from host memory to device slots; experts that are not in host memory are read from disk first.

Each device has a `CopyQueue` and a thread that submits chunks to the device's copy stream. An expert is reported as
landed when its last chunk is submitted, with the `Arrival` event in its slot: the compute stream waits for that event,
while the model's thread goes on launching kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from finemoe.gpu.copy_queue import CopyChunk, CopyJob, CopyQueue, ExpertPieces, slice_pieces
from finemoe.gpu.device import Device
from finemoe.gpu.host_tier import HostTier
from finemoe.gpu.slot_pool import Arrival, DeviceSlot
from finemoe.store.reader_threads import ReaderThreads
from finemoe.store.transfer_results import BaseTransfer
from finemoe.types import Cancelled, ExpertId, Landed


class HostToDeviceCopier(BaseTransfer[CopyJob]):
    """A `Transfer` into device slots. Chooses nothing. `wait` belongs to one consumer thread.

    Args:
        host: the host tier; owned, and used under this object's lock.
        readers: read experts from disk into the host tier; owned.
        devices: the devices that have the slots.
        pieces: where an expert's parameters are in the host tier's slot and in the device's; does no I/O.
        convert: turns an expert's bytes as read into the device's layout, in place; `None` if only offsets differ.
        fill: while the disk is idle, read further experts into free slots of the host tier.
    """

    def __init__(
        self,
        host: HostTier,
        readers: ReaderThreads,
        devices: Sequence[Device],
        pieces: ExpertPieces,
        convert: Callable[[ExpertId, Tensor], None] | None = None,
        *,
        fill: bool = True,
    ) -> None:
        super().__init__()
        self.host = host
        self._readers = readers
        self._pieces = pieces
        self._convert = convert
        self._read_submitted = threading.Condition(self._lock)
        self._reading: set[ExpertId] = set()  # from disk
        self._waiting_for_room: dict[ExpertId, None] = {}  # to be read once the host tier has a slot
        self._filling = fill
        self._queues = [CopyQueue(i, device, threading.Condition(self._lock)) for i, device in enumerate(devices)]
        self._threads = [
            threading.Thread(target=self._run_copies, args=(queue,), name=f"finemoe-copy-{queue.index}", daemon=True)
            for queue in self._queues
        ]
        self._threads.append(threading.Thread(target=self._run_reads, name="finemoe-host-tier", daemon=True))
        for thread in self._threads:
            thread.start()
        if fill:
            readers.when_idle = self._fill
            readers.wake()

    @property
    def disk_bytes(self) -> int:
        """Bytes read from disk so far."""
        return self._readers.moved_bytes

    def submit(self, expert: ExpertId, slot: DeviceSlot, *, urgent: bool = True) -> None:
        """Start copying `expert` into `slot`. Returns at once."""
        pieces = self._pieces(expert)
        job = CopyJob(expert, slot, pieces, sum(piece.length_bytes for piece in pieces), urgent)
        with self._lock:
            if self._closed:
                raise RuntimeError("the transfer is closed")
            self._jobs[expert] = job
            self._queues[slot.device].ask = True  # for the next prefetch, once this one is submitted
            self._copy_or_read(job)

    def promote(self, expert: ExpertId) -> None:
        """Turn a prefetch in flight into a demand load: its remaining chunks go before all prefetches."""
        with self._lock:
            job = self._jobs.get(expert)
            if job is None or job.urgent:
                return
            job.urgent = True
            queue = self._queues[job.slot.device]
            if queue.remove(job):
                queue.add(job)
            if expert in self._reading:
                self._readers.promote(expert)

    def cancel(self, expert: ExpertId) -> None:
        """Cancel a prefetch in flight. It is reported as `Cancelled`, unless it was complete.

        Chunks in flight are still copied; later copies into the slot follow them on the copy stream.
        """
        with self._lock:
            job = self._jobs.get(expert)
            if job is None or job.urgent:
                return
            self._queues[job.slot.device].remove(job)
            self._report(job, Cancelled())

    def wake(self) -> None:
        """Have idle copy threads call `when_idle` again: prefetch priorities may have changed."""
        if self.when_idle is None:
            return
        with self._lock:
            for queue in self._queues:
                queue.ask = True
                if queue.idle:
                    queue.work.notify()

    def cancel_all(self) -> None:
        """Drop everything in flight; returns when no slot is written to any more. Reads into the host tier continue."""
        with self._lock:
            for job in list(self._jobs.values()):
                self._report(job, Cancelled())
            self._waiting_for_room.clear()
            for queue in self._queues:
                queue.urgent.clear()
                queue.prefetches.clear()
            while any(queue.submitting for queue in self._queues):
                self._done.wait()
            chunks = [(queue, chunk) for queue in self._queues for chunk in queue.in_flight]
        # waits here, not in the copy threads: they may be waiting for the engine's lock, which the caller holds
        for queue, chunk in chunks:
            chunk.end.wait()
            self._end_chunk(queue, chunk)
        with self._lock:
            self._landed = []
            self._fault = None

    def acquire(self, expert: ExpertId) -> Tensor | None:
        """The bytes of an expert in the host tier, kept until `release`; `None` if it is not there."""
        with self._lock:
            return None if self._closed else self.host.acquire(expert)

    def release(self, expert: ExpertId) -> None:
        """Undo one `acquire`."""
        with self._lock:
            self.host.release(expert)
            self._retry_reads()

    def close(self) -> None:
        """Finish the chunks and reads in flight, end the threads, and free the host tier's memory."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for queue in self._queues:
                queue.urgent.clear()
                queue.prefetches.clear()
                queue.work.notify_all()
            self._done.notify_all()
            self._read_submitted.notify_all()
        self._readers.close()
        for thread in self._threads:
            thread.join()
        self.host.close()

    def _copy_or_read(self, job: CopyJob) -> None:
        """Queue the copy if the host tier has the expert; otherwise read it first."""
        job.source = self.host.acquire(job.expert)
        if job.source is not None:
            self._queues[job.slot.device].add(job)
        elif job.expert in self._reading:
            if job.urgent:
                self._readers.promote(job.expert)
        elif not self._read(job.expert, urgent=job.urgent):
            self._waiting_for_room[job.expert] = None

    def _read(self, expert: ExpertId, *, urgent: bool) -> bool:
        """Start reading an expert into the host tier. Returns whether it had a slot for it."""
        memory = None if self._closed else self.host.reserve(expert)
        if memory is None:
            return False
        self._reading.add(expert)
        self._readers.submit(expert, memory, urgent=urgent)
        self._read_submitted.notify()
        return True

    def _retry_reads(self) -> None:
        """The host tier may have a slot again: start the reads that wait for one, urgent ones first."""
        for expert in sorted(self._waiting_for_room, key=lambda each: not self._jobs[each].urgent):
            if not self._read(expert, urgent=self._jobs[expert].urgent):
                return
            del self._waiting_for_room[expert]

    def _fill(self) -> None:
        """The disk is idle. Called by the readers, from one of their threads."""
        with self._lock:
            expert = self.host.next_absent() if self._filling and not self._closed else None
            if expert is not None:
                self._read(expert, urgent=False)

    def _report(self, job: CopyJob, error: Exception | None = None) -> None:
        job.reported = True
        del self._jobs[job.expert]
        self._waiting_for_room.pop(job.expert, None)
        self._landed.append(Landed(job.expert, error))
        self._done.notify_all()
        self._release_source(job)

    def _release_source(self, job: CopyJob) -> None:
        """Release a finished job's bytes in the host tier, once its last chunk is copied."""
        if job.reported and not job.chunks_in_flight and job.source is not None:
            job.source = None
            self.host.release(job.expert)
            self._retry_reads()

    def _run_copies(self, queue: CopyQueue) -> None:
        """A device's copy thread: submits chunks, asks for prefetches when idle, waits for chunks in flight."""
        while True:
            with self._lock:
                while not (self._closed or queue.next() or queue.in_flight or self._may_ask(queue)):
                    queue.work.wait()
                if self._closed and not queue.in_flight:
                    return
                job, oldest = queue.next(), queue.in_flight[0] if queue.in_flight else None
                begin = job.submitted_bytes if job is not None else 0
                ask = self.when_idle if job is None and self._may_ask(queue) else None
                if job is not None:
                    queue.begin_chunk(job)
                elif ask is not None:
                    queue.ask = False
            if job is not None:
                self._submit_chunk(queue, job, begin)
            elif ask is not None:
                try:
                    ask(queue.index)  # without the lock: it submits
                except BaseException as fault:  # noqa: BLE001 - goes to the consumer; a dead thread would hang it
                    self._fail(fault)
            elif oldest is not None:
                self._await_chunk(queue, oldest)

    def _may_ask(self, queue: CopyQueue) -> bool:
        return queue.ask and self.when_idle is not None and queue.idle and not self._closed

    def _submit_chunk(self, queue: CopyQueue, job: CopyJob, begin: int) -> None:
        """Submit the job's bytes from `begin` to `submitted_bytes` to the copy stream."""
        end, source, slot, device = job.submitted_bytes, job.source, job.slot, queue.device
        error, copied = None, None
        try:
            if job.start is None:
                if slot.last_use is not None:
                    device.copies_wait(slot.last_use)
                job.start = device.record_copies()
            assert source is not None
            for start, target, length in slice_pieces(job.pieces, begin, end):
                device.copy(slot.memory[target : target + length], source[start : start + length])
            copied = device.record_copies()
        except Exception as caught:  # noqa: BLE001 - goes to the consumer; a dead thread would hang it
            error = caught
        with self._lock:
            queue.submitting = False
            if copied is None:
                job.chunks_in_flight -= 1
                queue.remove(job)
            else:
                queue.in_flight.append(CopyChunk(job, copied, end - begin))
            if error is not None and not job.reported:
                self._report(job, error)
            elif not job.left_bytes and not job.reported:
                assert job.start is not None and copied is not None
                slot.arrival = Arrival(job.start, copied, end)
                self._report(job)
            self._release_source(job)
            self._done.notify_all()

    def _await_chunk(self, queue: CopyQueue, chunk: CopyChunk) -> None:
        try:
            chunk.end.wait()
        except Exception as fault:  # noqa: BLE001 - an error of the device; a dead thread would hang the consumer
            self._fail(fault)
        self._end_chunk(queue, chunk)

    def _end_chunk(self, queue: CopyQueue, chunk: CopyChunk) -> None:
        with self._lock:
            if chunk not in queue.in_flight:
                return  # `cancel_all` and the copy thread both wait for it
            queue.in_flight.remove(chunk)
            chunk.job.chunks_in_flight -= 1
            self._moved_bytes += chunk.length_bytes
            self._waited_bytes += chunk.length_bytes * (self._waiting_since_s is not None)
            self._release_source(chunk.job)
            queue.work.notify()

    def _run_reads(self) -> None:
        """The thread that handles experts read from disk."""
        while True:
            with self._lock:
                while not self._reading and not self._closed:
                    self._read_submitted.wait()
            try:
                landed = self._readers.wait()
            except BaseException as fault:  # noqa: BLE001 - goes to the consumer; a dead thread would hang it
                if self._closed:
                    return
                self._fail(fault)
                continue
            for expert, error in landed:
                self._end_read(expert, error)

    def _end_read(self, expert: ExpertId, error: Exception | None) -> None:
        if error is None and self._convert is not None:
            with self._lock:
                raw = self.host.loading(expert)
            try:
                self._convert(expert, raw)
            except Exception as caught:  # noqa: BLE001 - goes to the consumer; a dead thread would hang it
                error = caught
        with self._lock:
            self._reading.discard(expert)
            job = self._jobs.get(expert)
            if error is None:
                self.host.landed(expert)
                if job is not None:
                    self._copy_or_read(job)
            else:
                self.host.failed(expert)
                self._filling = False  # or it would be read again and again; a demand load reports the error
                if job is not None:
                    self._report(job, error)
            self._retry_reads()
