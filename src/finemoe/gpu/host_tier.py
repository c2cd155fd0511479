"""The host tier: experts in pinned memory, as the devices want them, between the disk and the devices' slots.

It has a budget of its own. An expert that a device holds may be here too: nothing is ever written back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from torch import Tensor

from finemoe.errors import BudgetError
from finemoe.gpu.device import Device
from finemoe.store.slot_pool import RamSlotPool
from finemoe.types import ExpertId

_CANDIDATES = 64  # to go: to rank thousands would take as long as to read one
Rank = Callable[[ExpertId], float]


class HostTier:
    """Experts in pinned host memory. Not safe for threads: used under the lock of its link.

    Args:
        experts: all of them, in the order in which they are to fill the memory.
        slots: how many of them fit.
        slot_bytes: size of each.
        devices: that copy out of it.
        rank: what an expert is worth to the policy: of those asked for longest ago, the lowest goes.

    Raises:
        BudgetError: the machine has not this much memory, or may not pin it; the message names the flag.
    """

    def __init__(
        self,
        experts: Iterable[ExpertId],
        slots: int,
        slot_bytes: int,
        devices: Sequence[Device],
        rank: Rank = lambda _: 0.0,
    ) -> None:
        self.pool = RamSlotPool(slots, slot_bytes, "--host-memory")
        self.rank = rank
        self._devices = devices
        self._absent = dict.fromkeys(experts)
        self._ready: dict[ExpertId, int] = {}  # how often it is being copied; the one asked for longest ago first
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

    def holds(self, expert: ExpertId) -> bool:
        """Whether its bytes are here, ready."""
        return expert in self._ready

    def take(self, expert: ExpertId) -> Tensor | None:
        """The bytes of an expert, uint8 `[slot_bytes]`, which stay until `release`; `None` if it is not here."""
        if expert not in self._ready:
            return None
        self._ready[expert] = self._ready.pop(expert) + 1
        return self.pool.bytes_of(self.pool.pin(expert))

    def release(self, expert: ExpertId) -> None:
        self._ready[expert] -= 1
        self.pool.unpin(expert)

    def reserve(self, expert: ExpertId) -> memoryview | None:
        """Room to read an expert into, until `landed` or `failed`; `None` while all others are in use."""
        victim = None
        if not self.spare:
            idle = (each for each, copies in self._ready.items() if not copies)
            oldest = tuple(islice(idle, _CANDIDATES))
            if not oldest:
                return None
            victim = min(oldest, key=self.rank)
            del self._ready[victim]
            self._absent[victim] = None
        slot = self.pool.reserve(expert, victim)
        del self._absent[expert]
        return self.pool.writable(slot)

    def loading(self, expert: ExpertId) -> Tensor:
        """The bytes of an expert that were read and not reported as `landed` yet."""
        return self.pool.bytes_of(self.pool.slot_of(expert))

    def landed(self, expert: ExpertId) -> None:
        self.pool.landed(expert)
        self._ready[expert] = 0

    def failed(self, expert: ExpertId) -> None:
        self.pool.failed(expert)
        self._absent[expert] = None

    @property
    def spare(self) -> int:
        """Slots that were never filled, or lost their expert to a failed read."""
        return self.pool.free

    def next_absent(self) -> ExpertId | None:
        """What to fill a spare slot with."""
        return next(iter(self._absent), None) if self.spare else None

    def close(self) -> None:
        """Give the memory back. Nothing must be copying out of it or reading into it."""
        self._devices[0].unpin(self.pool.memory)
        self._ready.clear()
        self.pool.close()
