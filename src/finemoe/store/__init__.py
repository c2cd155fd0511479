"""The tiers: the disk, host memory, and the device slots. They hold bytes and count bytes; they decide nothing."""

from finemoe.store.device_pool import Arrival, DevicePool, DeviceSlot
from finemoe.store.disk import DiskStore
from finemoe.store.host import HostTier
from finemoe.store.memory import available_bytes, peak_rss_bytes
from finemoe.store.pool import Pool, Slots

__all__ = [
    "Arrival", "DevicePool", "DeviceSlot", "DiskStore", "HostTier", "Pool", "Slots", "available_bytes",
    "peak_rss_bytes",
]  # fmt: skip
