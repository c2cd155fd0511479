"""Expert slots on devices: one allocation per device, and the events that order reads and writes of each slot.

Copies and kernels are asynchronous. A slot is ready once its copies are submitted, and may be reused once the kernels
that read it are launched. So each slot has two events: the end of its copies (`Arrival`), which kernels that read it
wait for, and the end of its last use, which the next copies into it wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finemoe.budget import format_bytes
from finemoe.errors import BudgetError
from finemoe.gpu.device import Device, Event
from finemoe.store.slot_pool import SlotPool
from finemoe.types import ExpertId


@dataclass(frozen=True)
class Arrival:
    """The copy of an expert into a slot: an event before its first byte, and one after its last."""

    start: Event
    end: Event
    length_bytes: int


@dataclass(eq=False)
class DeviceSlot:
    """One slot, as `HostToDeviceCopier` writes to it."""

    device: int
    memory: Tensor  # uint8 [slot_bytes]
    last_use: Event | None = None  # end of the kernels that read it last
    arrival: Arrival | None = None  # None: no kernel has to wait


def slots_per_device(slots: int, devices: int) -> tuple[int, ...]:
    """Splits `slots` over devices, as the cache manager splits its capacity."""
    return tuple((slots + devices - 1 - i) // devices for i in range(devices))


class DeviceSlotPool(SlotPool):
    """A slot pool in the memory of devices, with experts spread over them round-robin.

    Args:
        devices: one allocation is made on each.
        slots: `C`, in total.
        slot_bytes: size of each slot.
        device_of: number of the device that holds an expert.
        fixed_slot: the slot of each expert, where every expert has a slot of its own.

    Raises:
        BudgetError: a device does not have this much memory; the message names the flag.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        slots: int,
        slot_bytes: int,
        device_of: Callable[[ExpertId], int] = lambda _: 0,
        fixed_slot: Callable[[ExpertId], int] | None = None,
    ) -> None:
        counts = slots_per_device(slots, len(devices))
        super().__init__(counts, slot_bytes, device_of, fixed_slot)
        self.epoch = 0  # number of `clear`s
        self.devices = tuple(devices)
        self.memory: list[Tensor] = []  # uint8 [slots, slot_bytes] of each device
        self._device_slots: list[DeviceSlot] = []
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
            self._device_slots += [DeviceSlot(index, row) for row in memory.unbind(0)]

    def device_of_slot(self, slot: int) -> int:
        return self._device_slots[slot].device

    def bytes_of(self, slot: int) -> Tensor:
        """The slot's bytes: uint8 `[slot_bytes]` on its device. A view, not a copy."""
        return self._device_slots[slot].memory

    def writable(self, slot: int) -> DeviceSlot:
        """The slot, to copy an expert into."""
        device_slot = self._device_slots[slot]
        device_slot.arrival = None
        return device_slot

    def arrival(self, slot: int) -> Arrival | None:
        """What kernels that read the slot have to wait for; `None` after `clear_arrival`."""
        return self._device_slots[slot].arrival

    def has_arrived(self, slot: int) -> bool:
        arrival = self._device_slots[slot].arrival
        return arrival is None or arrival.end.done()

    def clear_arrival(self, slot: int) -> None:
        """All kernels launched from now on run after the slot's arrival."""
        self._device_slots[slot].arrival = None

    def record_use(self, slot: int, end: Event) -> None:
        """The next copies into the slot wait for `end`."""
        self._device_slots[slot].last_use = end

    def clear(self) -> None:
        """Free all slots. Kernels that the calling thread has launched may still read them: later copies wait."""
        super().clear()
        self.epoch += 1
        ends = [device.record_compute() for device in self.devices]
        for device_slot in self._device_slots:
            device_slot.arrival = None
            device_slot.last_use = ends[device_slot.device]

    def close(self) -> None:
        """Free the memory once no view of it is left. No copy or kernel may be using it."""
        super().clear()
        self._free = [[] for _ in self._free]
        self._device_slots.clear()
        self.memory = [torch.empty(0, dtype=torch.uint8) for _ in self.memory]
