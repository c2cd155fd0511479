"""Standard output that tells its own failures from everything else's."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
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


class Interrupts:
    """Raises `KeyboardInterrupt` on Ctrl-C like Python itself, and once more at the next `check` if that was lost."""

    def __init__(self) -> None:
        self._pending = False  # a Ctrl-C was not acted upon
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if a Ctrl-C was not acted upon."""
        if self._pending:
            raise KeyboardInterrupt

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within, what a Ctrl-C broke is a `KeyboardInterrupt`, whatever an import in its middle made of that."""
        try:
            yield
        except Exception:
            self.check()
            raise

    def clear(self) -> None:
        """The Ctrl-C was acted upon."""
        self._pending = False

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        self._pending = True
        raise KeyboardInterrupt
