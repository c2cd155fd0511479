"""How long devices waited for experts, told by the events of their streams."""

from __future__ import annotations

from collections import deque

from finemoe.device import Event
from finemoe.metrics import Counters
from finemoe.store import Arrival


class Stalls:
    """Adds to the counters what a device's compute stream waited for, once it has. Not safe for threads.

    Args:
        counters: of the engine.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._open: deque[tuple[Event, Arrival]] = deque()

    def note(self, free: Event, arrival: Arrival) -> None:
        """A device that had nothing to compute from `free` on was told to wait for `arrival`."""
        self._open.append((free, arrival))

    def settle(self, *, wait: bool = False) -> None:
        """Count what is over by now; with `wait`, what is under way too."""
        while self._open:
            free, arrival = self._open[0]
            if wait:
                free.wait()
                arrival.end.wait()
            elif not (free.done() and arrival.end.done()):
                return
            self._open.popleft()
            stall_s = arrival.end.since_s(free)
            if stall_s > 0:
                moving_s = arrival.end.since_s(arrival.start)
                self.counters.stall_s += stall_s
                self.counters.stalled_bytes += int(arrival.length_bytes * min(1.0, stall_s / max(moving_s, 1e-9)))

    def drop(self) -> None:
        """Forget what was not counted yet."""
        self._open.clear()
