"""How long devices waited for experts, told by the events of their streams."""

from __future__ import annotations

import threading
from collections import deque

from finemoe.device import Event
from finemoe.metrics import Counters
from finemoe.store import Arrival


class Stalls:
    """Adds to the counters what a device's compute stream waited for, once it has.

    The model's thread notes and settles; whoever asks for statistics settles too, from any thread.

    Args:
        counters: of the engine.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._lock = threading.Lock()  # never held while waiting for a device
        self._open: deque[tuple[Event, Arrival]] = deque()

    def note(self, free: Event, arrival: Arrival) -> None:
        """A device that had nothing to compute from `free` on was told to wait for `arrival`."""
        self._open.append((free, arrival))

    def settle(self, *, wait: bool = False) -> None:
        """Count what is over by now; with `wait`, what is under way too."""
        while (noted := self._next(wait=wait)) is not None:
            free, arrival = noted
            if wait:
                free.wait()
                arrival.end.wait()
            stall_s = arrival.end.since_s(free)
            if stall_s > 0:
                moving_s = arrival.end.since_s(arrival.start)
                with self._lock:
                    self.counters.stall_s += stall_s
                    self.counters.stalled_bytes += int(arrival.length_bytes * min(1.0, stall_s / max(moving_s, 1e-9)))

    def _next(self, *, wait: bool) -> tuple[Event, Arrival] | None:
        """Takes out the oldest note, unless it is not over and that is not to be waited for."""
        with self._lock:
            if not self._open:
                return None
            free, arrival = self._open[0]
            return self._open.popleft() if wait or (free.done() and arrival.end.done()) else None

    def drop(self) -> None:
        """Forget what was not counted yet."""
        self._open.clear()
