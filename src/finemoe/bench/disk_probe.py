"""The physical ceiling: bandwidth of the disk under a checkpoint, measured without the engine; page-cache helpers."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096
CHUNK_BYTES = 1 << 20
THREADS = 4


@dataclass(frozen=True)
class DiskProbe:
    """Bandwidth of random reads by `THREADS` threads, past the page cache if `direct`."""

    bandwidth_bytes_s: float
    direct: bool
    read_bytes: int = 0


def probe(files: Sequence[Path], total_bytes: int, seed: int, run_bytes: int = CHUNK_BYTES) -> DiskProbe:
    """Measures reads of about `total_bytes` at random offsets of `files`.

    Args:
        run_bytes: bytes read contiguously, in chunks of `CHUNK_BYTES`, by all threads together. At an expert's size,
            the bandwidth is that available to an engine on demand loads.

    Raises:
        OSError: a file can't be opened or read.
    """
    sizes = [file.stat().st_size for file in files]
    random_source = random.Random(seed)  # noqa: S311 - not for security
    offsets: list[tuple[int, int]] = []
    run = max(1, -(-run_bytes // CHUNK_BYTES))  # in chunks
    while len(offsets) < max(THREADS, total_bytes // CHUNK_BYTES):
        file = random_source.choices(range(len(files)), weights=sizes)[0]
        last_page = max(0, sizes[file] - run * CHUNK_BYTES) // PAGE_BYTES
        first = random_source.randint(0, last_page) * PAGE_BYTES
        inside = max(1, min(run, -(-sizes[file] // CHUNK_BYTES)))
        offsets += [(file, first + chunk * CHUNK_BYTES) for chunk in range(inside)]
    descriptors, direct = _open(files)
    try:
        start_s = time.perf_counter()
        read_bytes = _read_all(descriptors, iter(offsets))
        return DiskProbe(read_bytes / (time.perf_counter() - start_s), direct, read_bytes)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def evict(files: Sequence[Path]) -> None:
    """Asks the kernel to drop the files' pages, dirty ones included, from the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the kernel does not drop dirty pages
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_share(files: Sequence[Path]) -> float | None:
    """Share of the pages of `files` that are in the page cache; `None` on systems without `mincore`."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    cached = pages = 0
    for file in files:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            flags = np.zeros(-(-len(mapped) // PAGE_BYTES), dtype=np.uint8)
            view = np.frombuffer(mapped, dtype=np.uint8)
            address, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
            failed = libc.mincore(address, size, ctypes.c_void_p(flags.ctypes.data))
            del view  # a mapping with a view can't be closed
            if failed:
                return None
            cached += int((flags & 1).sum())
            pages += len(flags)
    return cached / pages


def _open(files: Sequence[Path]) -> tuple[list[int], bool]:
    """Descriptors of `files`, and whether they read directly; all do or none does."""
    descriptors: list[int] = []
    try:
        for file in files:
            descriptors.append(os.open(file, os.O_RDONLY | os.O_DIRECT))
            os.preadv(descriptors[-1], [mmap.mmap(-1, PAGE_BYTES)], 0)
    except (AttributeError, OSError):
        for descriptor in descriptors:
            os.close(descriptor)
        evict(files)
        return [os.open(file, os.O_RDONLY) for file in files], False
    return descriptors, True


def _read_all(descriptors: Sequence[int], offsets: Iterator[tuple[int, int]]) -> int:
    """Reads a chunk at every place; returns the number of bytes read."""
    lock = threading.Lock()
    counts = [0] * THREADS
    errors: list[OSError] = []

    def run(reader: int) -> None:
        buffer = mmap.mmap(-1, CHUNK_BYTES)
        while not errors:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            try:
                counts[reader] += os.preadv(descriptors[offset[0]], [buffer], offset[1])
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=run, args=(reader,)) for reader in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts)
