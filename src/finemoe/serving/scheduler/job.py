"""Jobs and the `Worker` interface: how the HTTP side hands work to the model thread, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


class Constraint(Protocol):
    """Restricts an answer to a grammar. Belongs to one job; called once per token, in order."""

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[V]` with every token that may not come next at minus infinity."""

    def accept(self, token: int) -> None:
        """Advances the grammar by `token`."""


@dataclass(frozen=True)
class Job:
    """One answer to one prompt.

    Args:
        name: unique among the jobs that run or wait.
        prompt: token ids, at least one.
        max_tokens: the most tokens of the answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling; the share of the probability mass that is sampled from.
        seed: of this job's own random generator, so that its samples do not depend on other jobs; `None`: random.
        stop: token ids that end the answer. The one that ended it is reported and counted.
        logprobs: `None` for none; `n` for those of each generated token and of the `n` most likely ones.
        constraint: a grammar, or `None`.
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
    """A generated token; `top_logprobs` are pairs of token id and log probability, most likely first."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a job: a stop token, `max_tokens`, a `cancel`, or an error (with its message)."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""


JobListener = Callable[[str, Token | Finished], None]  # gets the job's name; runs on the model thread, must not block


@dataclass(frozen=True)
class WorkerLoad:
    """Jobs and key-value cache blocks in use."""

    running: int
    waiting: int
    free_cache_blocks: int
    cache_blocks: int


class Worker(Protocol):
    """Runs jobs. Thread-safe; calls return at once, except `drain` and `close`."""

    def submit(self, job: Job, listener: JobListener) -> None:
        """Queue a job. `Finished` is the last event that its listener gets, exactly once.

        Raises:
            ValueError: the job can never run.
            RuntimeError: the worker is draining or closed, or has failed.
        """

    def cancel(self, name: str) -> None:
        """End a job within one forward pass and free its cache; unknown or finished names are ignored."""

    def load(self) -> WorkerLoad: ...

    def failure(self) -> str | None:
        """The error that ended the model thread, in one line; `None` while it is healthy."""

    def drain(self, timeout_s: float) -> bool:
        """Refuse new jobs and wait for the others; those unfinished after `timeout_s` are cancelled.

        Returns:
            Whether all jobs finished in time.
        """

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
