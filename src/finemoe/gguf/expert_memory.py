"""Experts in slots, bound to the addresses that the library computes with.

An expert is one contiguous stretch of each of its layer's expert tensors. The pages that lie wholly within a stretch
are read into a slot and bound to their own address, read-only, when they have landed; what was evicted is bound to
nothing, so that to use it would end the process and never give a wrong answer. The pages in which two experts meet
belong to the dense part.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finemoe.config import format_bytes
from finemoe.errors import BudgetError, ConfigError, InvariantError
from finemoe.gguf.address_space import NO_ACCESS, PAGE_BYTES, bind, map_anonymous, ranges
from finemoe.gguf.file import ExpertTensor
from finemoe.store.memory import available_bytes
from finemoe.store.pool import Slots
from finemoe.store.prefault import Prefault
from finemoe.types import ExpertId, Run

Layer = Sequence[ExpertTensor]  # the expert tensors that one MoE layer computes with
_SPARE_MAPPINGS = 4096  # for everything else in the process
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")


class _Pages(NamedTuple):
    """The whole pages of an expert's stretch of one tensor."""

    file: int
    file_offset_bytes: int
    slot_offset_bytes: int
    length_bytes: int


class ExpertPages:
    """Where every expert lies, in its file and in a slot. An `ExpertSource`'s index.

    Args:
        layers: by MoE layer.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(tuple(layer) for layer in layers)
        self.sizes = tuple(layer[0].experts for layer in self.layers)  # experts of each layer
        self._pages = {
            ExpertId(number, expert): tuple(_whole_pages(layer, expert))
            for number, layer in enumerate(self.layers)
            for expert in range(layer[0].experts)
        }
        self._runs = {
            expert: tuple(
                Run(each.file, each.file_offset_bytes, each.length_bytes, each.slot_offset_bytes) for each in own
            )
            for expert, own in self._pages.items()
        }
        whole = (sum(each.length_bytes for each in own) for own in self._pages.values())
        self.slot_bytes = max(whole, default=0) or PAGE_BYTES

    @property
    def experts(self) -> int:
        """Routed experts of the whole model."""
        return sum(self.sizes)

    @property
    def weight_bytes(self) -> int:
        """All experts together, as they are stored."""
        return sum(tensor.info.size_bytes for layer in self.layers for tensor in layer)

    @property
    def stored_dtype(self) -> str:
        """The types that experts are stored in, the most frequent first; more than one with `+` between."""
        sizes: dict[str, int] = {}
        for tensor in (tensor for layer in self.layers for tensor in layer):
            sizes[tensor.info.type] = sizes.get(tensor.info.type, 0) + tensor.info.size_bytes
        return "+".join(sorted(sizes, key=lambda kind: -sizes[kind]))

    def runs(self, expert: ExpertId) -> Sequence[Run]:
        """The stretches of files that make up `expert`'s slot, in whole pages."""
        return self._runs[expert]

    def pages(self, expert: ExpertId) -> Sequence[_Pages]:
        return self._pages[expert]

    def mappings(self) -> int:
        """How many mappings all of this may take: each stretch one, and what lies between it and the next."""
        return sum(2 * len(own) for own in self._pages.values())


def _whole_pages(layer: Layer, expert: int) -> Iterator[_Pages]:
    slot_offset_bytes = 0
    for tensor in layer:
        start = tensor.offset_bytes(expert)
        first = -(-start // PAGE_BYTES) * PAGE_BYTES
        length = (start + tensor.expert_bytes) // PAGE_BYTES * PAGE_BYTES - first
        if length > 0:
            yield _Pages(tensor.info.file, first, slot_offset_bytes, length)
            slot_offset_bytes += length


def dense_ranges(tensors: Sequence[ExpertTensor], file: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Of the bytes `start` to `end` of a file, what belongs to no expert alone; in order, as starts and ends."""
    held = sorted(
        (each.file_offset_bytes, each.file_offset_bytes + each.length_bytes)
        for tensor in tensors
        if tensor.info.file == file
        for expert in range(tensor.experts)
        for each in _whole_pages([tensor], expert)
    )
    for (_, before), (after, _) in pairwise([(start, start), *held, (end, end)]):
        if before < min(after, end):
            yield max(before, start), min(after, end)


class ExpertMemory(Slots):
    """Slots in a memory file, bound to experts' addresses.

    Args:
        slots: `C`.
        pages: where experts lie.
        starts: the address of each file's first byte.

    Raises:
        BudgetError: the machine does not have this much memory.
        ConfigError: the kernel refuses a memory file, or so many mappings.
    """

    def __init__(self, slots: int, pages: ExpertPages, starts: dict[int, int]) -> None:
        self._pages = pages
        self._starts = starts
        self._bound: set[ExpertId] = set()
        size_bytes = slots * pages.slot_bytes
        if size_bytes > (available := available_bytes()):
            raise BudgetError(
                f"--expert-memory: {slots} experts take {format_bytes(size_bytes)}, but only {format_bytes(available)} "
                "of memory are available; give a smaller budget"
            )
        _refuse_too_many_mappings(pages)
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
        super().__init__((slots,), pages.slot_bytes)
        self._closed = False

    def guard(self) -> None:
        """From now on, to use an expert that is not resident ends the process."""
        for layer, experts in enumerate(self._pages.sizes):
            for expert in range(experts):
                self._unbind(ExpertId(layer, expert))

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
        try:
            for each in self._pages.pages(expert):
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
        for each in self._pages.pages(expert):
            map_anonymous(each.length_bytes, self._starts[each.file] + each.file_offset_bytes, NO_ACCESS)
        self._bound.discard(expert)


def _refuse_too_many_mappings(pages: ExpertPages) -> None:
    """Raises `ConfigError` where the kernel allows fewer mappings than this model may need."""
    try:
        allowed = int(_MAX_MAP_COUNT.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return
    needed = pages.mappings() + sum(1 for _ in ranges()) + _SPARE_MAPPINGS
    if needed > allowed:
        raise ConfigError(
            f"GGUF models: {pages.experts} experts need {needed} memory mappings, and vm.max_map_count is {allowed}; "
            f"run: sysctl -w vm.max_map_count={1 << needed.bit_length()}"
        )
