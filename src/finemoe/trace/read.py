"""Reads a trace without loading it: columns are views of the mapped file, so that it may be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import TraceError
from finemoe.trace.columns import columns
from finemoe.trace.file import read_head
from finemoe.trace.header import TraceHeader
from finemoe.trace.request import PREFILL, RequestTrace
from finemoe.trace.values import fault

_LARGE = ("probs", "lookahead")  # checked when they are asked for: many replays need neither


class Trace:
    """An open trace: a sequence of requests, and the columns that they are stretches of.

    Views stay valid after `close`; the mapping goes when the last of them does. An append replaces the file, so an
    open trace never changes.

    Raises:
        TraceError: as `open_trace`.
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
            stretch = raw[begin : begin + count * column.row_bytes]
            self._columns[column.name] = stretch.view(column.dtype).reshape(count, *column.shape)
        self._starts = _offsets(self._columns["iterations"])  # [R + 1]
        self._rows = _offsets(self._columns["rows"])  # [I + 1]
        sound = self._starts[-1] == self.iterations and self._rows[-1] == self.tokens
        if not sound or (np.diff(self._starts) < 1).any() or (np.diff(self._rows) < 1).any():
            raise TraceError(f"{self.path}: damaged: its counts of iterations and rows contradict each other")
        self._unchecked = {name for name in _LARGE if name in self._columns}
        for name, values in self._columns.items():
            if name not in _LARGE:
                self._check(name, values)

    def __len__(self) -> int:
        """Requests."""
        return self.requests

    def __iter__(self) -> Iterator[RequestTrace]:
        return (self.request(index) for index in range(len(self)))

    def column(self, name: str) -> NDArray[Any] | None:
        """A whole column, a view; `None` if it was not recorded. See docs/trace-format.md for their names.

        Raises:
            TraceError: it has values that can't be.
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
        """Whether prefills were left out."""
        return not (self._columns["phases"] == PREFILL).any()

    def request(self, index: int) -> RequestTrace:
        """One request, by its place in the trace.

        Raises:
            IndexError: there is no such request.
            TraceError: it has values that can't be.
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
            raise TraceError(f"{self.path}: damaged: its column {name} has {wrong}; record or import it anew")

    def close(self) -> None:
        """Let go of the file. Views that were handed out stay valid."""
        self._columns = {}
        self.requests = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Open a recorded trace.

    Raises:
        TraceError: missing, not a trace, of a newer version, cut off or damaged; one line that names the file, and
            the column whose values can't be.
    """
    return Trace(path)


def _offsets(counts: NDArray[Any]) -> NDArray[np.int64]:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
