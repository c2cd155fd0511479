"""When the tokens of a request came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

# cancelled: the client went away; refused: the server ended first
Outcome = Literal["finished", "cancelled", "timeout", "error", "refused"]


class Progress(Protocol):
    """Hears of answers while they are under way, on the event loop's thread."""

    def token(self) -> None:
        """A token of an answer came."""

    def first_token(self, ttft_s: float) -> None:
        """An answer's first token came, this long after its request."""

    def finished(self, tpot_s: float) -> None:
        """An answer of more than one token ended; each after the first took this long, on average."""


class Unwatched:
    """A `Progress` that nobody looks at."""

    def token(self) -> None: ...

    def first_token(self, ttft_s: float) -> None: ...

    def finished(self, tpot_s: float) -> None: ...


@dataclass
class Timings:
    """Of one request, by the monotonic clock; `ttft_s` and `tpot_s` have an entry for each answer that has one."""

    prompt_tokens: int
    answers: int
    started_s: float
    progress: Progress
    outcome: Outcome = "finished"
    message: str = ""  # what failed
    total_s: float = 0.0
    completion_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    _first_s: dict[int, float] = field(default_factory=dict)
    _last_s: dict[int, float] = field(default_factory=dict)

    def token(self, answer: int) -> None:
        """A token of an answer is here."""
        now_s = time.monotonic()
        if answer not in self._first_s:
            self._first_s[answer] = now_s
            self.ttft_s.append(now_s - self.started_s)
            self.progress.first_token(self.ttft_s[-1])
        self.progress.token()
        self._last_s[answer] = now_s

    def end(self, outcome: Outcome, tokens: Sequence[int]) -> None:
        """The request has ended, with so many tokens in each answer."""
        self.outcome = outcome
        self.completion_tokens = sum(tokens)
        self.total_s = time.monotonic() - self.started_s
        for answer, first_s in self._first_s.items():
            if tokens[answer] > 1:
                self.tpot_s.append((self._last_s[answer] - first_s) / (tokens[answer] - 1))
                self.progress.finished(self.tpot_s[-1])
