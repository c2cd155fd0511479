"""Anonymous memory in the place of the mappings that the library makes of a model's files.

The library maps a file whole, reads all of it once, and keeps it in the page cache. Instead, its call of `mmap` is
given memory of ours, in which the dense part lies, read past the page cache, and experts are pages that were never
touched. Every byte keeps its place: a tensor's address is the mapping's start plus its offset in the file.
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

Fill = Callable[[int, int, int, int], None]  # file, address of its first byte, range of its bytes that is mapped

_MMAP = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)
_MUNMAP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value
_LOADING = Lock()  # one load at a time has the library's calls


class FileMappings:
    """Takes part in one load.

    Args:
        files: the model's files, in order.
        fill: called for each stretch of a file once our memory is there; reads the dense part into it.
    """

    def __init__(self, files: Sequence[Path], fill: Fill) -> None:
        self._files = tuple(files)
        self._numbers = {_identity(path.stat()): number for number, path in enumerate(files)}
        self._fill = fill
        self._error: BaseException | None = None
        self.starts: dict[int, int] = {}  # of each file, the address that its first byte has or would have
        self._mapped: dict[int, list[tuple[int, int]]] = {}  # of each file, addresses that we have mapped
        self._unmapped: list[tuple[int, int]] = []  # of these, what the library has given back
        self.redirected = True  # False: the library's call could not be redirected, and it has read the files

    def is_mapped(self, file: int, start_bytes: int, end_bytes: int) -> bool:
        """Whether all of these bytes of a file have their place in our memory."""
        first, last = self.starts[file] + start_bytes, self.starts[file] + end_bytes
        within = any(start <= first and last <= end for start, end in self._mapped[file])
        return within and not any(start < last and first < end for start, end in self._unmapped)

    @contextmanager
    def in_place(self, library: Path) -> Iterator[None]:
        """While within, the library maps memory of ours; afterwards, at the latest, the dense part is there.

        Raises:
            BaseException: what `fill` has raised.
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
                        f"{self._files[0]}: the kernel refuses its address space ({error.strerror}); "
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
        except BaseException as error:  # noqa: BLE001 - must not pass through the library; raised once that has returned
            self._error = self._error or error
            return _FAILED
        return start

    def _on_unmap(self, address: int, length: int) -> int:
        self._unmapped.append((address, address + length))
        return unmap_as_asked(address, length)

    def _replace_later(self) -> None:
        """Lay our memory over what the library has mapped by itself."""
        for number, path in enumerate(self._files):
            if number in self.starts:
                continue
            self.redirected = False
            for each in [each for each in ranges() if each.path == str(path.resolve())]:
                start, length = each.start - each.file_offset_bytes, each.end - each.start
                map_anonymous(length, each.start)
                end = min(each.file_offset_bytes + length, path.stat().st_size)  # mappings end with a page
                self._fill(number, start, each.file_offset_bytes, end)
                self.starts[number] = start
                self._mapped.setdefault(number, []).append((each.start, each.end))


def _address(function: ctypes._CFunctionType) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
