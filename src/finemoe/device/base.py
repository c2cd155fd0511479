"""What the data path asks of a device: memory, two streams, and events that order them.

The compute stream is the one that the model's kernels go to. The copy stream only carries weights into slots. Work on
one stream runs in the order in which it was given; nothing orders two streams but events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


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
