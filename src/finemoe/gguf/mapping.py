"""Replaces the library's file mappings with anonymous memory.

The library maps the whole file, reads all of it once, and so fills the page cache. Instead, its `mmap` call returns
anonymous memory. The dense part is read into it without the page cache; pages of experts stay untouched. The layout is
that of the file: a tensor's address is the mapping's start plus its offset in the file.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

from finemoe.errors import ConfigError, FinemoeError
from finemoe.gguf.address_space import map_anonymous, map_as_asked, ranges, unmap_as_asked
from finemoe.gguf.relocation import RelocationError, replaced

Fill = Callable[[int, int, int, int], None]  # file, address of its offset 0, start and end of the mapped range

_MMAP = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)
_MUNMAP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value
_LOADING = Lock()  # one load at a time redirects the library's calls


class FileMappings:
    """The file mappings of one load.

    Args:
        files: the model's files, in order.
        fill: reads the dense part of a file range; called once the range has anonymous memory.
    """

    def __init__(self, files: Sequence[Path], fill: Fill) -> None:
        self._files = tuple(files)
        self._numbers = {_identity(path.stat()): number for number, path in enumerate(files)}
        self._fill = fill
        self._error: BaseException | None = None
        self.starts: dict[int, int] = {}  # by file, the address that corresponds to offset 0
        self._mapped: dict[int, list[tuple[int, int]]] = {}  # by file, address ranges with our memory
        self._unmapped: list[tuple[int, int]] = []  # address ranges that the library has unmapped
        self.redirected = True  # False: redirecting failed, so the library has read the files

    def is_mapped(self, file: int, start_bytes: int, end_bytes: int) -> bool:
        """Whether the file range `[start_bytes, end_bytes)` is completely in our memory."""
        first, last = self.starts[file] + start_bytes, self.starts[file] + end_bytes
        within = any(start <= first and last <= end for start, end in self._mapped[file])
        return within and not any(start < last and first < end for start, end in self._unmapped)

    @contextmanager
    def in_place(self, library: Path) -> Iterator[None]:
        """Give the library anonymous memory instead of file mappings. On exit the dense part has been read.

        Raises:
            BaseException: any error of `fill`.
        """
        calls = {"mmap": _MMAP(self._on_map), "munmap": _MUNMAP(self._on_unmap)}
        with _LOADING, ExitStack() as hooks:
            try:
                hooks.enter_context(replaced(library, {name: _address(call) for name, call in calls.items()}))
            except RelocationError:
                self.redirected = False
            try:
                yield
            finally:
                error, self._error = self._error, None
                if isinstance(error, OSError) and not isinstance(error, FinemoeError):
                    raise ConfigError(
                        f"{self._files[0]}: its address space can't be reserved ({error.strerror}); "
                        "is vm.overcommit_memory 2, or ulimit -v set?"
                    ) from error
                if error is not None:
                    raise error
        self._replace_later()

    def _on_map(
        self, address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int
    ) -> int | None:
        try:
            number = None if descriptor < 0 or offset else self._numbers.get(_identity(os.fstat(descriptor)))
            if number is None or number in self.starts:
                return map_as_asked(address, length, protection, flags, descriptor, offset)
            start = map_anonymous(length)
            self._fill(number, start, 0, length)
            self.starts[number], self._mapped[number] = start, [(start, start + length)]
        except BaseException as error:  # noqa: BLE001 - must not cross C code; raised after the load
            self._error = self._error or error
            return _FAILED
        return start

    def _on_unmap(self, address: int, length: int) -> int:
        self._unmapped.append((address, address + length))
        return unmap_as_asked(address, length)

    def _replace_later(self) -> None:
        """Replace mappings that the library made without redirection."""
        for number, path in enumerate(self._files):
            if number in self.starts:
                continue
            self.redirected = False
            for each in [each for each in ranges() if each.path == str(path.resolve())]:
                start, length = each.start - each.file_offset_bytes, each.end - each.start
                map_anonymous(length, each.start)
                end = min(each.file_offset_bytes + length, path.stat().st_size)  # mappings extend to a page boundary
                self._fill(number, start, each.file_offset_bytes, end)
                self.starts[number] = start
                self._mapped.setdefault(number, []).append((each.start, each.end))


def _address(function: ctypes._CFunctionType) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
