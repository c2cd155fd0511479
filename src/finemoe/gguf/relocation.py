"""Temporarily redirects function calls of one shared object by overwriting its relocation entries in memory.

The entries are located through the dynamic section of the ELF file (64 bit, little-endian). Other shared objects are
not affected, and the entries are restored afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from finemoe.gguf.address_space import EXECUTE, PAGE_BYTES, READ, WRITE, protect, ranges

_LOAD, _DYNAMIC = 1, 2  # program headers
_STRTAB, _SYMTAB, _RELA, _RELA_SIZE, _PLT_SIZE, _JMPREL = 5, 6, 7, 8, 2, 23  # entries of the dynamic section
_TABLES = ((_RELA, _RELA_SIZE), (_JMPREL, _PLT_SIZE))  # relocation tables: tags of address and size
_CALLS = {62: (6, 7), 183: (1025, 1026)}  # machine -> its relocation types of function addresses (GLOB_DAT, JUMP_SLOT)


class RelocationError(Exception):
    """Relocation entries can't be found or written."""


def find_entries(path: Path, name: str) -> list[int]:
    """Find the relocation entries of an imported function, as offsets from the shared object's load address.

    Raises:
        RelocationError: the file is not a supported ELF file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        try:
            return _find(image, name.encode())
        except (struct.error, KeyError, LookupError, ValueError) as error:
            raise RelocationError(f"{path}: is not a readable shared object ({error!r})") from error


def _find(image: mmap.mmap, name: bytes) -> list[int]:
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not ELF64")
    (machine,) = struct.unpack_from("<H", image, 18)
    (headers,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    segments: list[tuple[int, int, int]] = []
    dynamic = (0, 0)
    for number in range(count):
        kind, _, offset, address, _, length, _, _ = struct.unpack_from("<IIQQQQQQ", image, headers + number * size)
        if kind == _LOAD:
            segments.append((address, offset, length))
        elif kind == _DYNAMIC:
            dynamic = (offset, length)

    def at(address: int) -> int:
        return next(address - start + offset for start, offset, length in segments if start <= address < start + length)

    tags = dict(struct.iter_unpack("<qQ", image[dynamic[0] : dynamic[0] + dynamic[1]]))
    symbols, strings = at(tags[_SYMTAB]), at(tags[_STRTAB])
    tables = [(at(tags[table]), tags[size]) for table, size in _TABLES if tags.get(table)]
    relocations = [each for at, size in tables for each in struct.iter_unpack("<QQq", image[at : at + size])]
    entries = []
    for offset, info, _ in relocations:
        if info & 0xFFFFFFFF in _CALLS[machine]:
            (string,) = struct.unpack_from("<I", image, symbols + 24 * (info >> 32))
            if image[strings + string : strings + string + len(name) + 1] == name + b"\0":
                entries.append(offset)
    return entries


@contextmanager
def replaced(path: Path, functions: Mapping[str, int]) -> Iterator[None]:
    """Redirect a loaded shared object's calls of these functions to other addresses, inside the context.

    Args:
        path: the shared object.
        functions: replacement addresses by function name.

    Raises:
        RelocationError: a function has no relocation entry, or the entry can't be written.
    """
    mapped = [each for each in ranges() if each.path == str(path.resolve())]
    if not mapped:
        raise RelocationError(f"{path}: is not loaded")
    base = mapped[0].start - mapped[0].file_offset_bytes
    wanted = {base + offset: address for name, address in functions.items() for offset in _entries(path, name)}
    allowed = {entry: _allowed(entry) for entry in wanted}
    before: dict[int, int] = {}
    try:
        for entry, address in wanted.items():
            _protect(entry, allowed[entry] | WRITE)
            before[entry] = _word(entry).value
            _word(entry).value = address
        yield
    finally:
        for entry, address in before.items():
            _protect(entry, allowed[entry] | WRITE)  # its page may be read-only again: entries share pages
            _word(entry).value = address
            _protect(entry, allowed[entry])


def _entries(path: Path, name: str) -> list[int]:
    found = find_entries(path, name)
    if not found:
        raise RelocationError(f"{path}: does not call {name}")
    return found


def _word(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(address)


def _allowed(address: int) -> int:
    letters = next(each.allowed for each in ranges() if each.start <= address < each.end)
    return sum(bit for bit, letter in ((READ, "r"), (WRITE, "w"), (EXECUTE, "x")) if letter in letters)


def _protect(address: int, allowed: int) -> None:
    try:
        protect(address // PAGE_BYTES * PAGE_BYTES, PAGE_BYTES, allowed)
    except OSError as error:
        raise RelocationError(f"relocation entries can't be written ({error.strerror})") from error
