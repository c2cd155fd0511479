"""The expert slot pool: `C` slots of equal size, which expert is in each, and pins.

A slot is free, loading or ready; ready slots may be pinned. The pool enforces the invariant that keeps weights correct:
the slot of an expert that is loading or pinned is never reused. It does not choose victims; the cache manager does.
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

from finemoe.budget import format_bytes
from finemoe.errors import BudgetError, InvariantError
from finemoe.system import available_bytes, available_cores
from finemoe.types import ExpertId

if TYPE_CHECKING:
    import torch  # imported where it is used: a GGUF model needs none of it

_MADV_POPULATE_WRITE = 23  # Linux 5.14; keeps the content of pages
_CHUNK_BYTES = 16 << 20
_MAX_THREADS = 4


class SlotPool(ABC):
    """The bookkeeping of a slot pool: which slot holds which expert, and pins. Subclasses own the memory.

    Changed by one thread at a time; only `resident` may be read from any thread.

    Args:
        slots: number of slots on each device.
        slot_bytes: size of each slot.
        device_of: number of the device that holds an expert; by default there is only one.
        fixed_slot: the slot of each expert, where every expert has a slot of its own.
    """

    def __init__(
        self,
        slots: Sequence[int],
        slot_bytes: int,
        device_of: Callable[[ExpertId], int] = lambda _: 0,
        fixed_slot: Callable[[ExpertId], int] | None = None,
    ) -> None:
        self.slots = sum(slots)
        self.slot_bytes = slot_bytes
        self.starts = tuple(accumulate(slots, initial=0))  # device i has the slots from starts[i] to starts[i + 1]
        self._device_of = device_of
        self._fixed_slot = fixed_slot
        self._slot: dict[ExpertId, int] = {}  # loading or ready
        self._loading: set[ExpertId] = set()
        self._ready = 0  # a counter, so that `resident` needs no lock
        self._pins: Counter[ExpertId] = Counter()
        self._free = self._all_free()

    @property
    def size_bytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.slot_bytes

    @property
    def mapped_twice_bytes(self) -> int:
        """The most that was ever mapped at two addresses at once: the process's resident set counts it twice."""
        return 0

    @property
    def resident(self) -> int:
        """Number of ready experts. May be read from any thread, while another changes the pool."""
        return self._ready

    @property
    def free(self) -> int:
        """Number of free slots."""
        return sum(map(len, self._free))

    def slot_of(self, expert: ExpertId) -> int:
        """The slot of a loading or ready expert."""
        return self._slot[expert]

    def reserve(self, expert: ExpertId, victim: ExpertId | None) -> int:
        """Assign `expert` a free slot, or evict `victim` and assign its slot. It is loading until `landed` or `failed`.

        Returns:
            The slot.

        Raises:
            InvariantError: the victim is not ready or is pinned, no slot is free, or the expert has one already.
        """
        if expert in self._slot:
            raise InvariantError(f"{expert} has a slot already")
        if victim is None:
            free = self._free[self._device_of(expert)]
            if not free:
                raise InvariantError(f"no free slot for {expert}")
            if self._fixed_slot is None:
                slot = free.pop()
            else:
                slot = self._fixed_slot(expert)
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
        """The expert's transfer failed or was cancelled; its slot is free again."""
        if expert not in self._loading:
            raise InvariantError(f"{expert} failed without being expected")
        self._loading.remove(expert)
        self._free[self._device_of(expert)].append(self._slot.pop(expert))

    def pin(self, expert: ExpertId) -> int:
        """Protect a ready expert from eviction until `unpin`; returns its slot. Pins are counted.

        Raises:
            InvariantError: the expert is not ready.
        """
        if expert not in self._slot or expert in self._loading:
            raise InvariantError(f"{expert} is used without being ready")
        self._pins[expert] += 1
        return self._slot[expert]

    def unpin(self, expert: ExpertId) -> None:
        """Undo one `pin`."""
        if not self._pins[expert]:
            raise InvariantError(f"{expert} is unpinned more often than pinned")
        self._pins[expert] -= 1
        if not self._pins[expert]:
            del self._pins[expert]

    @abstractmethod
    def bytes_of(self, slot: int) -> torch.Tensor:
        """A view of the slot's bytes: uint8 `[slot_bytes]`."""

    @abstractmethod
    def writable(self, slot: int) -> Any:
        """The slot as the pool's `Transfer` takes it, to write into."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory once no view of it is left."""

    def has_arrived(self, slot: int) -> bool:
        """Whether a ready expert's bytes are in the slot already. On a GPU, its copy may still be queued."""
        del slot
        return True

    def clear(self) -> None:
        """Free all slots. Call only once no transfer writes to them any more."""
        self._ready = 0
        self._slot.clear()
        self._loading.clear()
        self._pins.clear()
        self._free = self._all_free()

    def check_integrity(self) -> None:
        """Raises `InvariantError` if a slot is lost or shared, or an expert is pinned without being ready."""
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
        """The free slots of each device, all of them; slots are taken from the end."""
        return [list(range(end - 1, start - 1, -1)) for start, end in pairwise(self.starts)]


class RamSlotPool(SlotPool):
    """Slots in RAM. Their memory is faulted in on background threads, from the start.

    Args:
        slots: `C`, number of slots.
        slot_bytes: size of each slot.
        flag: the flag to name in an error message.

    Raises:
        BudgetError: too little memory is available; the message names the flag.
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
        # numpy keeps the mapping alive; with torch.frombuffer it could be unmapped under its views
        array = np.frombuffer(self._memory, dtype=np.uint8)
        import torch

        self._bytes = torch.from_numpy(array)
        self._prefault = Prefault(array)
        super().__init__((slots,), slot_bytes)

    @property
    def memory(self) -> torch.Tensor:
        """A view of all slots' bytes: uint8 `[slots * slot_bytes]`."""
        return self._bytes

    def bytes_of(self, slot: int) -> torch.Tensor:
        """A view of the slot's bytes: uint8 `[slot_bytes]`."""
        return self._bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def writable(self, slot: int) -> memoryview:
        """A writable view of the slot's bytes."""
        return memoryview(self._memory)[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def wait_prefaulted(self) -> None:
        """Block until all memory is faulted in, so that no request has to wait for page faults."""
        self._prefault.wait()

    def close(self) -> None:
        """Free the memory as soon as no view of it is left."""
        self._prefault.stop()
        self.clear()
        self._free = [[] for _ in self._free]
        import torch

        self._bytes = torch.empty(0, dtype=torch.uint8)
        with suppress(BufferError):  # still viewed: freed with the last view
            self._memory.close()


def _allocate(size_bytes: int) -> mmap.mmap:
    """Page-aligned anonymous memory, in huge pages where the kernel has them (fewer TLB misses)."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return mmap.mmap(-1, size_bytes)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Prefault:
    """Faults memory in on background threads, from its start on. The memory may be used meanwhile.

    Without effect where the kernel does not support it.

    Args:
        memory: page-aligned, `[n]`.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory  # keeps it mapped
        self._next = count(0, _CHUNK_BYTES)  # next() is atomic
        self._stopped = threading.Event()
        advise = _madvise()
        chunks = -(-len(memory) // _CHUNK_BYTES)
        threads = 0 if advise is None else min(chunks, available_cores(), _MAX_THREADS)
        self._threads = [
            threading.Thread(target=self._run, args=(advise,), name="finemoe-prefault", daemon=True)
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Block until all memory is faulted in."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Skip the rest and release the memory. Returns once the threads have ended."""
        self._stopped.set()
        self.wait()
        self._memory = self._memory[:0].copy()

    def _run(self, advise: Callable[..., int]) -> None:
        address = self._memory.ctypes.data
        for start in self._next:
            length = min(_CHUNK_BYTES, len(self._memory) - start)
            if length <= 0 or self._stopped.is_set():
                return
            if advise(ctypes.c_void_p(address + start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE) != 0:
                return  # an older kernel: pages are faulted in on first use


def _madvise() -> Callable[..., int] | None:
    """Libc's madvise, called without the GIL (that of mmap holds it); `None` on other platforms."""
    if sys.platform != "linux":
        return None
    with suppress(OSError, AttributeError):
        found: Callable[..., int] = ctypes.CDLL(None).madvise
        return found
    return None
