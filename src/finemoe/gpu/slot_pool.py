"""The slots of the devices: one stretch of memory on each, and for every slot what was last done with it.

What is in a slot is a matter of streams: a slot is handed out as soon as its copies are under way, with the event that
tells their end (`Arrival`), and may be given away as soon as its last use was launched, with the event that tells its
end (`after`). Whoever reads or writes lets its stream wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finemoe.config import format_bytes
from finemoe.errors import BudgetError
from finemoe.gpu.device import Device, Event
from finemoe.metrics import Counters
from finemoe.store.slot_pool import SlotPool
from finemoe.types import ExpertId


@dataclass(frozen=True)
class Arrival:
    """An expert on its way into a slot: from before its first byte moved to after its last."""

    start: Event
    end: Event
    length_bytes: int


@dataclass(eq=False)
class DeviceSlot:
    """A slot as the link writes to it."""

    device: int
    into: Tensor  # uint8 [slot_bytes]
    after: Event | None = None  # the end of its last use
    arrival: Arrival | None = None  # of what is in it, until that has been waited for


def share_out(slots: int, devices: int) -> tuple[int, ...]:
    """Slots of each device: as the controller spreads its capacity."""
    return tuple((slots + devices - 1 - i) // devices for i in range(devices))


class DeviceSlotPool(SlotPool):
    """Slots for experts on devices, experts spread over them round-robin.

    Args:
        devices: where.
        slots: `C`, on all of them together.
        slot_bytes: size of each.
        home: the device that an expert lives on.
        own: the one slot that an expert may have, where there is one for each.

    Raises:
        BudgetError: a device does not have this much memory; the message names the flag.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        slots: int,
        slot_bytes: int,
        home: Callable[[ExpertId], int] = lambda _: 0,
        own: Callable[[ExpertId], int] | None = None,
    ) -> None:
        counts = share_out(slots, len(devices))
        super().__init__(counts, slot_bytes, home, own)
        self.epoch = 0  # how often it was emptied
        self.devices = tuple(devices)
        self.memory: list[Tensor] = []  # uint8 [slots, slot_bytes] of each device
        self._places: list[DeviceSlot] = []
        for index, (device, count) in enumerate(zip(devices, counts, strict=True)):
            size_bytes, available = count * slot_bytes, device.available_bytes()
            too_much = BudgetError(
                f"--expert-memory: {format_bytes(size_bytes)} for {count} experts on {device.torch_device}, but only "
                f"{format_bytes(available)} are available there; give a smaller budget"
            )
            if size_bytes > available:
                raise too_much
            try:
                memory = device.allocate(size_bytes).view(count, slot_bytes)
            except MemoryError as error:
                raise too_much from error
            self.memory.append(memory)
            self._places += [DeviceSlot(index, row) for row in memory.unbind(0)]

    def device_of(self, slot: int) -> int:
        return self._places[slot].device

    def bytes_of(self, slot: int) -> Tensor:
        """The slot's bytes: uint8 `[slot_bytes]` on its device, shared, not copied."""
        return self._places[slot].into

    def writable(self, slot: int) -> DeviceSlot:
        """The slot, for a link to copy into."""
        place = self._places[slot]
        place.arrival = None
        return place

    def arrival(self, slot: int) -> Arrival | None:
        """What the slot's readers have to wait for still; `None` once that was waited for."""
        return self._places[slot].arrival

    def has_arrived(self, slot: int) -> bool:
        arrival = self._places[slot].arrival
        return arrival is None or arrival.end.done()

    def arrived(self, slot: int) -> None:
        """All readers from now on come after the slot's arrival."""
        self._places[slot].arrival = None

    def used(self, slot: int, end: Event) -> None:
        """Nothing may be written to the slot before `end`."""
        self._places[slot].after = end

    def clear(self) -> None:
        """Forget everything. What the calling thread has launched may go on reading: new bytes come after it."""
        super().clear()
        self.epoch += 1
        ends = [device.mark_compute() for device in self.devices]
        for place in self._places:
            place.arrival = None
            place.after = ends[place.device]

    def close(self) -> None:
        """Give the memory back as soon as no view of it is left. Nothing must be using it."""
        super().clear()
        self._free = [[] for _ in self._free]
        self._places.clear()
        self.memory = [torch.empty(0, dtype=torch.uint8) for _ in self.memory]


class Stalls:
    """Adds to the counters what a device's compute stream waited for, once it has.

    The model's thread notes and settles; whoever asks for statistics settles too, from any thread.

    Args:
        counters: of the engine.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._lock = threading.Lock()  # never held while waiting for a device
        self._open: deque[tuple[Event, Arrival]] = deque()

    def note(self, free: Event, arrival: Arrival) -> None:
        """A device that had nothing to compute from `free` on was told to wait for `arrival`."""
        self._open.append((free, arrival))

    def settle(self, *, wait: bool = False) -> None:
        """Count what is over by now; with `wait`, what is under way too."""
        while (noted := self._next(wait=wait)) is not None:
            free, arrival = noted
            if wait:
                free.wait()
                arrival.end.wait()
            stall_s = arrival.end.since_s(free)
            if stall_s > 0:
                moving_s = arrival.end.since_s(arrival.start)
                with self._lock:
                    self.counters.stall_s += stall_s
                    self.counters.stalled_bytes += int(arrival.length_bytes * min(1.0, stall_s / max(moving_s, 1e-9)))

    def _next(self, *, wait: bool) -> tuple[Event, Arrival] | None:
        """Takes out the oldest note, unless it is not over and that is not to be waited for."""
        with self._lock:
            if not self._open:
                return None
            free, arrival = self._open[0]
            return self._open.popleft() if wait or (free.done() and arrival.end.done()) else None

    def drop(self) -> None:
        """Forget what was not counted yet."""
        self._open.clear()
