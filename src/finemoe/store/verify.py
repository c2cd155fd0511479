"""`--verify`: reads every loaded expert a second time, with plain file reads, and compares it with its slot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finemoe.checkpoint import ExpertIndex
from finemoe.errors import InvariantError
from finemoe.store.slot_pool import SlotPool
from finemoe.types import ExpertId


class SecondReader:
    """Compares slots with the checkpoint's files. Slow; for debugging."""

    def __init__(self, files: Sequence[Path], expert_index: ExpertIndex, pool: SlotPool) -> None:
        self._files = tuple(files)
        self._expert_index = expert_index
        self._pool = pool

    def check(self, expert: ExpertId, slot: int) -> None:
        """Raises `InvariantError` if the slot's bytes are not those of `expert`."""
        slot_bytes = self._pool.bytes_of(slot).numpy()
        for byte_range in self._expert_index.byte_ranges(expert):
            with self._files[byte_range.file].open("rb") as file:
                file.seek(byte_range.file_offset_bytes)
                expected = file.read(byte_range.length_bytes)
            start = byte_range.slot_offset_bytes
            if slot_bytes[start : start + byte_range.length_bytes].tobytes() != expected:
                path = self._files[byte_range.file]
                raise InvariantError(f"slot {slot} does not hold {expert}: its bytes differ from {path}")
