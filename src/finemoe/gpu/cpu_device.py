"""A device that is none: the same streams and events on the CPU, for tests of everything that is above them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor


class CpuEvent:
    """A point in the work of a `CpuDevice`."""

    def __init__(self) -> None:
        self._fired = threading.Event()
        self._time_s = 0.0

    def fire(self) -> None:
        self._time_s = time.perf_counter()
        self._fired.set()

    def done(self) -> bool:
        return self._fired.is_set()

    def wait(self) -> None:
        self._fired.wait()

    def since_s(self, earlier: CpuEvent) -> float:
        return self._time_s - earlier._time_s


class CpuDevice:
    """Copies run on a thread, computation in its caller's.

    Args:
        memory_bytes: what it says that it has.
    """

    def __init__(self, memory_bytes: int = 1 << 40) -> None:
        self.torch_device = torch.device("cpu")
        self._memory_bytes = memory_bytes
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        threading.Thread(target=self._run, name="finemoe-copies", daemon=True).start()

    def available_bytes(self) -> int:
        return self._memory_bytes

    def allocate(self, size_bytes: int) -> Tensor:
        if size_bytes > self._memory_bytes:
            raise MemoryError
        return torch.empty(size_bytes, dtype=torch.uint8)

    def pin(self, memory: Tensor) -> None:
        """Nothing to do."""

    def unpin(self, memory: Tensor) -> None:
        """Nothing to do."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        self._work.put(lambda: into.copy_(source))

    def mark_copies(self) -> CpuEvent:
        event = CpuEvent()
        self._work.put(event.fire)
        return event

    def mark_compute(self) -> CpuEvent:
        event = CpuEvent()
        event.fire()  # it was computed when it was launched
        return event

    def copies_wait(self, event: CpuEvent) -> None:
        self._work.put(event.wait)

    def compute_wait(self, event: CpuEvent) -> None:
        event.wait()

    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor

    def _run(self) -> None:
        while True:
            self._work.get()()
