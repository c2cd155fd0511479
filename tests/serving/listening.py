"""Hears what a worker says of jobs."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

from finemoe.serving.scheduler.job import Finished, Token


class Ear:
    """A listener that keeps everything, and can be waited for.

    Args:
        on_news: called first with each piece of news, from the model's thread.
    """

    def __init__(self, on_news: Callable[[str, Token | Finished], None] = lambda _name, _news: None) -> None:
        self.tokens: dict[str, list[Token]] = defaultdict(list)
        self.ends: dict[str, list[Finished]] = defaultdict(list)
        self._on_news = on_news
        self._changed = threading.Condition()

    def __call__(self, name: str, news: Token | Finished) -> None:
        self._on_news(name, news)
        with self._changed:
            if isinstance(news, Token):
                assert not self.ends[name], "a token after the end"
                self.tokens[name].append(news)
            else:
                self.ends[name].append(news)
            self._changed.notify_all()

    def ids(self, name: str) -> list[int]:
        return [token.id for token in self.tokens[name]]

    def wait(self, *names: str, timeout_s: float = 60) -> list[Finished]:
        """The ends of jobs, once all have ended; each exactly once."""
        with self._changed:
            assert self._changed.wait_for(lambda: all(self.ends[name] for name in names), timeout_s), "no end"
        assert all(len(self.ends[name]) == 1 for name in names)
        return [self.ends[name][0] for name in names]

    def wait_for_tokens(self, name: str, count: int, timeout_s: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens[name]) >= count, timeout_s), "no tokens"
