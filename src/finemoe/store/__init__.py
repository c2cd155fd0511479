"""Expert storage: disk reads, RAM slots, reader threads, quantized copies. Executes plans, decides nothing."""

from finemoe.store.direct_io import DiskStore
from finemoe.store.slot_pool import RamSlotPool, SlotPool
from finemoe.system import available_bytes, peak_rss_bytes

__all__ = ["DiskStore", "RamSlotPool", "SlotPool", "available_bytes", "peak_rss_bytes"]
