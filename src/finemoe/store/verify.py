"""The slow plain twin of the readers, for debug runs: reads an expert again, the simplest way, and compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finemoe.checkpoint import ExpertIndex
from finemoe.errors import InvariantError
from finemoe.store.slot_pool import SlotPool
from finemoe.types import ExpertId


class SecondReader:
    """Compares slots with the checkpoint's files."""

    def __init__(self, files: Sequence[Path], expert_index: ExpertIndex, pool: SlotPool) -> None:
        self._files = tuple(files)
        self._expert_index = expert_index
        self._pool = pool

    def check(self, expert: ExpertId, slot: int) -> None:
        """Raises `InvariantError` if the slot's bytes are not those of `expert`."""
        held = self._pool.bytes_of(slot).numpy()
        for run in self._expert_index.byte_ranges(expert):
            with self._files[run.file].open("rb") as file:
                file.seek(run.file_offset_bytes)
                expected = file.read(run.length_bytes)
            part = held[run.slot_offset_bytes : run.slot_offset_bytes + run.length_bytes]
            if part.tobytes() != expected:
                file_name = self._files[run.file]
                raise InvariantError(f"slot {slot} does not hold {expert}: its bytes differ from {file_name}")
