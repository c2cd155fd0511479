"""Ctrl-C, made sure of: Python drops a KeyboardInterrupt that is raised inside a destructor or a foreign callback."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
