"""Imports routing recorded by other tools as a trace. Fields that a source lacks are marked missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

from finemoe.errors import TraceError
from finemoe.trace.format import TraceHeader
from finemoe.trace.importing import arrays, fingerprint, simllm
from finemoe.trace.importing.source import Progress, TraceSource
from finemoe.trace.writer import TraceWriter, refuse_existing

FORMATS = (arrays, fingerprint, simllm)  # each recognises one layout by its structure, and reads it


@dataclass(frozen=True)
class TraceMetadata:
    """Facts given by the user that the source may lack."""

    model: str | None = None
    experts: int | None = None
    licence: str | None = None


def import_trace(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    metadata: TraceMetadata | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = iter,
) -> TraceImport:
    """Opens a source and prepares its import. Iterate over the result to run it.

    Args:
        source: file or folder.
        target: path of the trace to write.
        metadata: facts that the source may lack.
        overwrite: replace the target if it exists.
        progress: wraps the list of the source's files while they are scanned, to show a progress bar.

    Raises:
        TraceError: the source is missing, of an unknown layout or damaged, or the target exists.
    """
    metadata = metadata or TraceMetadata()
    path = Path(source)
    if not path.exists():
        raise TraceError(f"{path}: there is no such file or folder")
    refuse_existing(Path(target), append=False, overwrite=overwrite)
    try:
        for layout in FORMATS:
            opened = layout.open_source(path, metadata.model, metadata.experts, progress)
            if opened is not None:
                return TraceImport(opened, Path(target), metadata.licence, overwrite=overwrite)
    except OSError as error:
        raise TraceError(f"{error.filename or path}: can't be read ({error.strerror or error})") from error
    known = "; ".join(layout.LAYOUT for layout in FORMATS)
    raise TraceError(f"{path}: has no routing in a known layout; known are: {known}")


class TraceImport:
    """An opened import: iterating adds one request after another, and writes the trace after the last."""

    def __init__(self, source: TraceSource, target: Path, licence: str | None, *, overwrite: bool) -> None:
        self.header: TraceHeader = source.header(licence)
        self.notices = source.notices
        self._source = source
        self._target = target
        self._overwrite = overwrite

    def __len__(self) -> int:
        """Requests of the source."""
        return len(self._source)

    def __iter__(self) -> Iterator[int]:
        """Yields each request's number of tokens after adding it. An error or interrupt leaves no file behind."""
        writer = TraceWriter(self._target, self.header, overwrite=self._overwrite, commit_every_s=inf)
        done = False
        try:
            for request in self._source.requests():
                writer.add(request)
                yield len(request.token_ids)
            done = True
        finally:
            if done:
                writer.close()
            else:
                writer.discard()
