"""Ctrl-C, made sure of: Python drops a KeyboardInterrupt that is raised inside a destructor or a foreign callback."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """Raises `KeyboardInterrupt` on Ctrl-C like Python itself, and once more at the next `check` if that was lost."""

    def __init__(self) -> None:
        self.pending = False  # a Ctrl-C was not acted upon
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if a Ctrl-C was not acted upon."""
        if self.pending:
            raise KeyboardInterrupt

    def clear(self) -> None:
        """The Ctrl-C was acted upon."""
        self.pending = False

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        self.pending = True
        raise KeyboardInterrupt
