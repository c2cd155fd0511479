"""Which devices `--device` names."""

from __future__ import annotations

from collections.abc import Sequence

from finemoe.device.base import Device
from finemoe.errors import ConfigError


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
    from finemoe.device.cuda import CudaDevice

    return [CudaDevice(index) for index in named]
