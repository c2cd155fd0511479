"""Turns routing that others recorded into a trace. What a source lacks is marked missing, never made up."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

from finemoe.errors import TraceError
from finemoe.trace.format import TraceHeader
from finemoe.trace.importing import arrays, fingerprint, simllm
from finemoe.trace.importing.source import Progress, TraceSource
from finemoe.trace.writer import TraceWriter, refuse_existing

FORMATS = (arrays, fingerprint, simllm)  # each reads one layout, told by its structure


@dataclass(frozen=True)
class TraceMetadata:
    """What the user knows and the source may not say."""

    model: str | None = None
    experts: int | None = None
    licence: str | None = None


def import_trace(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    told: TraceMetadata | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = iter,
) -> Imported:
    """Starts an import: what is known before the first request is written. Iterate over it to run it.

    Args:
        source: file or folder.
        target: the trace to be.
        told: what the user knows.
        overwrite: replace the target if it exists.
        progress: wraps the list of the source's files while they are looked through, to show how far that is.

    Raises:
        TraceError: the source is missing, of an unknown layout or damaged, or the target exists; one line.
    """
    told = told or TraceMetadata()
    path = Path(source)
    if not path.exists():
        raise TraceError(f"{path}: there is no such file or folder")
    refuse_existing(Path(target), append=False, overwrite=overwrite)
    try:
        for kind in FORMATS:
            opened = kind.open_source(path, told.model, told.experts, progress)
            if opened is not None:
                return Imported(opened, Path(target), told.licence, overwrite=overwrite)
    except OSError as error:
        raise TraceError(f"{error.filename or path}: can't be read ({error.strerror or error})") from error
    known = "; ".join(kind.LAYOUT for kind in FORMATS)
    raise TraceError(f"{path}: holds no routing of a known layout; known are: {known}")


class Imported:
    """An import under way: iterating writes one request after another, and the trace when all are there."""

    def __init__(self, source: TraceSource, target: Path, licence: str | None, *, overwrite: bool) -> None:
        self.header: TraceHeader = source.header(licence)
        self.notices = source.notices
        self._source = source
        self._target = target
        self._overwrite = overwrite

    def __len__(self) -> int:
        """Requests to come."""
        return len(self._source)

    def __iter__(self) -> Iterator[int]:
        """Yields after each request the token rows that it had. An error or interrupt leaves no trace behind."""
        writer = TraceWriter(self._target, self.header, overwrite=self._overwrite, commit_every_s=inf)
        done = False
        try:
            yield from _write(writer, self._source)
            done = True
        finally:
            if done:
                writer.close()
            else:
                writer.discard()


def _write(writer: TraceWriter, source: TraceSource) -> Iterable[int]:
    for request in source.requests():
        writer.add(request)
        yield len(request.token_ids)
