"""Standard output with distinguishable write errors, and Ctrl-C that survives imports."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class LostOutputError(OSError):
    """Standard output can't be written: its reader is gone, or the disk is full."""


class Output:
    """Wraps a stream and raises `LostOutputError` for its write errors.

    Args:
        stream: the original standard output.
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

    def discard(self) -> None:
        """Redirects the stream to the null device, so that flushing buffered text at exit can't fail again."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Interrupts:
    """Raises `KeyboardInterrupt` on Ctrl-C, and again at the next `check` if a library swallowed it."""

    def __init__(self) -> None:
        self._pending = False  # a Ctrl-C not handled yet
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if a Ctrl-C is pending."""
        if self._pending:
            raise KeyboardInterrupt

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Re-raises an exception caused by Ctrl-C (as by an interrupted import) as `KeyboardInterrupt`."""
        try:
            yield
        except Exception:
            self.check()
            raise

    def clear(self) -> None:
        """Marks the Ctrl-C as handled."""
        self._pending = False

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        self._pending = True
        raise KeyboardInterrupt
