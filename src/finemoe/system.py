"""The process: its cores, and settings for one that is ours alone (the command line, a benchmark's child)."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from finemoe.errors import ConfigError

# glibc's mallopt parameters, and Linux's advice
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
_MADV_DONTNEED = 4
_LARGE_BYTES = 1 << 20
_OMP_PAUSE_HARD = 2
_SPINS = 5000  # of those tried, the fewest that cost a model nothing that is alone (docs/results)
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)")


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def idle_cores(interval_s: float = 0.1) -> int:
    """How many of the cores that this process may use are idle, at least 1; measured for `interval_s`."""
    busy = psutil.cpu_percent(interval_s, percpu=True)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    idle = sum(100 - share for core, share in enumerate(busy) if core in own) / 100
    return max(1, min(len(own), round(idle)))


def return_freed_memory() -> None:
    """Let glibc give large blocks back when they are freed. Without effect on other platforms."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def share_cores() -> None:
    """Have idle threads of GNU's OpenMP wait awake for a fraction of a millisecond, and then sleep.

    By default they spin for 300,000 turns, milliseconds on end. That keeps a core from whoever else needs it, readers
    and neighbours alike; and while a neighbour has the core of one thread, the other spins for it in vain, in every one
    of a token's hundreds of parallel regions. A region follows the last one within that fraction, so nothing is lost.
    Call it before torch is imported. What the user has set stays.
    """
    os.environ.update(brief_spins())


def brief_spins() -> dict[str, str]:
    """The environment that `share_cores` makes, for a process to be started; empty where the user has said how."""
    given = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    return {} if given else {"GOMP_SPINCOUNT": str(_SPINS)}


def release_threads() -> None:
    """End the threads that GNU's OpenMP keeps for parallel regions of the calling thread; its next one starts new ones.

    Once the process has more of them than cores, none waits awake for its next region (`GOMP_SPINCOUNT`), and a decoded
    token has hundreds of regions: a model that is run by another thread than loaded it is half as fast.
    Without effect on other runtimes, or inside a parallel region.
    """
    with suppress(OSError, AttributeError, TypeError):
        for path in {path for path in _mapped_files() if Path(path).name.startswith("libgomp")}:
            ctypes.CDLL(path).omp_pause_resource_all(_OMP_PAUSE_HARD)


def unmap_idle_code() -> int:
    """Let go of library pages that importing touched; those still in use come back from the page cache.

    Importing torch and transformers leaves some 100 MiB of libraries mapped, of which computing uses a third.
    Call it once everything is imported and loaded. Without effect where the kernel can't be asked.

    Returns:
        Bytes that were mapped until now.
    """
    unmapped = 0
    with suppress(OSError, AttributeError, TypeError):
        madvise = ctypes.CDLL(None).madvise
        for start, end, resident_bytes in _clean_mappings():
            if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED) == 0:
                unmapped += resident_bytes
    return unmapped


def _clean_mappings() -> list[tuple[int, int, int]]:
    """Start, end and resident bytes of what is mapped from files and identical to them: not writable, nothing private.

    A page that was changed since it was mapped (a relocation) is anonymous, and would be lost: such mappings stay.
    """
    return [
        (start, end, sizes["Rss"])
        for start, end, access, inode, sizes in _mappings()
        if inode and "w" not in access and not sizes["Anonymous"] and sizes["Rss"]
    ]


def _mapped_files() -> Iterator[str]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if len(fields := line.split(maxsplit=5)) == 6:
            yield fields[5]


def _mappings() -> Iterator[tuple[int, int, str, int, dict[str, int]]]:
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        head, *lines = block.splitlines()
        if (found := _MAPPING.match(head)) is None:
            continue
        fields = (line.split() for line in lines)
        sizes = {field[0].rstrip(":"): int(field[1]) << 10 for field in fields if field[-1] == "kB"}
        yield int(found[1], 16), int(found[2], 16), found[3], int(found[4]), sizes


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def user_cache() -> Path:
    """`FINEMOE_CACHE`, else `finemoe` in `XDG_CACHE_HOME`, else `~/.cache/finemoe`. It need not exist."""
    if own := os.environ.get("FINEMOE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finemoe"


def user_maps() -> Path | None:
    """Where policies that learn keep their maps: `FINEMOE_MAPS`, else `maps` in `user_cache`; `None` for `none`."""
    own = os.environ.get("FINEMOE_MAPS")
    if own == "none":
        return None
    return Path(own).expanduser() if own else user_cache() / "maps"


def user_experts() -> Path:
    """Where quantized copies of experts are kept."""
    return user_cache() / "experts"


def refuse_unwritable(flag: str, path: Path) -> None:
    """Ahead of the work whose result is to be written to a file that a user named.

    Raises:
        ConfigError: its folder is missing (a mistyped one is not made), it is a folder, or can't be written.
    """
    if wrong := unwritable(path):
        raise ConfigError(f"{flag}: {wrong}")


def unwritable(path: Path) -> str | None:
    """Why a file can't be written there; `None` if it seems that it can."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"there is no folder {folder}; make it, or give another"
    if path.is_dir():
        return f"{path} is a folder; give a file in it"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{path} can't be written (no permission in {folder})"


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the older one or this one, never a part; makes its folder.

    Raises:
        OSError: it can't be written; an older file is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not mkstemp's: others may read what they could
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Processes that enter this for the same folder wait for each other; makes the folder.

    Where a folder can't be locked, they do not: network file systems without locks, Windows.

    Raises:
        OSError: it can't be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


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
