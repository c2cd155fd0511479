"""What devices tell late is counted once, whoever asks meanwhile: statistics are asked for from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finemoe.gpu.expert_layer import Touched
from finemoe.gpu.slot_pool import Arrival, Stalls
from finemoe.metrics import Counters


def computed_on_host(work: Callable[[], None]) -> threading.Thread:
    """A thread that does it now, or as soon as it may."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.1)
    return thread


class Moment:
    """An event that is over, and during whose asking something else goes on, once."""

    def __init__(self, time_s: float, meanwhile: Callable[[], None] | None = None) -> None:
        self.time_s = time_s
        self.meanwhile = meanwhile
        self.other: threading.Thread | None = None

    def done(self) -> bool:
        work, self.meanwhile = self.meanwhile, None
        if work is not None:
            self.other = computed_on_host(work)
        return True

    def wait(self) -> None: ...

    def since_s(self, earlier: Moment) -> float:
        return self.time_s - earlier.time_s


def test_a_stall_is_counted_once() -> None:
    stalls = Stalls(Counters())
    free = Moment(1.0, meanwhile=lambda: stalls.settle(wait=True))
    stalls.note(free, Arrival(Moment(0.0), Moment(3.0), 300))
    stalls.note(Moment(3.0), Arrival(Moment(3.0), Moment(4.0), 50))
    stalls.settle()
    assert free.other is not None
    free.other.join()
    stalls.settle(wait=True)
    assert (stalls.counters.stall_s, stalls.counters.stalled_bytes) == (3.0, 250)


def test_a_hit_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = Touched(Counters())
    zeros = torch.zeros

    def meanwhile(*arguments: Any, **options: Any) -> torch.Tensor:
        computed_on_host(touched.settle).join()
        return zeros(*arguments, **options)

    with monkeypatch.context() as patched:
        for _ in range(2):
            touched.note(torch.tensor([[0, 2], [2, 4]]), 4)  # 4 is nobody's
            patched.setattr(torch, "zeros", meanwhile)
    touched.settle()
    assert touched.counters.hits == 4
