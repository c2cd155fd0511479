"""Counters of what devices do asynchronously: added to the engine's counters once the device is done.

The model's thread records; any thread may collect, for statistics.
"""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from finemoe.gpu.device import Event
from finemoe.gpu.slot_pool import Arrival
from finemoe.metrics import Counters


class StallCounter:
    """Adds to the counters the time that devices' compute streams waited for experts, once the events are done.

    Args:
        counters: of the engine.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._lock = threading.Lock()  # never held while waiting for a device
        self._recorded: deque[tuple[Event, Arrival]] = deque()

    def record(self, idle: Event, arrival: Arrival) -> None:
        """A device, with nothing else to compute after `idle`, waits for `arrival`."""
        self._recorded.append((idle, arrival))

    def collect(self, *, wait: bool = False) -> None:
        """Counts the stalls that are over; with `wait`, waits for the others and counts them too."""
        while (recorded := self._next(wait=wait)) is not None:
            idle, arrival = recorded
            if wait:
                idle.wait()
                arrival.end.wait()
            stall_s = arrival.end.since_s(idle)
            if stall_s > 0:
                copy_s = arrival.end.since_s(arrival.start)
                with self._lock:
                    self.counters.stall_s += stall_s
                    self.counters.stalled_bytes += int(arrival.length_bytes * min(1.0, stall_s / max(copy_s, 1e-9)))

    def reset(self) -> None:
        """Forgets what was not collected."""
        self._recorded.clear()

    def _next(self, *, wait: bool) -> tuple[Event, Arrival] | None:
        """Removes and returns the oldest record; without `wait`, only if its events are done."""
        with self._lock:
            if not self._recorded:
                return None
            idle, arrival = self._recorded[0]
            return self._recorded.popleft() if wait or (idle.done() and arrival.end.done()) else None


class DeviceHitCounter:
    """Counts the distinct experts of a layer on the device, so that counting hits does not wait for it.

    Args:
        counters: of the engine.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._lock = threading.Lock()
        self._hits: Tensor | None = None  # int64, on the device

    def record(self, index: Tensor, experts: int) -> None:
        """A layer of `experts` experts, all resident, executed `index` `[T, K]`."""
        used = torch.zeros(experts + 1, dtype=torch.int64, device=index.device)
        used[index.reshape(-1).clamp(max=experts)] = 1
        hits = used[:experts].sum()
        with self._lock:
            self._hits = hits if self._hits is None else self._hits.add_(hits)

    def collect(self) -> None:
        """Adds the hits to the counters. Waits for the device."""
        with self._lock:
            hits, self._hits = self._hits, None
        if hits is not None:
            self.counters.hits += int(hits)
