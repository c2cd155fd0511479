"""Expert slots, mapped at the addresses where the library expects the weights.

An expert's pages are read into a slot. Once the read completes, the slot's pages are mapped read-only at the expert's
addresses. An evicted expert's pages are inaccessible: using one crashes the process instead of giving a wrong answer.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finemoe.budget import format_bytes
from finemoe.checkpoint import ExpertIndex
from finemoe.errors import BudgetError, ConfigError, InvariantError
from finemoe.gguf.address_space import NO_ACCESS, bind, map_anonymous, ranges
from finemoe.store.slot_pool import Prefault, SlotPool
from finemoe.system import available_bytes
from finemoe.types import ExpertId

if TYPE_CHECKING:
    import torch

_SPARE_MAPPINGS = 4096  # for the rest of the process
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")


class ExpertMemory(SlotPool):
    """A slot pool in a memory file (memfd), mapped at experts' addresses.

    Args:
        slots: number of slots, `C`.
        expert_index: location of every expert.
        starts: by file, the address of its first byte.

    Raises:
        BudgetError: the machine does not have this much memory.
        ConfigError: the system does not allow a memory file, or enough mappings.
    """

    def __init__(self, slots: int, expert_index: ExpertIndex, starts: dict[int, int]) -> None:
        self._expert_index = expert_index
        self._starts = starts
        self._bound: set[ExpertId] = set()
        self._most_bound = 0
        size_bytes = slots * expert_index.slot_bytes
        if size_bytes > (available := available_bytes()):
            raise BudgetError(
                f"--expert-memory: {slots} experts take {format_bytes(size_bytes)}, but only {format_bytes(available)} "
                "of memory are available; give a smaller budget"
            )
        _refuse_too_many_mappings(expert_index)
        try:
            self._file = os.memfd_create("finemoe-experts", os.MFD_CLOEXEC)
        except (OSError, AttributeError) as error:
            raise ConfigError(f"GGUF models: need memfd_create, which this system refuses ({error})") from error
        try:
            os.ftruncate(self._file, size_bytes)
            self._memory = mmap.mmap(self._file, size_bytes)
        except (OSError, OverflowError) as error:
            os.close(self._file)
            raise BudgetError(f"--expert-memory: {format_bytes(size_bytes)} can't be allocated ({error})") from error
        self._prefault = Prefault(np.frombuffer(self._memory, np.uint8))
        super().__init__((slots,), expert_index.slot_bytes)
        self._closed = False

    def guard(self) -> None:
        """Make all experts inaccessible: using one that is not resident crashes the process from this call on."""
        for expert in _all(self._expert_index):
            self._unbind(expert)

    def writable(self, slot: int) -> memoryview:
        """The slot's bytes, as the destination of a transfer."""
        return memoryview(self._memory)[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def reserve(self, expert: ExpertId, victim: ExpertId | None) -> int:
        """Assign `expert` a free slot, or the slot of `victim`, whose pages become inaccessible."""
        slot = super().reserve(expert, victim)
        if victim is not None:
            self._unbind(victim)
        return slot

    def landed(self, expert: ExpertId) -> None:
        """Mark the expert's read as complete and map its slot at the expert's addresses.

        Raises:
            ConfigError: the mapping failed.
        """
        super().landed(expert)
        start_bytes = self.slot_of(expert) * self.slot_bytes
        self._bound.add(expert)
        self._most_bound = max(self._most_bound, len(self._bound))
        try:
            for each in self._expert_index.byte_ranges(expert):
                address = self._starts[each.file] + each.file_offset_bytes
                bind(address, each.length_bytes, self._file, start_bytes + each.slot_offset_bytes)
        except OSError as error:
            raise ConfigError(
                f"GGUF models: a memory mapping failed ({error.strerror}); give a smaller --expert-memory, or "
                "raise vm.max_map_count"
            ) from error

    def clear(self) -> None:
        """Free all slots and make all experts inaccessible."""
        for expert in list(self._bound):
            self._unbind(expert)
        super().clear()

    @property
    def mapped_twice_bytes(self) -> int:
        """Peak bytes of slots that were also mapped at experts' addresses."""
        return self._most_bound * self.slot_bytes

    def bytes_of(self, slot: int) -> torch.Tensor:
        """The slot's bytes: uint8 `[slot_bytes]`, a view."""
        import torch

        return torch.from_numpy(np.frombuffer(self.writable(slot), np.uint8))

    def await_memory(self) -> None:
        """Block until all slot memory is allocated, so that requests do not page-fault."""
        self._prefault.wait()

    def check_integrity(self) -> None:
        """Raises `InvariantError` if a slot is lost or shared, or the bound experts are not exactly the ready ones."""
        super().check_integrity()
        ready = set(self._slot) - self._loading
        if self._bound != ready:
            raise InvariantError(f"experts bound but not ready, or ready but not bound: {sorted(self._bound ^ ready)}")

    def close(self) -> None:
        """Release the memory. The library must have freed the model before."""
        if self._closed:
            return
        self._closed = True
        self._prefault.stop()
        self._bound.clear()  # the library has unmapped these addresses
        super().clear()
        with suppress(BufferError):  # a view still exists: freed with the last one
            self._memory.close()
        os.close(self._file)

    def _unbind(self, expert: ExpertId) -> None:
        for each in self._expert_index.byte_ranges(expert):
            map_anonymous(each.length_bytes, self._starts[each.file] + each.file_offset_bytes, NO_ACCESS)
        self._bound.discard(expert)


def _all(expert_index: ExpertIndex) -> Iterator[ExpertId]:
    for layer, layout in enumerate(expert_index.layouts):
        yield from (ExpertId(layer, expert) for expert in range(layout.experts))


def _refuse_too_many_mappings(expert_index: ExpertIndex) -> None:
    """Raises `ConfigError` if `vm.max_map_count` is below the number of mappings that this model may need."""
    try:
        allowed = int(_MAX_MAP_COUNT.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return
    byte_ranges = sum(len(expert_index.byte_ranges(expert)) for expert in _all(expert_index))
    needed = 2 * byte_ranges + sum(1 for _ in ranges()) + _SPARE_MAPPINGS  # 2: each range and the gap after it
    if needed > allowed:
        raise ConfigError(
            f"GGUF models: {expert_index.experts} experts need {needed} memory mappings, and vm.max_map_count is "
            f"{allowed}; run: sysctl -w vm.max_map_count={1 << needed.bit_length()}"
        )
