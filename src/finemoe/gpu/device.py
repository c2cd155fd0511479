"""What the data path asks of a device: memory, two streams, and events that order them.

The compute stream is the one that the model's kernels go to. The copy stream only carries weights into slots. Work on
one stream runs in the order in which it was given; nothing orders two streams but events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from finemoe.errors import ConfigError


class Event(Protocol):
    """A point in a stream's work."""

    def done(self) -> bool:
        """Whether the stream has come to this point. Never blocks."""

    def wait(self) -> None:
        """Block the calling thread until it has."""

    def since_s(self, earlier: Any) -> float:
        """Seconds from `earlier`, an event of the same device, to this one. Both must be done."""


class Device(Protocol):
    """One device with its streams. Safe to use from several threads."""

    torch_device: torch.device

    def available_bytes(self) -> int:
        """Memory that can be taken."""

    def allocate(self, size_bytes: int) -> Tensor:
        """Memory of the device: uint8 `[size_bytes]`.

        Raises:
            MemoryError: there is not that much.
        """

    def pin(self, memory: Tensor) -> None:
        """Lock host memory into place, so that copies out of it run by themselves.

        Raises:
            MemoryError: the system does not allow it.
        """

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`; nothing must be copying out of it."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy bytes from pinned host memory into the device's, on the copy stream. Returns at once."""

    def mark_copies(self) -> Event:
        """The point after all copies so far."""

    def mark_compute(self) -> Event:
        """The point after everything that the calling thread has launched so far."""

    def copies_wait(self, event: Any) -> None:
        """Later copies start after `event`, one of its own. Blocks nobody."""

    def compute_wait(self, event: Any) -> None:
        """What is launched from now on runs after `event`. Blocks nobody where the device can wait by itself."""

    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Small tensors as they are once all that was launched so far has run, in host memory. Blocks until then."""

    def upload(self, tensor: Tensor) -> Tensor:
        """A small host tensor on the device, for what is launched from now on. Returns at once."""


class CudaEvent:
    """A point in the work of a CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def since_s(self, earlier: CudaEvent) -> float:
        return float(earlier.event.elapsed_time(self.event)) / 1000


class CudaDevice:
    """A GPU.

    Args:
        index: which one.
    """

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self._copies = torch.cuda.Stream(self.torch_device)

    def available_bytes(self) -> int:
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(free_bytes) + cached

    def allocate(self, size_bytes: int) -> Tensor:
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryError(str(error).splitlines()[0]) from error

    def pin(self, memory: Tensor) -> None:
        # in place: torch's own pinned allocations are rounded up to a power of two
        runtime: Any = torch.cuda.cudart()
        portable = 1  # cudaHostRegisterPortable: for all devices
        with torch.cuda.device(self.torch_device):
            status = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), portable)
        if int(status) != 0:
            raise MemoryError(f"cudaHostRegister: {status}")

    def unpin(self, memory: Tensor) -> None:
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostUnregister(memory.data_ptr())

    def copy(self, into: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            into.copy_(source, non_blocking=True)

    def mark_copies(self) -> CudaEvent:
        return CudaEvent(self._copies)

    def mark_compute(self) -> CudaEvent:
        return CudaEvent(torch.cuda.current_stream(self.torch_device))

    def copies_wait(self, event: CudaEvent) -> None:
        self._copies.wait_event(event.event)

    def compute_wait(self, event: CudaEvent) -> None:
        torch.cuda.current_stream(self.torch_device).wait_event(event.event)

    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        # pinned buffers of this size come from torch's cache; the copies follow the kernels on the compute stream
        read = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        self.mark_compute().wait()
        return read

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)


def names_devices(device: str) -> tuple[int, ...]:
    """Indices of the CUDA devices that a `--device` names; empty for the CPU, and for `auto` where there is none.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    if device == "cpu":
        return ()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return (0,) if count else ()
    if not count:
        raise ConfigError(f"--device: {device}, but torch finds no CUDA device here; give cpu or auto")
    named = tuple(int(part.partition(":")[2] or 0) for part in device.split(","))
    if (largest := max(named)) >= count:
        raise ConfigError(f"--device: there is no cuda:{largest}; this machine has {count}, from cuda:0 on")
    return named


def open_devices(device: str) -> Sequence[Device]:
    """The devices that a `--device` names, ready for use; none for the CPU.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    named = names_devices(device)
    if not named:
        return ()

    return [CudaDevice(index) for index in named]
