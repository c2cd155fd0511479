"""Types that every other package shares: events, fetch plans, and the interfaces of sources and transfers.

Shapes are given with the same letters in every file: `T` tokens, `L` MoE layers, `E` routed experts per layer, `K`
active experts per token, `B` running requests, `D` hidden size, `S` stored maps, `C` slots of the pool, `d` prefetch
distance. Names end in their unit: `_bytes`, `_s`, `_ms`, `_tok_s`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

PREFILL, DECODE = 0, 1  # phases of a request


class ExpertId(NamedTuple):
    """One routed expert: `layer` counts MoE layers only, `expert` counts within the layer."""

    layer: int
    expert: int


class Step(NamedTuple):
    """Event: the input of one running request to the iteration that begins.

    Attributes:
        request: identifies a running request; never reused.
        phase: `PREFILL` or `DECODE`.
        token_ids: `[T]`, a prompt's tokens or a chunk of them; when decoding, the one token.
        embedding: `[D]`, mean of the tokens' embedding-layer outputs, where recorded.
    """

    request: int
    phase: int
    token_ids: npt.NDArray[np.int32]
    embedding: npt.NDArray[np.float32] | None = None


class Routed(NamedTuple):
    """Event: the routing of a layer is known, and its experts are needed now.

    Attributes:
        layer: counts MoE layers.
        experts: the selected experts of all running requests, ascending and distinct, from the executed indices.
        gates: `[B, E]`, the gate's distribution for each running request, the mean over its tokens; zero for experts
            that a trace did not record. `None` where no policy needs it or it is not known.
        lookahead: `[B, n, E]`, the gates of the next n layers applied to this layer's hidden states; `None` as above.
        active: `K`, how many experts each token uses at most; 0 where that is not known.
    """

    layer: int
    experts: Sequence[int]
    gates: npt.NDArray[np.float32] | None = None
    lookahead: npt.NDArray[np.float32] | None = None
    active: int = 0


class Recorded(NamedTuple):
    """A finished request of `I` iterations, for a policy to learn from.

    Attributes:
        phases: `[I]`.
        token_ids: `[I]`; of a prompt, its last token.
        gates: `[I, L, E]`, as in `Routed`.
        executed: `[I, L, E]`, the selected experts.
        embeddings: `[I, D]`, where recorded.
    """

    phases: npt.NDArray[np.uint8]
    token_ids: npt.NDArray[np.int32]
    gates: npt.NDArray[np.float32]
    executed: npt.NDArray[np.bool_]
    embeddings: npt.NDArray[np.float32] | None = None


class Fetch(NamedTuple):
    """One expert to load.

    Attributes:
        expert: to load.
        victim: the resident expert to evict from its slot; `None` for a free slot.
        urgent: a demand load, which a layer waits for; if not, a prefetch.
    """

    expert: ExpertId
    victim: ExpertId | None
    urgent: bool = True


class Plan(NamedTuple):
    """The fetches that a policy decides on, in order. The engine executes them."""

    fetches: tuple[Fetch, ...] = ()


class Landed(NamedTuple):
    """A transfer has ended: the expert's bytes are in its slot, or `error` says why not."""

    expert: ExpertId
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A contiguous byte range of a file, and where in a slot it goes, contiguously too."""

    file: int
    file_offset_bytes: int
    length_bytes: int
    slot_offset_bytes: int


class ExpertSource(Protocol):
    """A tier that experts are read from."""

    def byte_ranges(self, expert: ExpertId) -> Sequence[ByteRange]:
        """The byte ranges that make up `expert`. Does no I/O."""

    def read(self, byte_range: ByteRange, start_bytes: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `byte_range` from `start_bytes` on.

        Raises:
            OSError: the read failed or came up short; the message names the file.
        """


class Cancelled(Exception):  # noqa: N818 - an outcome, not an error
    """The outcome of a prefetch that was cancelled before it was complete."""


class Transfer(Protocol):
    """Moves experts into slots: demand loads before prefetches, each kind in the order of submission.

    When idle it calls `when_idle` from a thread of its own; the callback may `submit` a prefetch. It is called again
    once that prefetch is being moved, and after `wake`. With several devices its argument is the idle link's number.
    """

    when_idle: Callable[..., None] | None

    def submit(self, expert: ExpertId, slot: Any, *, urgent: bool = True) -> None:
        """Start moving `expert` into `slot` (what the pool's `writable` returns). Returns at once."""

    def promote(self, expert: ExpertId) -> None:
        """Turn a prefetch in flight into a demand load: the rest of it goes before other prefetches."""

    def cancel(self, expert: ExpertId) -> None:
        """Cancel a prefetch in flight. It is reported as `Cancelled`, unless it was complete."""

    def wake(self) -> None:
        """Have an idle link call `when_idle` again: prefetch priorities may have changed."""

    def poll(self, which: Container[ExpertId] | None = None) -> list[Landed]:
        """Finished transfers that were not reported yet, only those of `which` if given. Never blocks."""

    def wait(self) -> list[Landed]:
        """Like `poll`, but blocks until there is at least one. Must not be called with nothing in flight."""

    def cancel_all(self) -> None:
        """Drop everything in flight; returns when no slot is written to any more."""

    @property
    def moved_bytes(self) -> int:
        """Bytes moved since the transfer was made; grows during a transfer."""

    @property
    def waited_bytes(self) -> float:
        """Bytes moved while `wait` blocked; a read that began before counts by the share of its time."""

    def close(self) -> None:
        """Finish what is being moved, and free threads, streams and buffers."""
