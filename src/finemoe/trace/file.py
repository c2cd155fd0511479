"""A trace as one safetensors file: its head, read and checked, or made.

The format is safetensors' own (8 bytes of length, a JSON table, the tensors without gaps), so any tool reads it; it is
parsed here because tensors are mapped, not loaded, and so that a damaged file is named in one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finemoe.errors import TraceError
from finemoe.trace.columns import Column, columns
from finemoe.trace.header import TraceHeader
from finemoe.trace.spool import left_behind, spool_folder

FORMAT, VERSION = "finemoe-trace", 1
_LIMIT_BYTES = 100_000_000  # safetensors' own limit for a head
_NAMES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64, "F16": np.float16}
_DTYPES = {np.dtype(kind): name for name, kind in _NAMES.items()}


class Head(NamedTuple):
    """What stands before the tensors, and where they are."""

    header: TraceHeader
    counts: dict[str, int]  # of each table: request, iteration, token
    offsets_bytes: dict[str, int]  # of each column, from the start of the file
    stamp: str  # changes with every append


def encode_head(header: TraceHeader, counts: Mapping[str, int], stamp: str) -> bytes:
    """The bytes that stand before the columns, which follow in the order of `columns(header)`."""
    metadata = {"format": FORMAT, "version": str(VERSION), "stamp": stamp, "header": json.dumps(header.as_dict())}
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for column in columns(header):
        begin, end = end, end + counts[column.table] * column.row_bytes
        shape = [counts[column.table], *column.shape]
        table[column.name] = {"dtype": _DTYPES[column.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LIMIT_BYTES:
        raise TraceError(f"a trace's head may take {_LIMIT_BYTES} bytes, this one takes {len(text)}")
    return len(text).to_bytes(8, "little") + text


def read_head(path: Path) -> Head:
    """The head of a trace, checked against itself and the file's size.

    Raises:
        TraceError: no such file, not a trace, of a newer version, cut off or damaged.
    """
    table, start, size_bytes = _parse(path)
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise TraceError(f"{path}: a safetensors file, but not a finemoe trace; make one with finemoe record or import")
    version = metadata.get("version", "")
    if not version.isdecimal():
        raise TraceError(f"{path}: damaged: its version is {version!r}")
    if int(version) > VERSION:
        raise TraceError(f"{path}: written in version {version} of the format, this finemoe reads {VERSION}; update it")
    try:
        header = TraceHeader.from_dict(json.loads(metadata["header"]))
        wanted = columns(header)
        counts = {column.table: table[column.name]["shape"][0] for column in wanted}
        offsets = {column.name: start + _checked(column, counts, table[column.name]) for column in wanted}
        end = start + max(entry["data_offsets"][1] for entry in table.values())
    except (TraceError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise TraceError(f"{path}: its header is damaged ({_reason(error)})") from error
    if end != size_bytes:
        cut = "cut off" if end > size_bytes else "damaged"
        raise TraceError(f"{path}: {cut}: its header promises {end} bytes, the file has {size_bytes}")
    return Head(header, counts, offsets, str(metadata.get("stamp", "")))


def _parse(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON table, where the tensors start, and the file's size."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= _LIMIT_BYTES:
                raise TraceError(f"{path}: not a finemoe trace; for other formats there is finemoe trace import")
            if length > size_bytes - 8:
                raise TraceError(f"{path}: not a finemoe trace, or cut off in its header")
            raw = file.read(length)
    except FileNotFoundError as error:
        waiting = left_behind(path)
        hint = (
            f", but {waiting} finished requests of a recording that was killed, or still runs, wait in "
            f"{spool_folder(path)}; finemoe record --append --out {path} takes them up"
        )
        raise TraceError(f"{path}: there is no such trace{hint if waiting else ''}") from error
    except OSError as error:
        raise TraceError(f"{path}: can't be read ({error.strerror or error})") from error
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: not a finemoe trace, or its header is damaged") from error
    if not isinstance(table, dict):
        raise TraceError(f"{path}: not a finemoe trace")
    return table, 8 + length, size_bytes


def _checked(column: Column, counts: dict[str, int], entry: dict[str, Any]) -> int:
    """Where a column's bytes begin, if its entry is what the header says."""
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{column.name} has offsets or a shape that can't be")
    if shape != (counts[column.table], *column.shape) or entry["dtype"] != _DTYPES[column.dtype]:
        raise ValueError(f"{column.name} is {entry['dtype']} {list(shape)}")
    if end - begin != shape[0] * column.row_bytes:
        raise ValueError(f"{column.name} has {end - begin} bytes for its shape {list(shape)}")
    return int(begin)


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
