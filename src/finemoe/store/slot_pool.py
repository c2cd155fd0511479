"""The device slots: `C` equal slots of page-aligned memory, and what is in each.

A slot is free, loading, or ready; a ready one may be pinned. The pool enforces the one rule that a wrong weight could
come from: nothing takes the slot of an expert that is loading or pinned. It does not choose who takes whose.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate, chain, count, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finemoe.config import format_bytes
from finemoe.errors import BudgetError, InvariantError
from finemoe.system import available_bytes, available_cores
from finemoe.types import ExpertId

if TYPE_CHECKING:
    import torch  # imported where it is used: a GGUF model needs none of it

_MADV_POPULATE_WRITE = 23  # Linux 5.14; leaves what is in the pages as it is
_CHUNK_BYTES = 16 << 20
_MOST_THREADS = 4


class Prefault:
    """Brings memory in, from its start on, on threads that begin at once. The memory may be used meanwhile.

    Without effect where the kernel can't be asked.

    Args:
        memory: page-aligned, `[n]`.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory  # keeps it mapped
        self._next = count(0, _CHUNK_BYTES)  # taking from it is atomic
        self._over = threading.Event()
        advise = _madvise()
        chunks = -(-len(memory) // _CHUNK_BYTES)
        threads = 0 if advise is None else min(chunks, available_cores(), _MOST_THREADS)
        self._threads = [
            threading.Thread(target=self._run, args=(advise,), name="finemoe-prefault", daemon=True)
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until all of it is there."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Leave the rest as it is, and let go of the memory. Returns once no thread is at work."""
        self._over.set()
        self.wait()
        self._memory = self._memory[:0].copy()

    def _run(self, advise: Callable[..., int]) -> None:
        address = self._memory.ctypes.data
        for start in self._next:
            length = min(_CHUNK_BYTES, len(self._memory) - start)
            if length <= 0 or self._over.is_set():
                return
            if advise(ctypes.c_void_p(address + start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE) != 0:
                return  # an older kernel: the first use brings it in


def _madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    with suppress(OSError, AttributeError):
        found: Callable[..., int] = ctypes.CDLL(None).madvise  # mmap's own holds the GIL
        return found
    return None


class SlotPool(ABC):
    """A bounded pool of expert slots: which slot holds which expert, and pins. Subclasses own the memory.

    Args:
        slots: how many, on each device.
        slot_bytes: size of each.
        home: the device that an expert lives on; by default the only one.
        own: the one slot that an expert may have, where there is one for each.
    """

    def __init__(
        self,
        slots: Sequence[int],
        slot_bytes: int,
        home: Callable[[ExpertId], int] = lambda _: 0,
        own: Callable[[ExpertId], int] | None = None,
    ) -> None:
        self.own = own
        self.slots = sum(slots)
        self.slot_bytes = slot_bytes
        self.home = home
        self.starts = tuple(accumulate(slots, initial=0))  # of device i: the slots from starts[i] to starts[i + 1]
        self._slot: dict[ExpertId, int] = {}  # loading or ready
        self._loading: set[ExpertId] = set()
        self._ready = 0  # counted, so that whoever asks without a lock never counts one that is on its way
        self._pins: Counter[ExpertId] = Counter()
        self._free = self._all_free()

    @property
    def size_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def mapped_twice_bytes(self) -> int:
        """The most that was ever mapped at two addresses at once: the process's resident set counts it twice."""
        return 0

    @property
    def resident(self) -> int:
        """How many experts are ready. May be asked from any thread, while others change the pool."""
        return self._ready

    @property
    def free(self) -> int:
        """How many slots have nobody's expert in them."""
        return sum(map(len, self._free))

    def slot_of(self, expert: ExpertId) -> int:
        """The slot that an expert has, loading or ready."""
        return self._slot[expert]

    def reserve(self, expert: ExpertId, victim: ExpertId | None) -> int:
        """Give `expert` a free slot, or that of `victim`. It counts as loading until `landed` or `failed`.

        Raises:
            InvariantError: the victim is not ready or is pinned, no slot is free, or the expert has one already.
        """
        if expert in self._slot:
            raise InvariantError(f"{expert} has a slot already")
        if victim is None:
            free = self._free[self.home(expert)]
            if not free:
                raise InvariantError(f"no free slot for {expert}")
            slot = free.pop() if self.own is None else self.own(expert)
            if self.own is not None:
                free.remove(slot)
        else:
            if victim not in self._slot or victim in self._loading:
                raise InvariantError(f"{victim} is not ready and can't make room for {expert}")
            if self._pins[victim]:
                raise InvariantError(f"{victim} is in use and can't make room for {expert}")
            self._ready -= 1
            slot = self._slot.pop(victim)
        self._slot[expert] = slot
        self._loading.add(expert)
        return slot

    def landed(self, expert: ExpertId) -> None:
        """The expert's bytes are in its slot."""
        if expert not in self._loading:
            raise InvariantError(f"{expert} landed without being expected")
        self._loading.remove(expert)
        self._ready += 1

    def failed(self, expert: ExpertId) -> None:
        """The expert's bytes will not come; its slot is free again."""
        if expert not in self._loading:
            raise InvariantError(f"{expert} failed without being expected")
        self._loading.remove(expert)
        self._free[self.home(expert)].append(self._slot.pop(expert))

    def pin(self, expert: ExpertId) -> int:
        """Keep a ready expert in place until `unpin`; returns its slot. Pins count.

        Raises:
            InvariantError: the expert is not ready.
        """
        if expert not in self._slot or expert in self._loading:
            raise InvariantError(f"{expert} is used without being ready")
        self._pins[expert] += 1
        return self._slot[expert]

    def unpin(self, expert: ExpertId) -> None:
        if not self._pins[expert]:
            raise InvariantError(f"{expert} is unpinned more often than pinned")
        self._pins[expert] -= 1
        if not self._pins[expert]:
            del self._pins[expert]

    @abstractmethod
    def bytes_of(self, slot: int) -> torch.Tensor:
        """The slot's bytes: uint8 `[slot_bytes]`, shared, not copied."""

    @abstractmethod
    def writable(self, slot: int) -> Any:
        """What a transfer needs to write into the slot."""

    @abstractmethod
    def close(self) -> None:
        """Frees the memory once no view of it is left."""

    def settled(self, slot: int) -> bool:
        """Whether the bytes of a ready expert are there: always, but on a device, whose streams run behind."""
        del slot
        return True

    def clear(self) -> None:
        """Forget everything: all slots are free. Only when no transfer writes to them any more."""
        self._ready = 0
        self._slot.clear()
        self._loading.clear()
        self._pins.clear()
        self._free = self._all_free()

    def check_integrity(self) -> None:
        """Raises `InvariantError` if slots are lost, shared, or pinned without being ready."""
        used = sorted([*self._slot.values(), *chain(*self._free)])
        if used != list(range(self.slots)):
            raise InvariantError(f"slots are lost or shared: {used}")
        if self._ready != len(self._slot) - len(self._loading):
            raise InvariantError(f"{self._ready} experts are counted as ready, of {len(self._slot)} with a slot")
        for expert in self._loading:
            if expert not in self._slot:
                raise InvariantError(f"{expert} is loading without a slot")
        for expert, pins in self._pins.items():
            if pins and (expert not in self._slot or expert in self._loading):
                raise InvariantError(f"{expert} is pinned without being ready")

    def _all_free(self) -> list[list[int]]:
        return [list(range(end - 1, start - 1, -1)) for start, end in pairwise(self.starts)]


class RamSlotPool(SlotPool):
    """Slots for experts in this machine's memory. It begins at once to bring that in, in the background.

    Args:
        slots: `C`.
        slot_bytes: size of each.
        flag: what asked for this memory, for the message.

    Raises:
        BudgetError: the machine does not have this much memory; the message names the flag.
    """

    def __init__(self, slots: int, slot_bytes: int, flag: str = "--expert-memory") -> None:
        size_bytes = slots * slot_bytes
        available = available_bytes()
        too_much = BudgetError(
            f"{flag}: {format_bytes(size_bytes)} for {slots} experts, but only {format_bytes(available)} "
            "of memory are available; give a smaller budget"
        )
        if size_bytes > available:
            raise too_much
        try:
            self._memory = _allocate(size_bytes)
        except (OSError, MemoryError, OverflowError) as error:
            raise too_much from error
        # by way of numpy, which holds on to the mapping; torch.frombuffer would let it be unmapped under its views
        array = np.frombuffer(self._memory, dtype=np.uint8)
        import torch

        self._bytes = torch.from_numpy(array)
        self._prefault = Prefault(array)
        super().__init__((slots,), slot_bytes)

    @property
    def memory(self) -> torch.Tensor:
        """All slots' bytes: uint8 `[slots * slot_bytes]`, shared, not copied."""
        return self._bytes

    def bytes_of(self, slot: int) -> torch.Tensor:
        """The slot's bytes: uint8 `[slot_bytes]`, shared, not copied."""
        return self._bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def writable(self, slot: int) -> memoryview:
        """The slot's bytes, for a transfer to write into."""
        return memoryview(self._memory)[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def await_memory(self) -> None:
        """Until all of the memory is there, so that no request has to wait for it."""
        self._prefault.wait()

    def close(self) -> None:
        """Give the memory back as soon as no view of it is left."""
        self._prefault.stop()
        self.clear()
        self._free = [[] for _ in self._free]
        import torch

        self._bytes = torch.empty(0, dtype=torch.uint8)
        with suppress(BufferError):  # still viewed: freed with the last view
            self._memory.close()


def _allocate(size_bytes: int) -> mmap.mmap:
    """Page-aligned memory of our own, in huge pages where the kernel offers them (fewer TLB misses)."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return mmap.mmap(-1, size_bytes)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
