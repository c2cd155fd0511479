"""A listener that records the events of jobs."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

from finemoe.serving.scheduler.job import Finished, Token


class RecordingListener:
    """Records all events; tests can wait for them.

    Args:
        on_event: called before each event is recorded, on the model thread.
    """

    def __init__(self, on_event: Callable[[str, Token | Finished], None] = lambda _name, _event: None) -> None:
        self.tokens: dict[str, list[Token]] = defaultdict(list)
        self.ends: dict[str, list[Finished]] = defaultdict(list)
        self._on_event = on_event
        self._changed = threading.Condition()

    def __call__(self, name: str, event: Token | Finished) -> None:
        self._on_event(name, event)
        with self._changed:
            if isinstance(event, Token):
                assert not self.ends[name], "a token after the end"
                self.tokens[name].append(event)
            else:
                self.ends[name].append(event)
            self._changed.notify_all()

    def ids(self, name: str) -> list[int]:
        return [token.id for token in self.tokens[name]]

    def wait(self, *names: str, timeout_s: float = 60) -> list[Finished]:
        """Waits for jobs to end; returns the `Finished` of each, which must be the only one."""
        with self._changed:
            assert self._changed.wait_for(lambda: all(self.ends[name] for name in names), timeout_s), "no end"
        assert all(len(self.ends[name]) == 1 for name in names)
        return [self.ends[name][0] for name in names]

    def wait_for_tokens(self, name: str, count: int, timeout_s: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens[name]) >= count, timeout_s), "no tokens"
