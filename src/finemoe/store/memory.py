"""How much memory there is and was: what the pool may take before the machine, or its control group, runs out."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import psutil

_CGROUPS = (  # (limit, usage, statistics), version 2 then version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def available_bytes() -> int:
    """Memory that can be taken without swapping: the machine's, or the control group's where that is less."""
    available = int(psutil.virtual_memory().available)
    for limit, usage, statistics in _CGROUPS:
        try:
            room = int(Path(limit).read_text()) - int(Path(usage).read_text()) + _cached_bytes(Path(statistics))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
        available = min(available, max(0, room))
    return available


def _cached_bytes(statistics: Path) -> int:
    """A control group's page cache: counted as used, but given up when memory is asked for."""
    entries = dict(line.split() for line in statistics.read_text().splitlines())
    return int(entries.get("inactive_file", 0)) + int(entries.get("active_file", 0))


def peak_rss_bytes() -> int:
    """The most memory that this process has held at once, file mappings included."""
    with suppress(OSError):  # Linux; its getrusage would report a larger parent's peak
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
