"""Reads a trace through a memory map: columns are views of the file, which may be larger than memory.

A trace is a safetensors file; its head (see `encode_head`) holds the `TraceHeader` as metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import TraceError
from finemoe.trace.format import Column, RequestTrace, TraceHeader, columns, fault
from finemoe.trace.spool import pending_requests, spool_folder
from finemoe.types import PREFILL

FORMAT, VERSION = "finemoe-trace", 1
_MAX_HEAD_BYTES = 100_000_000  # safetensors' own limit
_NAMES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64, "F16": np.float16}
_DTYPES = {np.dtype(kind): name for name, kind in _NAMES.items()}
_LAZILY_CHECKED = ("probs", "lookahead")  # large columns, checked on first access: many replays need neither


class Trace:
    """An open trace: a sequence of requests, and the columns that hold them one after the other.

    Views stay valid after `close`; the file is unmapped with the last of them. An append replaces the file, so an
    open trace never changes.

    Raises:
        TraceError: see `open_trace`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        head = read_head(self.path)
        self.header: TraceHeader = head.header
        self.requests = head.counts["request"]
        self.iterations = head.counts["iteration"]
        self.tokens = head.counts["token"]
        self.stamp = head.stamp
        raw: NDArray[np.uint8] = np.memmap(self.path, np.uint8, "r").view(np.ndarray)
        self.size_bytes = len(raw)
        self._columns: dict[str, NDArray[Any]] = {}
        for column in columns(self.header):
            begin, count = head.offsets_bytes[column.name], head.counts[column.table]
            data = raw[begin : begin + count * column.row_bytes]
            self._columns[column.name] = data.view(column.dtype).reshape(count, *column.shape)
        self._starts = _offsets(self._columns["iterations"])  # [R + 1]
        self._rows = _offsets(self._columns["rows"])  # [iterations + 1]
        consistent = self._starts[-1] == self.iterations and self._rows[-1] == self.tokens
        if not consistent or (np.diff(self._starts) < 1).any() or (np.diff(self._rows) < 1).any():
            raise TraceError(f"{self.path}: damaged: its counts of iterations and rows contradict each other")
        self._unchecked = {name for name in _LAZILY_CHECKED if name in self._columns}
        for name, values in self._columns.items():
            if name not in _LAZILY_CHECKED:
                self._check(name, values)

    def __len__(self) -> int:
        """Requests."""
        return self.requests

    def __iter__(self) -> Iterator[RequestTrace]:
        return (self.request(index) for index in range(len(self)))

    def column(self, name: str) -> NDArray[Any] | None:
        """A view of a column; `None` if it was not recorded. See docs/trace-format.md for names and shapes.

        Raises:
            TraceError: it has invalid values.
        """
        values = self._columns.get(name)
        if name in self._unchecked and values is not None:
            self._check(name, values)
            self._unchecked.discard(name)
        return values

    @property
    def row_offsets(self) -> NDArray[np.int64]:
        """`[R + 1]`: request i is token rows `row_offsets[i]` to `row_offsets[i + 1]` of the columns."""
        offsets: NDArray[np.int64] = self._rows[self._starts]
        return offsets

    @property
    def iteration_offsets(self) -> NDArray[np.int64]:
        """`[R + 1]`: request i is iterations `iteration_offsets[i]` to `iteration_offsets[i + 1]` of the columns."""
        return self._starts

    @property
    def decode_only(self) -> bool:
        """Whether the trace has no prefill."""
        return not (self._columns["phases"] == PREFILL).any()

    def request(self, index: int) -> RequestTrace:
        """One request, by its position in the trace.

        Raises:
            IndexError: there is no such request.
            TraceError: it has invalid values.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: there is no request {index}, there are {len(self)}")
        first, last = int(self._starts[index]), int(self._starts[index + 1])
        begin, end = int(self._rows[first]), int(self._rows[last])

        def token(name: str) -> Any:
            column = self._columns.get(name)
            if column is not None and name in self._unchecked:
                self._check(name, column[begin:end])
            return None if column is None else column[begin:end]

        embeddings, batch = self._columns.get("embeddings"), self._columns.get("batch")
        return RequestTrace(
            phases=self._columns["phases"][first:last],
            rows=self._rows[first : last + 1] - begin,
            token_ids=token("token_ids"),
            expert_ids=token("expert_ids"),
            weights=token("weights"),
            probs=token("probs"),
            embeddings=None if embeddings is None else embeddings[first:last],
            lookahead=token("lookahead"),
            batch=None if batch is None else int(batch[index]),
        )

    def _check(self, name: str, values: NDArray[Any]) -> None:
        if wrong := fault(name, values, self.header):
            raise TraceError(f"{self.path}: damaged: its column {name} has {wrong}; record or import it again")

    def close(self) -> None:
        """Closes the file. Views that were handed out stay valid."""
        self._columns = {}
        self.requests = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Opens a trace.

    Raises:
        TraceError: missing, not a trace, of a newer version, truncated or damaged; the message names the file, and the
            column with invalid values.
    """
    return Trace(path)


class Head(NamedTuple):
    """The part of a trace file before its columns."""

    header: TraceHeader
    counts: dict[str, int]  # of each table: request, iteration, token
    offsets_bytes: dict[str, int]  # of each column, from the start of the file
    stamp: str  # a new one with every append


def encode_head(header: TraceHeader, counts: Mapping[str, int], stamp: str) -> bytes:
    """Encodes the part of a trace file before its columns, which follow in the order of `columns(header)`.

    Raises:
        TraceError: it exceeds safetensors' limit.
    """
    metadata = {"format": FORMAT, "version": str(VERSION), "stamp": stamp, "header": json.dumps(header.as_dict())}
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for column in columns(header):
        begin, end = end, end + counts[column.table] * column.row_bytes
        shape = [counts[column.table], *column.shape]
        table[column.name] = {"dtype": _DTYPES[column.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEAD_BYTES:
        raise TraceError(f"a trace's head may take {_MAX_HEAD_BYTES} bytes, this one takes {len(text)}")
    return len(text).to_bytes(8, "little") + text


def read_head(path: Path) -> Head:
    """Reads the head of a trace and checks it for consistency, and against the file's size.

    Raises:
        TraceError: no such file, not a trace, of a newer version, truncated or damaged.
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
        expected = columns(header)
        counts = {column.table: table[column.name]["shape"][0] for column in expected}
        offsets = {column.name: start + _checked_offset(column, counts, table[column.name]) for column in expected}
        end = start + max(entry["data_offsets"][1] for entry in table.values())
    except (TraceError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise TraceError(f"{path}: its header is damaged ({_reason(error)})") from error
    if end != size_bytes:
        cut = "cut off" if end > size_bytes else "damaged"
        raise TraceError(f"{path}: {cut}: its header promises {end} bytes, the file has {size_bytes}")
    return Head(header, counts, offsets, str(metadata.get("stamp", "")))


def _parse(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON table, the offset of the tensors in bytes, and the file's size."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= _MAX_HEAD_BYTES:
                raise TraceError(f"{path}: not a finemoe trace; for other formats there is finemoe trace import")
            if length > size_bytes - 8:
                raise TraceError(f"{path}: not a finemoe trace, or cut off in its header")
            raw = file.read(length)
    except FileNotFoundError as error:
        pending = pending_requests(path)
        hint = (
            f", but {spool_folder(path)} holds {pending} finished requests of a recording that still runs or was "
            f"interrupted; finemoe record --append --out {path} resumes it"
        )
        raise TraceError(f"{path}: there is no such trace{hint if pending else ''}") from error
    except OSError as error:
        raise TraceError(f"{path}: can't be read ({error.strerror or error})") from error
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: not a finemoe trace, or its header is damaged") from error
    if not isinstance(table, dict):
        raise TraceError(f"{path}: not a finemoe trace")
    return table, 8 + length, size_bytes


def _checked_offset(column: Column, counts: dict[str, int], entry: dict[str, Any]) -> int:
    """Offset of a column's bytes after the head, if its entry agrees with the header."""
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{column.name} has invalid offsets or shape")
    if shape != (counts[column.table], *column.shape) or entry["dtype"] != _DTYPES[column.dtype]:
        raise ValueError(f"{column.name} is {entry['dtype']} {list(shape)}")
    if end - begin != shape[0] * column.row_bytes:
        raise ValueError(f"{column.name} has {end - begin} bytes for its shape {list(shape)}")
    return int(begin)


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def _offsets(counts: NDArray[Any]) -> NDArray[np.int64]:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
