"""Devices as the rest of `gpu` sees them: memory, a compute stream, a copy stream, and events that order the two.

The model's kernels run on the compute stream; the copy stream only copies weights into slots. Work on one stream runs
in the order of submission; only events order work on different streams.
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
        """Whether the stream has reached this point. Never blocks."""

    def wait(self) -> None:
        """Block the calling thread until the stream has reached this point."""

    def since_s(self, earlier: Any) -> float:
        """Seconds from `earlier`, an event of the same device, to this one. Both must be done."""


class Device(Protocol):
    """One device with its two streams. Thread-safe."""

    torch_device: torch.device

    def available_bytes(self) -> int:
        """Memory that can be allocated."""

    def allocate(self, size_bytes: int) -> Tensor:
        """Device memory: uint8 `[size_bytes]`.

        Raises:
            MemoryError: there is not that much.
        """

    def pin(self, memory: Tensor) -> None:
        """Page-lock host memory, so that copies from it are asynchronous.

        Raises:
            MemoryError: the system does not allow it.
        """

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`. No copy from the memory may be in progress."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy bytes from pinned host memory to the device, on the copy stream. Returns at once."""

    def record_copies(self) -> Event:
        """An event after all copies submitted so far."""

    def record_compute(self) -> Event:
        """An event after all kernels that the calling thread has launched so far."""

    def copies_wait(self, event: Any) -> None:
        """Copies submitted from now on start after `event`, one of this device. Does not block."""

    def compute_wait(self, event: Any) -> None:
        """Kernels launched from now on run after `event`. Does not block, except on `CpuDevice`."""

    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy small tensors to host memory. Blocks until all kernels launched so far have run."""

    def upload(self, tensor: Tensor) -> Tensor:
        """Copy a small host tensor to the device, before the kernels launched from now on. Returns at once."""


def open_devices(device: str) -> Sequence[Device]:
    """The devices that a `--device` names; none for the CPU.

    Raises:
        ConfigError: this machine does not have such a device.
    """
    return tuple(CudaDevice(index) for index in cuda_indices(device))


def cuda_indices(device: str) -> tuple[int, ...]:
    """Indices of the CUDA devices that a `--device` names; none for the CPU, and for `auto` without CUDA.

    Raises:
        ConfigError: this machine does not have such a device.
    """
    if device == "cpu":
        return ()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return (0,) if count else ()
    if not count:
        raise ConfigError(f"--device: {device}, but torch finds no CUDA device here; give cpu or auto")
    indices = tuple(int(part.partition(":")[2] or 0) for part in device.split(","))
    if (largest := max(indices)) >= count:
        raise ConfigError(f"--device: there is no cuda:{largest}; this machine has {count}, from cuda:0 on")
    return indices


class CudaEvent:
    """An event on a CUDA stream."""

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
    """A CUDA GPU.

    Args:
        index: as in `cuda:index`.
    """

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self._copy_stream = torch.cuda.Stream(self.torch_device)

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
        # existing memory is registered, as torch rounds its own pinned allocations up to a power of two
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
        with torch.cuda.stream(self._copy_stream):
            into.copy_(source, non_blocking=True)

    def record_copies(self) -> CudaEvent:
        return CudaEvent(self._copy_stream)

    def record_compute(self) -> CudaEvent:
        return CudaEvent(torch.cuda.current_stream(self.torch_device))

    def copies_wait(self, event: CudaEvent) -> None:
        self._copy_stream.wait_event(event.event)

    def compute_wait(self, event: CudaEvent) -> None:
        torch.cuda.current_stream(self.torch_device).wait_event(event.event)

    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        # torch caches small pinned buffers; the copies follow the kernels on the compute stream
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        self.record_compute().wait()
        return copies

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)
