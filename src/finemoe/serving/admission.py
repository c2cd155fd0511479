"""Who comes in: as many answers as the house holds, none while it closes. Belongs to the event loop's thread."""

from __future__ import annotations

import asyncio
import math

from finemoe.serving.errors import ApiError


class Admission:
    """Counts the answers in the house.

    Args:
        capacity: answers that may run or wait.
        together: of these, as many as run at the same time.
    """

    def __init__(self, capacity: int, together: int) -> None:
        self.draining = False
        self.answers = 0
        self._capacity = capacity
        self._together = together
        self._mean_s = 1.0  # that an answer takes, of late
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self, answers: int) -> None:
        """Find out whether so many answers would be taken in.

        Raises:
            ApiError: no: 400 if they never fit, 429 if not now, 503 if the server is closing.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if answers > self._capacity:
            raise ApiError(
                400, f"n: {answers} answers at once, and this server takes {self._capacity}", param="n", code="too_many"
            )
        if self.answers + answers > self._capacity:
            raise ApiError(
                429,
                f"{self.answers} answers are running or waiting, and this server takes {self._capacity}; retry later",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after_s())},
            )

    def enter(self, answers: int) -> None:
        """Take so many answers in, or raise what `check` raises; `leave` lets them out."""
        self.check(answers)
        self.answers += answers
        self._idle.clear()

    def leave(self, answers: int, took_s: float) -> None:
        """Answers have ended, after so many seconds."""
        self.answers -= answers
        self._mean_s += 0.1 * (took_s - self._mean_s)
        if not self.answers:
            self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Take none any more, and wait for the last to leave. Returns whether it did in time."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _retry_after_s(self) -> int:
        """When a place should be free: those inside end one after another, so many at a time."""
        return max(1, min(60, math.ceil(self._mean_s / self._together)))
