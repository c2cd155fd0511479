"""The host tier: a pinned cache of experts in host memory, between the disk and the devices' slots.

It has a budget of its own. It may also hold experts that a device holds: weights are never written back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from torch import Tensor

from finemoe.errors import BudgetError
from finemoe.gpu.device import Device
from finemoe.store.slot_pool import RamSlotPool
from finemoe.types import ExpertId

_MAX_CANDIDATES = 64  # for eviction: ranking thousands would take as long as reading an expert
Priority = Callable[[ExpertId], float]


class HostTier:
    """Experts in pinned host memory. Not thread-safe: used under the copier's lock.

    Eviction: of the `_MAX_CANDIDATES` least recently used experts that are not being copied, the one with the lowest
    priority.

    Args:
        experts: all of them, in the order in which free slots are filled.
        slots: how many of them fit.
        slot_bytes: size of each slot.
        devices: the devices that copy from it.
        priority: an expert's retention priority; higher is kept longer.

    Raises:
        BudgetError: the machine does not have this much memory, or does not allow pinning it; the message names the
            flag.
    """

    def __init__(
        self,
        experts: Iterable[ExpertId],
        slots: int,
        slot_bytes: int,
        devices: Sequence[Device],
        priority: Priority = lambda _: 0.0,
    ) -> None:
        self.pool = RamSlotPool(slots, slot_bytes, "--host-memory")
        self.priority = priority
        self._devices = devices
        self._absent = dict.fromkeys(experts)
        self._ready: dict[ExpertId, int] = {}  # number of users; least recently used first
        try:
            devices[0].pin(self.pool.memory)
        except MemoryError as error:
            self.pool.close()
            raise BudgetError(
                f"--host-memory: {slots * slot_bytes} bytes can't be pinned ({error}); give less, or raise the limit "
                "of locked memory (ulimit -l)"
            ) from error

    @property
    def resident(self) -> int:
        return len(self._ready)

    @property
    def free_slots(self) -> int:
        return self.pool.free

    def holds(self, expert: ExpertId) -> bool:
        """Whether the expert is ready."""
        return expert in self._ready

    def acquire(self, expert: ExpertId) -> Tensor | None:
        """The bytes of an expert, uint8 `[slot_bytes]`, kept until `release`; `None` if it is not ready."""
        if expert not in self._ready:
            return None
        self._ready[expert] = self._ready.pop(expert) + 1
        return self.pool.bytes_of(self.pool.pin(expert))

    def release(self, expert: ExpertId) -> None:
        """Undo one `acquire`."""
        self._ready[expert] -= 1
        self.pool.unpin(expert)

    def reserve(self, expert: ExpertId) -> memoryview | None:
        """A slot to read an expert into, until `landed` or `failed`; evicts one if no slot is free.

        `None` if all others are in use.
        """
        victim = None
        if not self.free_slots:
            unused = (each for each, users in self._ready.items() if not users)
            candidates = tuple(islice(unused, _MAX_CANDIDATES))
            if not candidates:
                return None
            victim = min(candidates, key=self.priority)
            del self._ready[victim]
            self._absent[victim] = None
        slot = self.pool.reserve(expert, victim)
        del self._absent[expert]
        return self.pool.writable(slot)

    def loading(self, expert: ExpertId) -> Tensor:
        """The bytes of an expert between `reserve` and `landed`."""
        return self.pool.bytes_of(self.pool.slot_of(expert))

    def landed(self, expert: ExpertId) -> None:
        self.pool.landed(expert)
        self._ready[expert] = 0

    def failed(self, expert: ExpertId) -> None:
        self.pool.failed(expert)
        self._absent[expert] = None

    def next_absent(self) -> ExpertId | None:
        """The expert to read into a free slot; `None` if there is no free slot, or all experts are here."""
        return next(iter(self._absent), None) if self.free_slots else None

    def close(self) -> None:
        """Free the memory. No copy from it or read into it may be in progress."""
        self._devices[0].unpin(self.pool.memory)
        self._ready.clear()
        self.pool.close()
