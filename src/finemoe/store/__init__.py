"""The tiers: the disk, and the device slots. They hold bytes and count bytes; they decide nothing."""

from finemoe.store.disk import DiskStore
from finemoe.store.memory import available_bytes, peak_rss_bytes
from finemoe.store.pool import Pool

__all__ = ["DiskStore", "Pool", "available_bytes", "peak_rss_bytes"]
