"""Reads byte ranges of checkpoint files with direct I/O, or through the page cache where that is not possible.

Direct I/O moves complete pages between the disk and page-aligned memory, but experts start anywhere in a file. If the
target has the same offset within a page as the file (slots are laid out that way), all complete pages are read directly
into place; the partial pages at both ends are read in the same call into a buffer of the thread, and copied from there.
If not, everything is read into that buffer and copied, which costs the CPU more than the read (docs/results).
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finemoe.checkpoint import ExpertIndex
from finemoe.checkpoint.expert_index import PAGE_BYTES, round_up
from finemoe.types import ByteRange, ExpertId

CHUNK_BYTES = 2 << 20  # the largest single read


class _Buffers(threading.local):
    """A page-aligned buffer for each thread, made on first use."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, CHUNK_BYTES + 2 * PAGE_BYTES)
        self.array = np.frombuffer(self.memory, dtype=np.uint8)


class DiskStore:
    """An `ExpertSource` over a checkpoint's files. Safe to read from several threads.

    Args:
        files: the checkpoint's files, in the order of the index's file numbers.
        expert_index: the byte ranges of each expert.
        io: `direct` bypasses the page cache; `buffered` reads through it and asks the kernel to drop the pages read;
            `auto` is `direct` if all files support it.

    Raises:
        OSError: a file can't be opened, or `io` is `direct` and the file system has no direct I/O.
    """

    def __init__(
        self, files: Sequence[Path], expert_index: ExpertIndex, io: Literal["auto", "direct", "buffered"] = "auto"
    ) -> None:
        self._files = tuple(files)
        self._expert_index = expert_index
        self._buffers = _Buffers()
        self._descriptors: list[int] = []
        self.io: Literal["direct", "buffered"] = "buffered"
        if io != "buffered":
            try:
                self._open_direct()
                self.io = "direct"
            except OSError as error:
                self.close()
                if io == "direct" or error.errno != errno.EINVAL:
                    raise
        if self.io == "buffered":
            self._open(0)
            if not hasattr(os, "posix_fadvise"):
                warnings.warn(
                    "this platform can't be asked to drop read pages: its page cache may hold a second copy of the "
                    "experts, outside the expert memory budget",
                    stacklevel=2,
                )

    def byte_ranges(self, expert: ExpertId) -> Sequence[ByteRange]:
        """The byte ranges that make up `expert`. Does no I/O."""
        return self._expert_index.byte_ranges(expert)

    def read(self, byte_range: ByteRange, start_bytes: int, into: memoryview) -> None:
        """Fill `into` (at most `CHUNK_BYTES`) with the bytes of `byte_range` from `start_bytes` on.

        Raises:
            OSError: the read failed or came up short; the message names the file.
        """
        offset_bytes = byte_range.file_offset_bytes + start_bytes
        try:
            if self.io == "direct":
                self._read_direct(byte_range.file, offset_bytes, into)
            else:
                self._read_buffered(byte_range.file, offset_bytes, into)
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, self.name(byte_range.file)) from error

    def name(self, file: int) -> str:
        """Path of the file with this number."""
        return str(self._files[file])

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors:
            with suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()

    def _open(self, flags: int) -> None:
        flags |= os.O_RDONLY | getattr(os, "O_BINARY", 0)
        try:
            for file in self._files:
                self._descriptors.append(os.open(file, flags))
        except OSError:
            self.close()
            raise

    def _open_direct(self) -> None:
        """Open all files and read a page of each: some file systems accept the flag but refuse the read."""
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.EINVAL, "this platform has no direct I/O", str(self._files[0]))
        self._open(os.O_DIRECT)
        for descriptor in self._descriptors:
            os.preadv(descriptor, [memoryview(self._buffers.memory)[:PAGE_BYTES]], 0)

    def _read_direct(self, file: int, offset_bytes: int, into: memoryview) -> None:
        target = np.frombuffer(into, dtype=np.uint8)
        if (target.ctypes.data - offset_bytes) % PAGE_BYTES or not self._read_in_place(file, offset_bytes, into):
            self._read_and_copy(file, offset_bytes, into, target)

    def _read_in_place(self, file: int, offset_bytes: int, into: memoryview) -> bool:
        """Read complete pages directly into place. Returns False if there is none, or the read came up short."""
        before = -offset_bytes % PAGE_BYTES  # bytes before the first complete page, and after the last
        after = (offset_bytes + len(into)) % PAGE_BYTES
        pages = into[before : len(into) - after]
        if len(pages) < PAGE_BYTES or before + after >= len(into):
            return False
        ends = memoryview(self._buffers.memory)
        first, last = ends[:PAGE_BYTES], ends[PAGE_BYTES : 2 * PAGE_BYTES]
        parts = [*([first] if before else []), pages, *([last] if after else [])]
        got = os.preadv(self._descriptors[file], parts, offset_bytes - (PAGE_BYTES - before if before else 0))
        if got < (PAGE_BYTES if before else 0) + len(pages) + after:  # interrupted; or the file is too short
            return False
        if before:
            into[:before] = first[PAGE_BYTES - before :]
        if after:
            into[len(into) - after :] = last[:after]
        return True

    def _read_and_copy(self, file: int, offset_bytes: int, into: memoryview, target: NDArray[np.uint8]) -> None:
        """Read the pages that contain the range into the thread's buffer, and copy the range from there."""
        first = offset_bytes // PAGE_BYTES * PAGE_BYTES
        head = offset_bytes - first
        end = head + len(into)
        window = memoryview(self._buffers.memory)[: round_up(end, PAGE_BYTES)]
        done = 0
        while done < end:  # the last page of a file may be partial
            got = os.preadv(self._descriptors[file], [window[done:]], first + done)
            if got == 0 or (done + got < end and got % PAGE_BYTES):
                raise self._short(file, offset_bytes, len(into))
            done += got
        # numpy's copy releases the GIL; a memoryview's does not
        np.copyto(target, self._buffers.array[head:end])

    def _read_buffered(self, file: int, offset_bytes: int, into: memoryview) -> None:
        descriptor = self._descriptors[file]
        done = 0
        while done < len(into):
            got = _pread(descriptor, into[done:], offset_bytes + done)
            if got == 0:
                raise self._short(file, offset_bytes, len(into))
            done += got
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset_bytes, len(into), os.POSIX_FADV_DONTNEED)

    def _short(self, file: int, offset_bytes: int, length_bytes: int) -> OSError:
        return OSError(
            errno.EIO, f"file ends before byte {offset_bytes + length_bytes}; was it changed?", str(self._files[file])
        )


_seek_lock = threading.Lock()


def _pread(descriptor: int, into: memoryview, offset_bytes: int) -> int:
    """Read at an offset; returns how many bytes were read."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], offset_bytes)
    with _seek_lock:  # this platform has no positioned reads
        os.lseek(descriptor, offset_bytes, os.SEEK_SET)
        data = os.read(descriptor, len(into))
    into[: len(data)] = data
    return len(data)
