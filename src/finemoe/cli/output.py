"""Standard output that tells its own failures from everything else's."""

from __future__ import annotations

import os
from typing import Any


class LostOutputError(OSError):
    """Standard output can't be written: its reader went away, or its disk is full."""


class Output:
    """Passes everything on to `stream`; what that can't write is a `LostOutputError`.

    Args:
        stream: standard output as it was.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            written: int = self._stream.write(text)
        except OSError as error:
            raise LostOutputError(error.errno, error.strerror) from error
        return written

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise LostOutputError(error.errno, error.strerror) from error

    def give_up(self) -> None:
        """What is still held back goes nowhere: flushing it at exit would fail once more."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
