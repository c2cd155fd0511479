"""How long something takes, time and again."""

from __future__ import annotations

import math
from dataclasses import dataclass

_LEAST_S = 1e-9  # what a clock may call 0 has a logarithm


@dataclass(frozen=True, slots=True)
class Durations:
    """Of the same thing: how often it happened, how long that took in all, and how much it varied. Never changes.

    Attributes:
        logs: sum of the durations' logarithms.
        squares: sum of the squares of these.
    """

    count: int = 0
    total_s: float = 0.0
    logs: float = 0.0
    squares: float = 0.0

    @classmethod
    def one(cls, seconds: float) -> Durations:
        """Of what happened once."""
        log = math.log(max(seconds, _LEAST_S))
        return cls(1, seconds, log, log * log)

    def __add__(self, other: Durations) -> Durations:
        return Durations(
            self.count + other.count, self.total_s + other.total_s, self.logs + other.logs, self.squares + other.squares
        )

    def __sub__(self, other: Durations) -> Durations:
        """Without the others, which are among these."""
        return Durations(
            self.count - other.count, self.total_s - other.total_s, self.logs - other.logs, self.squares - other.squares
        )

    @property
    def mean_s(self) -> float | None:
        return self.total_s / self.count if self.count else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the logarithm."""
        if not self.count:
            return None
        return math.sqrt(max(0.0, self.squares / self.count - (self.logs / self.count) ** 2))


NEVER = Durations()


class Timings:
    """Durations that grow in place: cheaper than a new object for each, where a model's layers are timed."""

    __slots__ = ("_count", "_logs", "_squares", "_total_s")

    def __init__(self) -> None:
        self.reset()

    @property
    def so_far(self) -> Durations:
        return Durations(self._count, self._total_s, self._logs, self._squares)

    def add(self, seconds: float) -> None:
        """It happened once more."""
        self._change(1, seconds)

    def take_back(self, seconds: float) -> None:
        """One that was added did not count."""
        self._change(-1, seconds)

    def reset(self) -> None:
        """It has not happened yet."""
        self._count, self._total_s, self._logs, self._squares = 0, 0.0, 0.0, 0.0

    def _change(self, times: int, seconds: float) -> None:
        log = math.log(max(seconds, _LEAST_S))
        self._count += times
        self._total_s += times * seconds
        self._logs += times * log
        self._squares += times * log * log
