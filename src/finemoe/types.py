"""The vocabulary that every other module shares.

Letters, used the same way in every file: `T` tokens, `L` MoE layers, `E` routed experts per layer, `K` experts active
per token, `D` hidden size, `S` maps in the store, `C` slots in the pool, `d` prefetch distance.
Units live in names: `_bytes`, `_s`, `_ms`, `_tok_s`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class ExpertId(NamedTuple):
    """One routed expert: `layer` counts MoE layers only, `expert` counts within the layer."""

    layer: int
    expert: int


class Routed(NamedTuple):
    """Event: the routing of `layer` is known, and these experts are needed now.

    `experts` is ascending and distinct. Set by the engine from the executed indices, which are the truth.
    """

    layer: int
    experts: tuple[int, ...]


class Fetch(NamedTuple):
    """One expert to bring in. `victim` is the resident expert whose slot it takes, `None` for a free slot.

    `urgent` fetches are waited for by a layer; the others are prefetches.
    """

    expert: ExpertId
    victim: ExpertId | None
    urgent: bool = True


class Plan(NamedTuple):
    """What a policy wants done, in order. Executing it is someone else's work."""

    fetches: tuple[Fetch, ...] = ()


class Landed(NamedTuple):
    """A fetch has ended: the expert's bytes are in its slot, or `error` says why not."""

    expert: ExpertId
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A contiguous stretch of a file that lands as a contiguous stretch of a slot."""

    file: int
    file_offset_bytes: int
    length_bytes: int
    slot_offset_bytes: int


class ExpertSource(Protocol):
    """A tier that can be read from: the disk now, host memory for a GPU's pool."""

    def runs(self, expert: ExpertId) -> Sequence[Run]:
        """The stretches that make up `expert`. Does no I/O."""

    def read(self, run: Run, start_bytes: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `run` from `start_bytes` on.

        Raises:
            OSError: the read failed or came up short; the message names the file.
        """


class Transfer(Protocol):
    """Moves experts into slots. Chooses nothing: it does what it was given, in the order that it was given."""

    def submit(self, expert: ExpertId, slot: memoryview, *, urgent: bool = True) -> None:
        """Start moving `expert` into `slot`. Returns at once; the outcome is reported by `wait` or `poll`."""

    def poll(self) -> list[Landed]:
        """What has landed since the last call. Never blocks."""

    def wait(self) -> list[Landed]:
        """Like `poll`, but blocks until there is at least one. Must not be called with nothing in flight."""

    def cancel(self) -> None:
        """Drop everything in flight; returns when no slot is written to any more."""

    @property
    def moved_bytes(self) -> int:
        """Bytes moved since the transfer was made; grows while a fetch is under way."""

    def close(self) -> None:
        """Finish what is in flight and free threads, streams and buffers."""
