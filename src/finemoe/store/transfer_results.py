"""What every `Transfer` shares: experts in flight, bytes moved, and how the consumer collects finished transfers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container
from typing import Generic, TypeVar

from finemoe.types import ExpertId, Landed

Job = TypeVar("Job")


class BaseTransfer(Generic[Job]):
    """The consumer's side of a `Transfer`. `wait` belongs to one consumer thread; methods with `_` need the lock."""

    def __init__(self) -> None:
        # always acquired itself, never through its conditions: their `__enter__` is Python code, in which a Ctrl-C
        # would leave it locked
        self._lock = threading.Lock()
        self._done = threading.Condition(self._lock)
        self._jobs: dict[ExpertId, Job] = {}  # submitted and not finished
        self._landed: list[Landed] = []  # finished and not collected
        self._fault: BaseException | None = None  # raised by `when_idle` or a worker thread; for the consumer
        self._closed = False
        self._moved_bytes = 0
        self._waited_bytes = 0.0
        self._waiting_since_s: float | None = None  # when the consumer began to wait
        self.when_idle: Callable[..., None] | None = None

    @property
    def moved_bytes(self) -> int:
        """Bytes moved since the transfer was made; grows chunk by chunk."""
        return self._moved_bytes

    @property
    def waited_bytes(self) -> float:
        """Bytes moved while `wait` blocked."""
        return self._waited_bytes

    def poll(self, which: Container[ExpertId] | None = None) -> list[Landed]:
        """Finished transfers that were not reported yet, only those of `which` if given. Never blocks."""
        if not self._landed and self._fault is None:
            return []
        with self._lock:
            return self._take(which)

    def wait(self) -> list[Landed]:
        """Finished transfers that were not reported yet; blocks until there is at least one.

        Raises:
            RuntimeError: nothing is in flight, or the transfer was closed: this would never return.
        """
        with self._lock:
            if not self._jobs and not self._landed and self._fault is None:
                raise RuntimeError("nothing is in flight")
            self._waiting_since_s = time.perf_counter()
            try:
                while not self._landed and self._fault is None:
                    if self._closed:
                        raise RuntimeError("the transfer is closed")
                    self._done.wait()
            finally:
                self._waiting_since_s = None
            return self._take()

    def _take(self, which: Container[ExpertId] | None = None) -> list[Landed]:
        if self._fault is not None and which is None:
            fault, self._fault = self._fault, None
            raise fault
        landed = [each for each in self._landed if which is None or each.expert in which]
        self._landed = [each for each in self._landed if which is not None and each.expert not in which]
        return landed

    def _fail(self, fault: BaseException) -> None:
        """The consumer's next `poll` or `wait` raises this."""
        with self._lock:
            self._fault = fault
            self._done.notify_all()
