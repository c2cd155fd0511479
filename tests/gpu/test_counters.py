"""Asynchronous device counters: everything is counted once, though any thread may collect at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finemoe.gpu.counters import DeviceHitCounter, StallCounter
from finemoe.gpu.slot_pool import Arrival
from finemoe.metrics import Counters


def in_thread(work: Callable[[], None]) -> threading.Thread:
    """Runs it on another thread; returns without waiting if it blocks."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.1)
    return thread


class DoneEvent:
    """An event that is done. The first `done` runs `meanwhile` on another thread."""

    def __init__(self, time_s: float, meanwhile: Callable[[], None] | None = None) -> None:
        self.time_s = time_s
        self.meanwhile = meanwhile
        self.other: threading.Thread | None = None

    def done(self) -> bool:
        work, self.meanwhile = self.meanwhile, None
        if work is not None:
            self.other = in_thread(work)
        return True

    def wait(self) -> None: ...

    def since_s(self, earlier: DoneEvent) -> float:
        return self.time_s - earlier.time_s


def test_a_stall_is_counted_once() -> None:
    stalls = StallCounter(Counters())
    idle = DoneEvent(1.0, meanwhile=lambda: stalls.collect(wait=True))
    stalls.record(idle, Arrival(DoneEvent(0.0), DoneEvent(3.0), 300))
    stalls.record(DoneEvent(3.0), Arrival(DoneEvent(3.0), DoneEvent(4.0), 50))
    stalls.collect()
    assert idle.other is not None
    idle.other.join()
    stalls.collect(wait=True)
    assert (stalls.counters.stall_s, stalls.counters.stalled_bytes) == (3.0, 250)


def test_a_hit_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = DeviceHitCounter(Counters())
    zeros = torch.zeros

    def meanwhile(*arguments: Any, **options: Any) -> torch.Tensor:
        in_thread(counter.collect).join()
        return zeros(*arguments, **options)

    with monkeypatch.context() as patched:
        for _ in range(2):
            counter.record(torch.tensor([[0, 2], [2, 4]]), 4)  # 4 is ignored
            patched.setattr(torch, "zeros", meanwhile)
    counter.collect()
    assert counter.counters.hits == 4
