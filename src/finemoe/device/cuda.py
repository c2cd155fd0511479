"""A CUDA device: a copy stream beside the stream that the model computes on, and CUDA events between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
