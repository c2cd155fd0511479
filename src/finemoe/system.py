"""The process and its machine: cores, OpenMP threads, memory limits, cache folders, atomic file replacement."""

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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # parameters of glibc's mallopt
_LARGE_BYTES = 1 << 20
_MADV_DONTNEED = 4  # Linux
_OMP_PAUSE_HARD = 2
_SPIN_COUNT = 5000  # the lowest count that costs a model alone on the machine nothing (docs/results)
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)")
_CGROUPS = (  # (limit, usage, statistics), version 2 then version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def idle_cores(interval_s: float = 0.1) -> int:
    """How many of the cores that this process may use are idle, at least 1; measured for `interval_s`."""
    busy = psutil.cpu_percent(interval_s, percpu=True)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    idle = sum(100 - share for core, share in enumerate(busy) if core in own) / 100
    return max(1, min(len(own), round(idle)))


def limit_openmp_spin() -> None:
    """Have idle threads of GNU's OpenMP spin for a fraction of a millisecond, then sleep. Call before importing torch.

    By default they spin 300,000 times, for milliseconds, and keep a core from reader threads and other processes. Where
    another process has the core of one thread, the other threads spin in vain in each of a token's hundreds of parallel
    regions. The next region follows within that fraction, so nothing is lost. Variables that the user has set stay.
    """
    os.environ.update(openmp_spin_environment())


def openmp_spin_environment() -> dict[str, str]:
    """The variables that `limit_openmp_spin` sets, for a new process; empty if the user has set any of them."""
    given = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    return {} if given else {"GOMP_SPINCOUNT": str(_SPIN_COUNT)}


def end_openmp_threads() -> None:
    """End the calling thread's OpenMP worker threads (GNU's runtime); its next parallel region starts new ones.

    Once a process has more of these threads than cores, none spins for its next region (`GOMP_SPINCOUNT`): a model that
    runs on another thread than the one that loaded it would be half as fast. Without effect on other runtimes, or
    inside a parallel region.
    """
    with suppress(OSError, AttributeError, TypeError):
        for path in {path for path in _mapped_files() if Path(path).name.startswith("libgomp")}:
            ctypes.CDLL(path).omp_pause_resource_all(_OMP_PAUSE_HARD)


def available_bytes() -> int:
    """Memory that can be allocated without swapping: the machine's, or its control group's if that is less."""
    available = int(psutil.virtual_memory().available)
    for limit, usage, statistics in _CGROUPS:
        try:
            room = int(Path(limit).read_text()) - int(Path(usage).read_text()) + _cached_bytes(Path(statistics))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
        available = min(available, max(0, room))
    return available


def _cached_bytes(statistics: Path) -> int:
    """A control group's page cache: counted as used, but reclaimed when memory is needed."""
    entries = dict(line.split() for line in statistics.read_text().splitlines())
    return int(entries.get("inactive_file", 0)) + int(entries.get("active_file", 0))


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, file mappings included."""
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


def return_freed_memory() -> None:
    """Have glibc return large blocks to the kernel when they are freed. Without effect on other platforms."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def unmap_idle_code() -> int:
    """Unmap library pages that importing touched; pages still in use come back from the page cache.

    Importing torch and transformers leaves some 100 MiB of libraries mapped, of which computing uses a third. Call it
    once everything is imported and loaded. Without effect where the platform has no madvise or /proc.

    Returns:
        How many resident bytes were unmapped.
    """
    unmapped = 0
    with suppress(OSError, AttributeError, TypeError):
        madvise = ctypes.CDLL(None).madvise
        for start, end, resident_bytes in _clean_mappings():
            if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED) == 0:
                unmapped += resident_bytes
    return unmapped


def _clean_mappings() -> list[tuple[int, int, int]]:
    """Start, end and resident bytes of file mappings that are identical to their files: read-only, nothing private.

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
    """Start, end, access, inode and sizes in bytes by name, of every mapping of this process."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        head, *lines = block.splitlines()
        if (found := _MAPPING.match(head)) is None:
            continue
        fields = (line.split() for line in lines)
        sizes = {field[0].rstrip(":"): int(field[1]) << 10 for field in fields if field[-1] == "kB"}
        yield int(found[1], 16), int(found[2], 16), found[3], int(found[4]), sizes


def evict_from_page_cache(path: str | os.PathLike[str]) -> bool:
    """Ask the kernel to drop a file's pages from its cache. Returns whether this platform can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return True


def user_cache() -> Path:
    """`FINEMOE_CACHE`, else `finemoe` in `XDG_CACHE_HOME`, else `~/.cache/finemoe`. It need not exist."""
    if own := os.environ.get("FINEMOE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finemoe"


def user_maps() -> Path | None:
    """Folder of learned maps: `FINEMOE_MAPS`, else `maps` in `user_cache`; `None` if it is set to `none`."""
    own = os.environ.get("FINEMOE_MAPS")
    if own == "none":
        return None
    return Path(own).expanduser() if own else user_cache() / "maps"


def user_experts() -> Path:
    """Folder of quantized copies of experts."""
    return user_cache() / "experts"


def refuse_unwritable(flag: str, path: Path) -> None:
    """Check an output file that a user named, before the work whose result it is to hold.

    Raises:
        ConfigError: its folder is missing (it may be mistyped, so it is not created), it is a folder, or it can't be
            written.
    """
    if wrong := unwritable(path):
        raise ConfigError(f"{flag}: {wrong}")


def unwritable(path: Path) -> str | None:
    """Why a file can't be written at `path`; `None` if nothing speaks against it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"there is no folder {folder}; make it, or give another"
    if path.is_dir():
        return f"{path} is a folder; give a file in it"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{path} can't be written (no permission in {folder})"


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new one. Creates the folder.

    Raises:
        OSError: it can't be written; the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # mkstemp's mode would keep other users out
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
    """Hold an exclusive lock on a folder, between processes; creates the folder.

    Does not lock where folders can't be locked: on Windows, and on network file systems without locks.

    Raises:
        OSError: the folder can't be created.
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
