"""A `Device` on the CPU, with the same streams and events: runs everything above it without a GPU, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor


class CpuEvent:
    """An event on a stream of a `CpuDevice`."""

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
    """Copies run on a thread, kernels in the thread that launches them.

    Args:
        memory_bytes: reported as available.
    """

    def __init__(self, memory_bytes: int = 1 << 40) -> None:
        self.torch_device = torch.device("cpu")
        self._memory_bytes = memory_bytes
        self._copy_stream: SimpleQueue[Callable[[], object]] = SimpleQueue()
        threading.Thread(target=self._run, name="finemoe-copy-stream", daemon=True).start()

    def available_bytes(self) -> int:
        return self._memory_bytes

    def allocate(self, size_bytes: int) -> Tensor:
        if size_bytes > self._memory_bytes:
            raise MemoryError
        return torch.empty(size_bytes, dtype=torch.uint8)

    def pin(self, memory: Tensor) -> None:
        """Does nothing."""

    def unpin(self, memory: Tensor) -> None:
        """Does nothing."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        self._copy_stream.put(lambda: into.copy_(source))

    def record_copies(self) -> CpuEvent:
        event = CpuEvent()
        self._copy_stream.put(event.fire)
        return event

    def record_compute(self) -> CpuEvent:
        event = CpuEvent()
        event.fire()  # kernels run when they are launched
        return event

    def copies_wait(self, event: CpuEvent) -> None:
        self._copy_stream.put(event.wait)

    def compute_wait(self, event: CpuEvent) -> None:
        event.wait()

    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor

    def _run(self) -> None:
        while True:
            self._copy_stream.get()()
