"""The vocabulary that every other module shares.

Letters, used the same way in every file: `T` tokens, `L` MoE layers, `E` routed experts per layer, `K` experts active
per token, `D` hidden size, `S` maps in the store, `C` slots in the pool, `d` prefetch distance.
Units live in names: `_bytes`, `_s`, `_ms`, `_tok_s`.
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
    """Event: what one running request brings to the iteration that begins.

    `request` tells running requests apart and is never reused. `token_ids` are `[T]`: a prompt's (or a piece's), or the
    one token that decoding feeds. `embedding` `[D]` is the mean of their embedding-layer outputs, where recorded.
    """

    request: int
    phase: int
    token_ids: npt.NDArray[np.int32]
    embedding: npt.NDArray[np.float32] | None = None


class Routed(NamedTuple):
    """Event: the routing of `layer` is known, and these experts are needed now.

    `experts` is ascending and distinct, the union over the running requests. Set from the executed indices, which are
    the truth. `gates` `[B, E]` has the gate's distribution for each running request, the mean over its tokens; a trace
    that recorded only the selected experts has zeros elsewhere. `lookahead` `[B, n, E]` has what the gates of the next
    n layers say of this layer's hidden states. Both are `None` where nobody listens or nothing is known. `active` is K,
    how many experts each token uses at most; 0 where that is not known.
    """

    layer: int
    experts: Sequence[int]
    gates: npt.NDArray[np.float32] | None = None
    lookahead: npt.NDArray[np.float32] | None = None
    active: int = 0


class Recorded(NamedTuple):
    """A finished request, `I` iterations: what a policy may learn from.

    `phases` `[I]`, `token_ids` `[I]` (of a prompt: its last), `gates` `[I, L, E]` as in `Routed`, `executed` bool
    `[I, L, E]`, `embeddings` `[I, D]` where recorded.
    """

    phases: npt.NDArray[np.uint8]
    token_ids: npt.NDArray[np.int32]
    gates: npt.NDArray[np.float32]
    executed: npt.NDArray[np.bool_]
    embeddings: npt.NDArray[np.float32] | None = None


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
class ByteRange:
    """A contiguous stretch of a file that lands as a contiguous stretch of a slot."""

    file: int
    file_offset_bytes: int
    length_bytes: int
    slot_offset_bytes: int


class ExpertSource(Protocol):
    """A tier that can be read from: the disk now, host memory for a GPU's pool."""

    def byte_ranges(self, expert: ExpertId) -> Sequence[ByteRange]:
        """The stretches that make up `expert`. Does no I/O."""

    def read(self, run: ByteRange, start_bytes: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `run` from `start_bytes` on.

        Raises:
            OSError: the read failed or came up short; the message names the file.
        """


class Cancelled(Exception):  # noqa: N818 - an outcome, not a fault
    """Reported for a prefetch that was withdrawn before it was complete."""


class Transfer(Protocol):
    """Moves experts into slots. Chooses nothing: urgent ones first, each kind in the order that it was given.

    When it has nothing to do it calls `when_idle`, from a thread of its own choice, which may `submit` a prefetch; it
    asks again once that is under way, and after `wake`. With several devices it names the one whose link is idle.
    """

    when_idle: Callable[..., None] | None

    def submit(self, expert: ExpertId, slot: Any, *, urgent: bool = True) -> None:
        """Start moving `expert` into `slot`, as its pool gives it. Returns at once; `wait` and `poll` tell of it."""

    def promote(self, expert: ExpertId) -> None:
        """A prefetch under way has become urgent: what is left of it goes before other prefetches."""

    def cancel(self, expert: ExpertId) -> None:
        """A prefetch under way is not wanted any more. It is reported as `Cancelled`, unless it was complete."""

    def wake(self) -> None:
        """What is worth prefetching may have changed: ask `when_idle` again."""

    def poll(self, which: Container[ExpertId] | None = None) -> list[Landed]:
        """What has landed and was not reported yet, of `which` alone if given. Never blocks."""

    def wait(self) -> list[Landed]:
        """Like `poll`, but blocks until there is at least one. Must not be called with nothing in flight."""

    def cancel_all(self) -> None:
        """Drop everything in flight; returns when no slot is written to any more."""

    @property
    def moved_bytes(self) -> int:
        """Bytes moved since the transfer was made; grows while a fetch is under way."""

    @property
    def waited_bytes(self) -> float:
        """Bytes moved while `wait` blocked. A piece that was under way before counts by the share of its time."""

    def close(self) -> None:
        """Finish what is in flight and free threads, streams and buffers."""
