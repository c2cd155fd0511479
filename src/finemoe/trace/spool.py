"""Where finished requests wait until a trace is put together: a folder beside it, with one growing file per column.

A request counts once its number of iterations is written, which comes last, after all else has reached the disk.
Whatever lies beyond is written over, so that it matters neither when a writer is interrupted nor when it is killed.
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

_ABOUT = "about.json"
_LAST = "iterations"  # the column that makes a request count
_COUNT_BYTES = 8


def spool_folder(path: Path) -> Path:
    """The folder of the spool of the trace at `path`."""
    return path.with_name(path.name + ".partial")


class Spool:
    """The spool of one trace, for one writer at a time. Takes up what an interrupted writer left behind.

    Args:
        path: of the trace.
        header: of the trace; a spool that was left behind must agree.
        replaces: what is collected replaces the trace instead of adding to it; a spool left behind knows by itself.
        commit_every_s: how much time's requests a power cut may cost; each commit waits for the disk.

    Raises:
        TraceError: another process writes here, or the spool left behind is damaged or does not agree.
        OSError: the folder can't be written.
    """

    def __init__(self, path: Path, header: TraceHeader, *, replaces: bool, commit_every_s: float) -> None:
        self.folder = spool_folder(path)
        self.folder.mkdir(exist_ok=True)
        self._lock = _lock(self.folder)
        self._files: dict[str, int] = {}
        self._columns = columns(header)
        try:
            about = _about(self.folder) or _begin(self.folder, header, replaces=replaces)
            _check(self.folder, about, header)
            self.replaces: bool = about["replaces"]
            self.stamp: str = about["stamp"]
            self.counts = _committed(self.folder, header)  # of each table: request, iteration, token
            for column in self._columns:
                file = os.open(self.folder / column.name, os.O_RDWR | os.O_CREAT, 0o666)
                self._files[column.name] = file
                _check_size(self.folder / column.name, self.counts[column.table] * column.row_bytes)
        except BaseException:
            self.close()
            raise
        self._base = self.counts["request"]
        os.ftruncate(self._files[_LAST], self._base * _COUNT_BYTES)  # counts whose rows a power cut has lost
        self._iterations = bytearray()  # of the requests since
        self._commit_every_s = commit_every_s
        self._committed_s = 0.0

    def add(self, table: dict[str, NDArray[Any]]) -> None:
        """One request's rows of every column."""
        for column in self._columns:
            if column.name != _LAST:
                _write(self._files[column.name], table[column.name], self.counts[column.table] * column.row_bytes)
        place = (self.counts["request"] - self._base) * _COUNT_BYTES
        self._iterations[place:] = table[_LAST].tobytes()
        added = {"request": 1, "iteration": len(table["rows"]), "token": len(table["token_ids"])}
        self.counts = {name: count + added[name] for name, count in self.counts.items()}
        if time.monotonic() - self._committed_s >= self._commit_every_s:
            self.commit()

    def commit(self) -> None:
        """Returns once everything that was added would survive a power cut."""
        length = (self.counts["request"] - self._base) * _COUNT_BYTES
        for name, file in self._files.items():
            if name != _LAST:
                os.fsync(file)
        _write(self._files[_LAST], np.frombuffer(bytes(self._iterations[:length]), np.uint8), self._base * _COUNT_BYTES)
        os.fsync(self._files[_LAST])
        self._committed_s = time.monotonic()

    def close(self) -> None:
        """Let go of the files; what was committed stays."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Delete the spool, and close it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def drop(path: Path) -> None:
    """Delete the spool of the trace at `path`, whatever is in it.

    Raises:
        TraceError: a writer is using it.
    """
    folder = spool_folder(path)
    if folder.exists():
        lock = _lock(folder)
        shutil.rmtree(folder)
        os.close(lock)


def left_behind(path: Path) -> int:
    """How many finished requests an interrupted writer left in the spool of the trace at `path`."""
    folder = spool_folder(path)
    try:
        about = _about(folder)
        return _committed(folder, TraceHeader.from_dict(about["header"]))["request"] if about else 0
    except (OSError, TraceError):
        return 0


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock on a spool."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise TraceError(f"{folder}: another process is writing this trace; wait for it, or end it") from error
    return descriptor


def _about(folder: Path) -> dict[str, Any] | None:
    """What a spool says about itself; `None` if there is nothing in it."""
    try:
        about: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        return about if _committed(folder, TraceHeader.from_dict(about["header"]))["request"] else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{folder / _ABOUT}: is damaged; delete the folder, or give --force") from error


def _begin(folder: Path, header: TraceHeader, *, replaces: bool) -> dict[str, Any]:
    for left in folder.iterdir():  # nothing that counts
        left.unlink()
    about = {"stamp": uuid.uuid4().hex, "replaces": replaces, "header": header.as_dict()}
    fresh = folder / f"{_ABOUT}.new"
    fresh.write_text(json.dumps(about), encoding="utf-8")
    fresh.replace(folder / _ABOUT)
    return about


def _check(folder: Path, about: dict[str, Any], header: TraceHeader) -> None:
    if difference := TraceHeader.from_dict(about["header"]).difference(header):
        raise TraceError(
            f"{folder}: holds requests of another interrupted recording ({difference}); delete it, or give --force"
        )


def _check_size(path: Path, least_bytes: int) -> None:
    if path.stat().st_size < least_bytes:
        raise TraceError(f"{path}: was cut off since it was written; delete its folder, or give --force")


def _committed(folder: Path, header: TraceHeader) -> dict[str, int]:
    """The counts of the requests whose iterations are there, and the rows of all of these."""
    by_name = {column.name: column for column in columns(header)}
    iterations, rows = (_counts(folder / name, by_name[name].dtype) for name in (_LAST, "rows"))
    ends = np.cumsum(iterations)
    requests = int(np.searchsorted(ends, len(rows), "right"))
    total = int(ends[requests - 1]) if requests else 0
    return {"request": requests, "iteration": total, "token": int(rows[:total].sum())}


def _counts(path: Path, dtype: np.dtype[Any]) -> NDArray[np.int64]:
    raw = path.read_bytes() if path.exists() else b""
    return np.frombuffer(raw[: len(raw) - len(raw) % dtype.itemsize], dtype).astype(np.int64)


def _write(file: int, rows: NDArray[Any], offset_bytes: int) -> None:
    left = memoryview(rows.reshape(-1).view(np.uint8).data)
    while left:
        written = os.pwrite(file, left, offset_bytes)
        left, offset_bytes = left[written:], offset_bytes + written
