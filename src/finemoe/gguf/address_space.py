"""Memory mappings of this process: map, bind, unmap and protect at chosen addresses; list mappings. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE_BYTES = mmap.PAGESIZE
READ, WRITE, EXECUTE = 1, 2, 4
NO_ACCESS = 0
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE, _POPULATE = 0x01, 0x02, 0x10, 0x20, 0x4000, 0x8000
_FAILED = ctypes.c_void_p(-1).value


def _declare() -> Any:
    """The C library with declared signatures. Its calls release the GIL."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


_libc = _declare()


class Range(NamedTuple):
    """A mapping of this process. `allowed` is its protection, such as `r-x`; `path` is empty for anonymous memory."""

    start: int
    end: int
    allowed: str
    file_offset_bytes: int
    path: str


def ranges() -> Iterator[Range]:
    """All mappings of this process, by ascending address."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        place, allowed, offset, _, _, *path = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in place.split("-"))
        yield Range(start, end, allowed[:3], int(offset, 16), path[0] if path else "")


def map_anonymous(length_bytes: int, at: int | None = None, protection: int = READ | WRITE) -> int:
    """Map zeroed private memory, with no page allocated yet, and return its address. `at` replaces existing mappings.

    Raises:
        OSError: the mapping failed, for example because the process has too many.
    """
    flags = _PRIVATE | _ANONYMOUS | _NORESERVE | (0 if at is None else _FIXED)
    return _map(at, length_bytes, protection, flags, -1, 0)


def bind(address: int, length_bytes: int, descriptor: int, offset_bytes: int) -> None:
    """Map pages of a file read-only at an address. Replaces existing mappings.

    Raises:
        OSError: the mapping failed, for example because the process has too many.
    """
    _map(address, length_bytes, READ, _SHARED | _FIXED | _POPULATE, descriptor, offset_bytes)


def map_as_asked(
    address: int | None, length_bytes: int, protection: int, flags: int, descriptor: int, offset_bytes: int
) -> int:
    """Call the C library's `mmap` with unchanged arguments.

    Raises:
        OSError: the mapping failed.
    """
    return _map(address, length_bytes, protection, flags, descriptor, offset_bytes)


def unmap_as_asked(address: int, length_bytes: int) -> int:
    """Call the C library's `munmap` with unchanged arguments. Returns 0 on success."""
    result: int = _libc.munmap(address, length_bytes)
    return result


def protect(address: int, length_bytes: int, protection: int) -> None:
    """Set the protection of whole pages (`READ | WRITE | EXECUTE`, or `NO_ACCESS`).

    Raises:
        OSError: the protection can't be changed.
    """
    if _libc.mprotect(address, length_bytes, protection):
        raise _error()


def view(address: int, length_bytes: int) -> memoryview:
    """A zero-copy view of the bytes at an address. They must stay mapped while the view is used."""
    return memoryview((ctypes.c_ubyte * length_bytes).from_address(address)).cast("B")


def _map(address: int | None, length_bytes: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    got: int | None = _libc.mmap(address, length_bytes, protection, flags, descriptor, offset)
    if got is None or got == _FAILED:
        raise _error()
    return got


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
