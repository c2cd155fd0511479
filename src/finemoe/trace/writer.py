"""Writes traces atomically: requests collect in a spool, and `close` replaces the trace by a complete new file."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from finemoe.errors import TraceError
from finemoe.system import unwritable
from finemoe.trace.format import RequestTrace, TraceHeader, columns
from finemoe.trace.reader import Head, encode_head, read_head
from finemoe.trace.spool import Spool, delete_spool, pending_requests, spool_folder

_COPY_BYTES = 16 << 20


class TraceWriter:
    """Collects requests in the spool `<trace>.partial`, and assembles the trace on `close`.

    Leaving a `with` block closes the writer, also after an error: finished requests are kept. If the process is killed,
    they stay in the spool until the next writer appends.

    Args:
        path: of the trace.
        header: describes the requests; when appending, it must agree with the trace's own, which is kept.
        append: add to the trace, and to the spool of an interrupted writer, if they exist.
        overwrite: replace the trace, and delete the spool of an interrupted writer, if they exist.
        commit_every_s: interval of fsync: a power cut loses at most the requests of this many seconds.

    Raises:
        TraceError: the trace exists, and neither `append` nor `overwrite` is set; it is damaged; its header disagrees;
            or another process is writing it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: TraceHeader,
        *,
        append: bool = False,
        overwrite: bool = False,
        commit_every_s: float = 1.0,
    ) -> None:
        self.path = Path(path)
        self.header = header
        refuse_existing(self.path, append=append, overwrite=overwrite)
        self._closed = False
        try:
            if overwrite:
                delete_spool(self.path)
            self._spool = Spool(self.path, header, replaces=overwrite, commit_every_s=commit_every_s)
        except OSError as error:
            raise TraceError(f"{error.filename}: can't be written ({error.strerror})") from error
        try:
            self._base = self._existing()
            if self._base and self._base.stamp == self._spool.stamp:  # killed after replacing the trace
                self._spool.remove()
                self._spool = Spool(self.path, header, replaces=False, commit_every_s=commit_every_s)
        except BaseException:
            if self._spool.counts["request"]:
                self._spool.close()
            else:
                self._spool.remove()
            raise

    def __len__(self) -> int:
        """Requests that the trace will have."""
        return self._spool.counts["request"] + (self._base.counts["request"] if self._base else 0)

    def add(self, request: RequestTrace) -> None:
        """Adds one finished request.

        Raises:
            TraceError: it does not fit the header, or the disk is full.
        """
        if self._closed:
            raise TraceError(f"{self.path}: this writer was closed")
        table = request.check(self.header)
        try:
            self._spool.add(table)
        except OSError as error:
            raise TraceError(f"{self._spool.folder}: can't be written ({error.strerror or error})") from error

    def close(self) -> None:
        """Assembles the trace and replaces the file; writes none if there are no requests.

        Raises:
            TraceError: the file can't be written, e.g. as the disk is full; the finished requests stay in the spool.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._spool.counts["request"]:
                self._spool.commit()
                self._assemble()
        except OSError as error:
            raise TraceError(
                f"{self.path}: can't be written ({error.strerror or error}); the finished requests are in "
                f"{self._spool.folder}, --append adds them"
            ) from error
        else:
            self._spool.remove()
        finally:
            self._spool.close()

    def discard(self) -> None:
        """Closes without writing; the trace stays as it was."""
        if not self._closed:
            self._closed = True
            self._spool.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _existing(self) -> Head | None:
        """Head of the trace that is appended to; `None` if there is none."""
        if self._spool.replaces or not self.path.exists():
            return None
        head = read_head(self.path)
        if difference := head.header.difference(self.header):
            raise TraceError(f"{self.path}: can't be appended to ({difference})")
        return head

    def _assemble(self) -> None:
        header = self._base.header if self._base else self.header
        counts = dict(self._spool.counts)
        if self._base:
            counts = {table: count + self._base.counts[table] for table, count in counts.items()}
        assembled = self._spool.folder / "assembled"
        with assembled.open("wb") as target:
            target.write(encode_head(header, counts, self._spool.stamp))
            for column in columns(header):
                if self._base:
                    length = self._base.counts[column.table] * column.row_bytes
                    _copy(self.path, self._base.offsets_bytes[column.name], length, target)
                length = self._spool.counts[column.table] * column.row_bytes
                _copy(self._spool.folder / column.name, 0, length, target)
            target.flush()
            os.fsync(target.fileno())
        assembled.replace(self.path)
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # makes the rename durable
        finally:
            os.close(descriptor)


def refuse_existing(path: Path, *, append: bool, overwrite: bool) -> None:
    """Makes the checks of `TraceWriter` on a path, without creating anything; for use before a long computation.

    Raises:
        TraceError: the path's folder is missing or can't be written; the path is a folder; or a trace or spool exists,
            and neither flag is set.
    """
    if wrong := unwritable(path):
        raise TraceError(wrong)
    if append and path.exists():
        read_head(path)
    if append or overwrite:
        return
    if path.exists():
        raise TraceError(f"{path}: exists; add to it with --append, or replace it with --force")
    if pending := pending_requests(path):
        raise TraceError(
            f"{spool_folder(path)}: holds {pending} finished requests of an interrupted recording; "
            "resume it with --append, or delete them with --force"
        )


def _copy(source: Path, begin_bytes: int, length_bytes: int, target: BinaryIO) -> None:
    """Appends part of a file to another."""
    with source.open("rb") as file:
        file.seek(begin_bytes)
        while length_bytes:
            chunk = file.read(min(length_bytes, _COPY_BYTES))
            if not chunk:
                raise TraceError(f"{source}: was truncated while it was read")
            target.write(chunk)
            length_bytes -= len(chunk)
