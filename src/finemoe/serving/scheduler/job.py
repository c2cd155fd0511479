"""What the border hands to the model's thread, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


class Constraint(Protocol):
    """Keeps an answer within a grammar. Belongs to one job; called in the order of its tokens."""

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[V]` with what may not come next at minus infinity."""

    def accept(self, token: int) -> None:
        """The answer goes on with `token`."""


@dataclass(frozen=True)
class Job:
    """One answer to one prompt.

    Args:
        name: unique among the jobs that run or wait.
        prompt: token ids, at least one.
        max_tokens: the answer's most.
        temperature: 0 takes the likeliest token.
        top_p: of the probability mass, the share that is drawn from.
        seed: of this job's own generator: what else runs does not change its draws. `None`: drawn from the system.
        stop: token ids that end the answer; the one that did is reported, and counts.
        logprobs: `None`: none; `n`: of each token that came, and of the `n` likeliest.
        constraint: a grammar.
    """

    name: str
    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: frozenset[int] = frozenset()
    logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Token:
    """The next token of an answer; `likeliest` are pairs of id and log probability, best first."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """An answer's end: a stop token, `max_tokens`, a `cancel`, or an error (then with its message)."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""


Listener = Callable[[str, Token | Finished], None]  # the job's name; called from the model's thread, must not block


@dataclass(frozen=True)
class Load:
    """What the model's thread has on its hands."""

    running: int
    waiting: int
    free_cache_blocks: int  # of the key-value cache
    cache_blocks: int


class Worker(Protocol):
    """Runs jobs. Safe to call from any thread; returns at once, but for `drain` and `close`."""

    def submit(self, job: Job, listener: Listener) -> None:
        """Take a job. `Finished` is the last thing its listener hears, and is heard exactly once.

        Raises:
            RuntimeError: the worker is draining or closed.
        """

    def cancel(self, name: str) -> None:
        """End a job within one step, its slots and cache freed; unknown names (it has just finished) are ignored."""

    def load(self) -> Load: ...

    def failure(self) -> str | None:
        """Why no job can run any more, in one line, if the thread has ended by itself; else `None`."""

    def drain(self, timeout_s: float) -> bool:
        """Take no more jobs and wait for those at hand. Returns whether all finished; the others are cancelled."""

    def close(self) -> None:
        """Cancel everything and end the thread."""
