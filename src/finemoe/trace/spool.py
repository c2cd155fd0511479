"""Crash-safe buffer for a recording: a folder next to the trace, with one growing file per column.

A request is committed once its number of iterations is in the `iterations` file. That is written last, after fsync of
the other files; uncommitted data is overwritten by the next writer. So a writer may be killed at any time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import TraceError
from finemoe.trace.format import TraceHeader, columns

_METADATA = "about.json"
_COMMIT_COLUMN = "iterations"  # a request is committed by its entry here
_COUNT_BYTES = 8  # of an entry


def spool_folder(path: Path) -> Path:
    """The spool's folder for the trace at `path`."""
    return path.with_name(path.name + ".partial")


class Spool:
    """The spool of one trace, for one writer at a time. Resumes the spool of an interrupted writer.

    Args:
        path: of the trace.
        header: of the trace; an existing spool must agree.
        replaces: the requests replace the trace instead of adding to it; an existing spool keeps its own setting.
        commit_every_s: interval of `commit`, in seconds; each one waits for the disk.

    Raises:
        TraceError: another process writes to the spool, or the existing one is damaged or disagrees with `header`.
        OSError: the folder can't be written.
    """

    def __init__(self, path: Path, header: TraceHeader, *, replaces: bool, commit_every_s: float) -> None:
        self.folder = spool_folder(path)
        self.folder.mkdir(exist_ok=True)
        self._lock = _lock(self.folder)
        self._files: dict[str, int] = {}
        self._columns = columns(header)
        try:
            metadata = _read_metadata(self.folder) or _create(self.folder, header, replaces=replaces)
            _check_header(self.folder, metadata, header)
            self.replaces: bool = metadata["replaces"]
            self.stamp: str = metadata["stamp"]
            self.counts = _committed(self.folder, header)  # of each table: request, iteration, token
            for column in self._columns:
                file = os.open(self.folder / column.name, os.O_RDWR | os.O_CREAT, 0o666)
                self._files[column.name] = file
                _check_size(self.folder / column.name, self.counts[column.table] * column.row_bytes)
        except BaseException:
            self.close()
            raise
        self._base = self.counts["request"]
        # drop entries whose rows were lost in a power cut
        os.ftruncate(self._files[_COMMIT_COLUMN], self._base * _COUNT_BYTES)
        self._iterations = bytearray()  # entries of the requests added since
        self._commit_every_s = commit_every_s
        self._committed_s = 0.0

    def add(self, table: dict[str, NDArray[Any]]) -> None:
        """Writes one request's rows of every column, as from `RequestTrace.check`."""
        for column in self._columns:
            if column.name != _COMMIT_COLUMN:
                _write(self._files[column.name], table[column.name], self.counts[column.table] * column.row_bytes)
        end = (self.counts["request"] - self._base) * _COUNT_BYTES
        self._iterations[end:] = table[_COMMIT_COLUMN].tobytes()
        added = {"request": 1, "iteration": len(table["rows"]), "token": len(table["token_ids"])}
        self.counts = {name: count + added[name] for name, count in self.counts.items()}
        if time.monotonic() - self._committed_s >= self._commit_every_s:
            self.commit()

    def commit(self) -> None:
        """Makes everything that was added durable."""
        length = (self.counts["request"] - self._base) * _COUNT_BYTES
        for name, file in self._files.items():
            if name != _COMMIT_COLUMN:
                os.fsync(file)
        entries = np.frombuffer(bytes(self._iterations[:length]), np.uint8)
        _write(self._files[_COMMIT_COLUMN], entries, self._base * _COUNT_BYTES)
        os.fsync(self._files[_COMMIT_COLUMN])
        self._committed_s = time.monotonic()

    def close(self) -> None:
        """Closes the files; committed requests stay on disk."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Deletes the spool and closes its files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def delete_spool(path: Path) -> None:
    """Deletes the spool of the trace at `path`, if there is one.

    Raises:
        TraceError: a writer is using it.
    """
    folder = spool_folder(path)
    if folder.exists():
        lock = _lock(folder)
        shutil.rmtree(folder)
        os.close(lock)


def pending_requests(path: Path) -> int:
    """Number of finished requests in the spool of the trace at `path`; 0 if there is none, or it is damaged."""
    folder = spool_folder(path)
    try:
        metadata = _read_metadata(folder)
        return _committed(folder, TraceHeader.from_dict(metadata["header"]))["request"] if metadata else 0
    except (OSError, TraceError):
        return 0


def _lock(folder: Path) -> int:
    """Locks a spool; returns a descriptor, whose closing unlocks it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise TraceError(f"{folder}: another process is writing this trace; wait for it, or end it") from error
    return descriptor


def _read_metadata(folder: Path) -> dict[str, Any] | None:
    """A spool's metadata; `None` if it has no committed request."""
    try:
        metadata: dict[str, Any] = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
        return metadata if _committed(folder, TraceHeader.from_dict(metadata["header"]))["request"] else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{folder / _METADATA}: is damaged; delete the folder, or give --force") from error


def _create(folder: Path, header: TraceHeader, *, replaces: bool) -> dict[str, Any]:
    """Starts an empty spool and returns its metadata. Deletes uncommitted files."""
    for uncommitted in folder.iterdir():
        uncommitted.unlink()
    metadata = {"stamp": uuid.uuid4().hex, "replaces": replaces, "header": header.as_dict()}
    written = folder / f"{_METADATA}.new"
    written.write_text(json.dumps(metadata), encoding="utf-8")
    written.replace(folder / _METADATA)
    return metadata


def _check_header(folder: Path, metadata: dict[str, Any], header: TraceHeader) -> None:
    if difference := TraceHeader.from_dict(metadata["header"]).difference(header):
        raise TraceError(
            f"{folder}: holds requests of another interrupted recording ({difference}); delete it, or give --force"
        )


def _check_size(path: Path, least_bytes: int) -> None:
    if path.stat().st_size < least_bytes:
        raise TraceError(f"{path}: was truncated since it was written; delete its folder, or give --force")


def _committed(folder: Path, header: TraceHeader) -> dict[str, int]:
    """Entries of each table that belong to committed requests: `request`, `iteration` and `token`."""
    by_name = {column.name: column for column in columns(header)}
    iterations, rows = (_counts(folder / name, by_name[name].dtype) for name in (_COMMIT_COLUMN, "rows"))
    ends = np.cumsum(iterations)
    requests = int(np.searchsorted(ends, len(rows), "right"))
    total = int(ends[requests - 1]) if requests else 0
    return {"request": requests, "iteration": total, "token": int(rows[:total].sum())}


def _counts(path: Path, dtype: np.dtype[Any]) -> NDArray[np.int64]:
    raw = path.read_bytes() if path.exists() else b""
    return np.frombuffer(raw[: len(raw) - len(raw) % dtype.itemsize], dtype).astype(np.int64)


def _write(file: int, rows: NDArray[Any], offset_bytes: int) -> None:
    remaining = memoryview(rows.reshape(-1).view(np.uint8).data)
    while remaining:
        written = os.pwrite(file, remaining, offset_bytes)
        remaining, offset_bytes = remaining[written:], offset_bytes + written
