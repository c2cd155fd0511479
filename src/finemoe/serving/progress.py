"""What the server tells of its answers while they are under way. Cheap, and safe to call from any thread."""

from __future__ import annotations

import threading
from typing import NamedTuple


class Taken(NamedTuple):
    """What came since the last `take`."""

    tokens: int
    ttft_s: tuple[float, ...]  # of the answers whose first token came
    tpot_s: tuple[float, ...]  # of the answers that ended after more than one token


class Progress:
    """Tokens as they come, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = 0
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []

    def token(self, count: int = 1) -> None:
        """So many tokens of an answer came."""
        with self._lock:
            self._tokens += count

    def first_token(self, ttft_s: float) -> None:
        """An answer's first token came, this long after its request."""
        with self._lock:
            self._ttft_s.append(ttft_s)

    def finished(self, tpot_s: float) -> None:
        """An answer of more than one token ended; each after the first took this long, on average."""
        with self._lock:
            self._tpot_s.append(tpot_s)

    def take(self) -> Taken:
        """What came since the last call; belongs to one consumer."""
        with self._lock:
            taken = Taken(self._tokens, tuple(self._ttft_s), tuple(self._tpot_s))
            self._tokens, self._ttft_s, self._tpot_s = 0, [], []
        return taken
