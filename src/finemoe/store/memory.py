"""How much memory there is and was: what the pool may take before the machine, or its control group, runs out."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_CGROUP_FILES = (  # (limit, usage), version 2 then version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes() -> int:
    """Memory that can be taken without swapping: the machine's, or the control group's where that is less."""
    available = int(psutil.virtual_memory().available)
    for limit, usage in _CGROUP_FILES:
        try:
            room = int(Path(limit).read_text()) - int(Path(usage).read_text())
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
        available = min(available, max(0, room))
    return available


def peak_rss_bytes() -> int:
    """The most memory that this process has held at once, file mappings included."""
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
