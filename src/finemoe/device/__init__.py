"""Devices: what the way from host memory to a GPU asks of one, and the kinds that there are."""

from finemoe.device.base import Device, Event
from finemoe.device.choose import names_devices, open_devices
from finemoe.device.cpu import CpuDevice

__all__ = ["CpuDevice", "Device", "Event", "names_devices", "open_devices"]
