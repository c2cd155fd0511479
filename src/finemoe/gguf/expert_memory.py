"""Experts in slots, bound to the addresses that the library computes with.

An expert's pages are read into a slot and bound to their own addresses, read-only, when they have landed; what was
evicted is bound to nothing, so that to use it would end the process and never give a wrong answer.
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

_SPARE_MAPPINGS = 4096  # for everything else in the process
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")


class ExpertMemory(SlotPool):
    """Slots in a memory file, bound to experts' addresses.

    Args:
        slots: `C`.
        expert_index: where experts lie.
        starts: the address of each file's first byte.

    Raises:
        BudgetError: the machine does not have this much memory.
        ConfigError: the kernel refuses a memory file, or so many mappings.
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
            raise BudgetError(f"--expert-memory: {format_bytes(size_bytes)} can't be had ({error})") from error
        self._prefault = Prefault(np.frombuffer(self._memory, np.uint8))
        super().__init__((slots,), expert_index.slot_bytes)
        self._closed = False

    def guard(self) -> None:
        """From now on, to use an expert that is not resident ends the process."""
        for expert in _all(self._expert_index):
            self._unbind(expert)

    def writable(self, slot: int) -> memoryview:
        """The slot's bytes, for a transfer to write into."""
        return memoryview(self._memory)[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def reserve(self, expert: ExpertId, victim: ExpertId | None) -> int:
        """Give `expert` a free slot, or that of `victim`, which can't be used from here on."""
        slot = super().reserve(expert, victim)
        if victim is not None:
            self._unbind(victim)
        return slot

    def landed(self, expert: ExpertId) -> None:
        """The expert's bytes are in its slot: it can be used from here on.

        Raises:
            ConfigError: the kernel refuses the mapping.
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
                f"GGUF models: the kernel refuses a mapping ({error.strerror}); give a smaller --expert-memory, or "
                "raise vm.max_map_count"
            ) from error

    def clear(self) -> None:
        """Forget everything: all slots are free, no expert can be used."""
        for expert in list(self._bound):
            self._unbind(expert)
        super().clear()

    @property
    def mapped_twice_bytes(self) -> int:
        """The most that experts have taken at their own addresses, beside their slots."""
        return self._most_bound * self.slot_bytes

    def bytes_of(self, slot: int) -> torch.Tensor:
        """The slot's bytes: uint8 `[slot_bytes]`, shared, not copied."""
        import torch

        return torch.from_numpy(np.frombuffer(self.writable(slot), np.uint8))

    def await_memory(self) -> None:
        """Until all of the memory is there, so that no request has to wait for it."""
        self._prefault.wait()

    def check_integrity(self) -> None:
        """Raises `InvariantError` if slots are lost or shared, or something else than the ready experts is bound."""
        super().check_integrity()
        ready = set(self._slot) - self._loading
        if self._bound != ready:
            raise InvariantError(f"bound, but not ready, or the reverse: {sorted(self._bound ^ ready)}")

    def close(self) -> None:
        """Give the memory back. The library must have let go of the model before."""
        if self._closed:
            return
        self._closed = True
        self._prefault.stop()
        self._bound.clear()  # the addresses are not ours any more
        super().clear()
        with suppress(BufferError):  # still viewed: freed with the last view
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
    """Raises `ConfigError` where the kernel allows fewer mappings than this model may need."""
    try:
        allowed = int(_MAX_MAP_COUNT.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return
    stretches = sum(len(expert_index.byte_ranges(expert)) for expert in _all(expert_index))
    needed = 2 * stretches + sum(1 for _ in ranges()) + _SPARE_MAPPINGS  # 2: what lies between stretches, too
    if needed > allowed:
        raise ConfigError(
            f"GGUF models: {expert_index.experts} experts need {needed} memory mappings, and vm.max_map_count is "
            f"{allowed}; run: sysctl -w vm.max_map_count={1 << needed.bit_length()}"
        )
