"""Moves experts from host memory to devices' slots, by way of the disk where need be. Chooses nothing.

Every device has a lane: a queue, and a thread that hands chunks to the device's copy stream. An expert is reported as
landed when its last chunk was handed over; its slot has the event that tells when the bytes are there, and whoever
computes lets its stream wait for that. So the model's thread goes on to launch work while the bytes still move.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from finemoe.gpu.copy_queue import CopyChunk, CopyJob, CopyQueue, Pieces, cut
from finemoe.gpu.device import Device
from finemoe.gpu.host_tier import HostTier
from finemoe.gpu.slot_pool import Arrival, DeviceSlot
from finemoe.store.reader import ReaderThreads
from finemoe.store.transfer import BaseTransfer
from finemoe.types import Cancelled, ExpertId, Landed


class HostToDeviceCopier(BaseTransfer[CopyJob]):
    """A `Transfer` into devices' slots. `wait` belongs to one consumer thread.

    Args:
        host: the tier that is copied from; owned, and used under this object's lock.
        readers: read experts from the disk into the host tier; owned.
        devices: that have the slots.
        pieces: what of an expert's bytes in the host tier goes where; does no I/O.
        arrange: changes an expert's bytes as they were read into what the devices want, in place; `None` where they
            are the same but for their places.
        fill: read experts that nobody asked for into what is spare of the host tier.
    """

    def __init__(
        self,
        host: HostTier,
        readers: ReaderThreads,
        devices: Sequence[Device],
        pieces: Pieces,
        arrange: Callable[[ExpertId, Tensor], None] | None = None,
        *,
        fill: bool = True,
    ) -> None:
        super().__init__()
        self.host = host
        self._readers = readers
        self._pieces = pieces
        self._arrange = arrange
        self._staging = threading.Condition(self._lock)
        self._reading: set[ExpertId] = set()  # from the disk
        self._starved: dict[ExpertId, None] = {}  # to be read once the host tier has room
        self._filling = fill
        self._lanes = [CopyQueue(i, device, threading.Condition(self._lock)) for i, device in enumerate(devices)]
        self._threads = [
            threading.Thread(target=self._pump, args=(lane,), name=f"finemoe-link-{lane.index}", daemon=True)
            for lane in self._lanes
        ]
        self._threads.append(threading.Thread(target=self._stage, name="finemoe-stage", daemon=True))
        for thread in self._threads:
            thread.start()
        if fill:
            readers.when_idle = self._fill
            readers.wake()

    @property
    def disk_bytes(self) -> int:
        """Bytes read from the disk so far."""
        return self._readers.moved_bytes

    def submit(self, expert: ExpertId, slot: DeviceSlot, *, urgent: bool = True) -> None:
        """Start moving `expert` into `slot`. Returns at once."""
        pieces = self._pieces(expert)
        job = CopyJob(expert, slot, pieces, sum(piece.length_bytes for piece in pieces), urgent)
        with self._lock:
            if self._closed:
                raise RuntimeError("the transfer is closed")
            self._jobs[expert] = job
            self._lanes[slot.device].ask = True  # once this is sent, there may be more
            self._send_or_read(job)

    def hold(self, expert: ExpertId) -> Tensor | None:
        """The bytes of an expert in the host tier, which stay until `release`; `None` if it is not there."""
        with self._lock:
            return None if self._closed else self.host.take(expert)

    def release(self, expert: ExpertId) -> None:
        """Undo one `hold`."""
        with self._lock:
            self.host.release(expert)
            self._feed()

    def promote(self, expert: ExpertId) -> None:
        """A prefetch under way has become urgent: what is left of it goes before other prefetches."""
        with self._lock:
            job = self._jobs.get(expert)
            if job is None or job.urgent:
                return
            job.urgent = True
            lane = self._lanes[job.slot.device]
            if lane.drop(job):
                lane.add(job)
            if expert in self._reading:
                self._readers.promote(expert)

    def cancel(self, expert: ExpertId) -> None:
        """A prefetch under way is not wanted any more. It is reported as `Cancelled`, unless it was complete.

        Its chunks under way may still be written: whoever gets the slot is copied there after them.
        """
        with self._lock:
            job = self._jobs.get(expert)
            if job is None or job.urgent:
                return
            self._lanes[job.slot.device].drop(job)
            self._report(job, Cancelled())

    def wake(self) -> None:
        """What is worth prefetching may have changed: ask `when_idle` again."""
        if self.when_idle is None:
            return
        with self._lock:
            for lane in self._lanes:
                lane.ask = True
                if lane.idle:
                    lane.work.notify()

    def cancel_all(self) -> None:
        """Drop everything in flight; returns when no slot is written to any more. The host tier reads on."""
        with self._lock:
            for job in list(self._jobs.values()):
                self._report(job, Cancelled())
            self._starved.clear()
            for lane in self._lanes:
                lane.urgent.clear()
                lane.later.clear()
            while any(lane.sending for lane in self._lanes):
                self._done.wait()
            under_way = [(lane, chunk) for lane in self._lanes for chunk in lane.flying]
        # not left to the lanes' threads: they may be waiting for the engine to be cleared
        for lane, chunk in under_way:
            chunk.end.wait()
            self._copied(lane, chunk)
        with self._lock:
            self._landed = []
            self._fault = None

    def close(self) -> None:
        """Finish the copies and reads under way, end the threads, and give the host tier's memory back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for lane in self._lanes:
                lane.urgent.clear()
                lane.later.clear()
                lane.work.notify_all()
            self._done.notify_all()
            self._staging.notify_all()
        self._readers.close()
        for thread in self._threads:
            thread.join()
        self.host.close()

    def _send_or_read(self, job: CopyJob) -> None:
        """Queue the job at its lane if the host tier has its expert; if not, have it read first."""
        job.source = self.host.take(job.expert)
        if job.source is not None:
            self._lanes[job.slot.device].add(job)
        elif job.expert in self._reading:
            if job.urgent:
                self._readers.promote(job.expert)
        elif not self._read(job.expert, urgent=job.urgent):
            self._starved[job.expert] = None

    def _read(self, expert: ExpertId, *, urgent: bool) -> bool:
        """Read an expert into the host tier. False if that has no room now."""
        room = None if self._closed else self.host.reserve(expert)
        if room is None:
            return False
        self._reading.add(expert)
        self._readers.submit(expert, room, urgent=urgent)
        self._staging.notify()
        return True

    def _fill(self) -> None:
        """The disk is idle. Called by the readers, from a thread of theirs."""
        with self._lock:
            expert = self.host.next_absent() if self._filling and not self._closed else None
            if expert is not None:
                self._read(expert, urgent=False)

    def _feed(self) -> None:
        """The host tier may have room again: read what waited for that, urgent ones first."""
        for expert in sorted(self._starved, key=lambda each: not self._jobs[each].urgent):
            if not self._read(expert, urgent=self._jobs[expert].urgent):
                return
            del self._starved[expert]

    def _report(self, job: CopyJob, error: Exception | None = None) -> None:
        job.over = True
        del self._jobs[job.expert]
        self._starved.pop(job.expert, None)
        self._landed.append(Landed(job.expert, error))
        self._done.notify_all()
        self._let_go(job)

    def _let_go(self, job: CopyJob) -> None:
        """The host tier's bytes are held until the last chunk of a job was copied."""
        if job.over and not job.flying and job.source is not None:
            job.source = None
            self.host.release(job.expert)
            self._feed()

    def _pump(self, lane: CopyQueue) -> None:
        """The life of a lane's thread: send, ask for more before going idle, see chunks out."""
        while True:
            with self._lock:
                while not (self._closed or lane.next() or lane.flying or self._may_ask(lane)):
                    lane.work.wait()
                if self._closed and not lane.flying:
                    return
                job, oldest = lane.next(), lane.flying[0] if lane.flying else None
                begin = job.sent_bytes if job is not None else 0
                ask = self.when_idle if job is None and self._may_ask(lane) else None
                if job is not None:
                    lane.begin(job)
                elif ask is not None:
                    lane.ask = False
            if job is not None:
                self._send(lane, job, begin)
            elif ask is not None:
                try:
                    ask(lane.index)  # without our lock: it submits
                except BaseException as fault:  # noqa: BLE001 - belongs to the consumer
                    self._fail(fault)
            elif oldest is not None:
                self._see_out(lane, oldest)

    def _see_out(self, lane: CopyQueue, chunk: CopyChunk) -> None:
        try:
            chunk.end.wait()
        except Exception as fault:  # noqa: BLE001 - of the device: a dead lane would hang the consumer
            self._fail(fault)
        self._copied(lane, chunk)

    def _may_ask(self, lane: CopyQueue) -> bool:
        return lane.ask and self.when_idle is not None and lane.idle and not self._closed

    def _send(self, lane: CopyQueue, job: CopyJob, begin: int) -> None:
        """Hand the bytes from `begin` to what `CopyQueue.begin` said over to the copy stream."""
        end, source, slot, device = job.sent_bytes, job.source, job.slot, lane.device
        error, copied = None, None
        try:
            if job.start is None:
                if slot.after is not None:
                    device.copies_wait(slot.after)
                job.start = device.mark_copies()
            assert source is not None
            for start, target, length in cut(job.pieces, begin, end):
                device.copy(slot.into[target : target + length], source[start : start + length])
            copied = device.mark_copies()
        except Exception as caught:  # noqa: BLE001 - handed to the consumer: a dead lane would hang it
            error = caught
        with self._lock:
            lane.sending = False
            if copied is None:
                job.flying -= 1
                lane.drop(job)
            else:
                lane.flying.append(CopyChunk(job, copied, end - begin))
            if error is not None and not job.over:
                self._report(job, error)
            elif not job.left_bytes and not job.over:
                assert job.start is not None and copied is not None
                slot.arrival = Arrival(job.start, copied, end)
                self._report(job)
            self._let_go(job)
            self._done.notify_all()

    def _copied(self, lane: CopyQueue, chunk: CopyChunk) -> None:
        with self._lock:
            if chunk not in lane.flying:
                return  # `cancel` was here first
            lane.flying.remove(chunk)
            chunk.job.flying -= 1
            self._moved_bytes += chunk.length_bytes
            self._waited_bytes += chunk.length_bytes * (self._waiting_since_s is not None)
            self._let_go(chunk.job)
            lane.work.notify()

    def _stage(self) -> None:
        """The life of the thread that takes in what was read from the disk."""
        while True:
            with self._lock:
                while not self._reading and not self._closed:
                    self._staging.wait()
            try:
                landed = self._readers.wait()
            except BaseException as fault:  # noqa: BLE001 - belongs to the consumer: a dead thread would hang it
                if self._closed:
                    return
                self._fail(fault)
                continue
            for expert, error in landed:
                self._staged(expert, error)

    def _staged(self, expert: ExpertId, error: Exception | None) -> None:
        if error is None and self._arrange is not None:
            with self._lock:
                raw = self.host.loading(expert)
            try:
                self._arrange(expert, raw)
            except Exception as caught:  # noqa: BLE001 - handed to the consumer: a dead thread would hang it
                error = caught
        with self._lock:
            self._reading.discard(expert)
            job = self._jobs.get(expert)
            if error is None:
                self.host.landed(expert)
                if job is not None:
                    self._send_or_read(job)
            else:
                self.host.failed(expert)
                self._filling = False  # nobody asked for it; whoever needs what can't be read will hear of it
                if job is not None:
                    self._report(job, error)
            self._feed()
