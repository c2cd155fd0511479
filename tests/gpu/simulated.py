"""A simulated device: streams with random delays, and a race detector for slots.

Each stream is a thread that sleeps at random before its work. Vector clocks follow which copies and kernels are known
to be over on the host and on each stream: an access that events do not order is a race, even if it went well this time.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor


class Clock(NamedTuple):
    """A vector clock: numbers of copies and kernels that are known to be over."""

    copies: int = 0
    kernels: int = 0

    def after(self, other: Clock) -> Clock:
        return Clock(max(self.copies, other.copies), max(self.kernels, other.kernels))


class SimulatedEvent:
    def __init__(self, device: SimulatedDevice, clock: Clock) -> None:
        self._device = device
        self.clock = clock
        self.fired = threading.Event()
        self.time_s = 0.0

    def fire(self) -> None:
        self.time_s = time.perf_counter()
        self.fired.set()

    def done(self) -> bool:
        if self.fired.is_set():
            self._device.host_saw(self)
        return self.fired.is_set()

    def wait(self) -> None:
        assert self.fired.wait(20), "the event never fired"
        self._device.host_saw(self)

    def since_s(self, earlier: SimulatedEvent) -> float:
        return self.time_s - earlier.time_s


class Stream:
    def __init__(self, seed: int, longest_s: float) -> None:
        self._random = random.Random(seed)
        self._longest_s = longest_s
        self._work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the stream never ended"

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._random.random() < 0.3:
                time.sleep(self._random.random() * self._longest_s)
            work()


class SimulatedDevice:
    """A `Device`. `launch` runs a kernel that reads a slot; `faults` are races, and checks of kernels that failed."""

    def __init__(self, seed: int, slot_bytes: int, longest_s: float = 0.0005) -> None:
        self.torch_device = torch.device("cpu")
        self.faults: list[str] = []
        self._slot_bytes = slot_bytes
        self._lock = threading.RLock()
        self._host, self._copying, self._computing = Clock(), Clock(), Clock()
        self._copies = Stream(seed, longest_s)
        self._kernels = Stream(seed + 1, longest_s)
        self._base = 0
        self._written: dict[int, int] = {}  # by slot: the last copy into it
        self._read: defaultdict[int, list[int]] = defaultdict(list)  # by slot: kernels since then

    def available_bytes(self) -> int:
        return 1 << 40

    def allocate(self, size_bytes: int) -> Tensor:
        memory = torch.full((size_bytes,), 255, dtype=torch.uint8)
        self._base = memory.data_ptr()
        return memory

    def pin(self, memory: Tensor) -> None: ...

    def unpin(self, memory: Tensor) -> None: ...

    def copy(self, into: Tensor, source: Tensor) -> None:
        slot = (into.data_ptr() - self._base) // self._slot_bytes
        with self._lock:
            clock = self._copying.after(self._host)
            self._copying = clock._replace(copies=clock.copies + 1)
            if any(kernel > clock.kernels for kernel in self._read.pop(slot, [])):
                self.faults.append(f"slot {slot} is overwritten while a kernel may read it")
            self._written[slot] = self._copying.copies
            self._copies.put(lambda: into.copy_(source))

    def launch(self, slot: int, kernel: Callable[[], bool]) -> None:
        with self._lock:
            clock = self._computing.after(self._host)
            self._computing = clock._replace(kernels=clock.kernels + 1)
            if self._written[slot] > clock.copies:
                self.faults.append(f"slot {slot} is read before it was written")
            self._read[slot].append(self._computing.kernels)

        def run() -> None:
            if not kernel():
                self.faults.append(f"slot {slot} holds the wrong bytes")

        self._kernels.put(run)

    def record_copies(self) -> SimulatedEvent:
        with self._lock:
            event = SimulatedEvent(self, self._copying.after(self._host))
            self._copies.put(event.fire)
            return event

    def record_compute(self) -> SimulatedEvent:
        with self._lock:
            event = SimulatedEvent(self, self._computing.after(self._host))
            self._kernels.put(event.fire)
            return event

    def copies_wait(self, event: SimulatedEvent) -> None:
        with self._lock:
            self._copying = self._copying.after(event.clock)
            self._copies.put(lambda: event.fired.wait(20))

    def compute_wait(self, event: SimulatedEvent) -> None:
        with self._lock:
            self._computing = self._computing.after(event.clock)
            self._kernels.put(lambda: event.fired.wait(20))

    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.record_compute().wait()
        return list(tensors)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor

    def host_saw(self, event: SimulatedEvent) -> None:
        with self._lock:
            self._host = self._host.after(event.clock)

    def close(self) -> None:
        self._copies.close()
        self._kernels.close()
