"""A server's share in maps that several know: it publishes what it has learned, and takes in what others have."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from finemoe.learned import Maps, SharedMaps, Version, merge, new_maps, num_updates, with_new_totals

_LOG = logging.getLogger(__name__)
_PATIENCE_S = 10.0  # to wait for a moment at which no request runs


class Learner(Protocol):
    """What is asked of a loaded model: `ModelHandle`."""

    @property
    def num_updates(self) -> int: ...

    def learned(self) -> Maps | None: ...

    def refuse_others(self, maps: Maps) -> None: ...

    def end_requests(self) -> None: ...

    def take_in(self, maps: Maps, num_updates: int) -> bool: ...


class IdleRunner(Protocol):
    """What is asked of a worker."""

    def run_when_idle(self, call: Callable[[], object], timeout_s: float) -> bool: ...


class Sharing:
    """Exchanges maps at intervals, from `start` to `close`, on a thread of its own: nobody else waits for the store.

    Published is at any time; taken in only while no request runs. A server that never rests learns from itself, and
    still tells others. Whatever goes wrong is one warning until it works again, and nothing else.

    Args:
        learner: of the loaded model.
        worker: runs the model.
        store: what is shared.
        every_s: seconds between two exchanges.
        patience_s: seconds that an exchange waits for the model to rest.
    """

    def __init__(
        self, learner: Learner, worker: IdleRunner, store: SharedMaps, every_s: float, patience_s: float = _PATIENCE_S
    ) -> None:
        self._learner = learner
        self._worker = worker
        self._store = store
        self._every_s = every_s
        self._patience_s = patience_s
        self._version: Version | None = None  # of the store, as far as this server knows it
        self._told: Maps | None = None  # what the policy knew when all of it was last known to the store
        self._told_whom = ""  # which store that was
        self._failing = False
        self._started, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="finemoe-sharing", daemon=True)

    def start(self) -> None:
        """Takes in what others know; returns when that is done, and goes on at intervals."""
        self._thread.start()
        self._started.wait()

    def close(self) -> None:
        """Ends the thread, and publishes what is left. The model must not be closed yet."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def exchange(self) -> None:
        """One exchange."""
        self._guarded(self._exchange)

    def _tell_the_rest(self) -> None:
        self._worker.run_when_idle(self._learner.end_requests, min(1.0, self._patience_s))
        self._publish(self._learner.learned())

    def _run(self) -> None:
        self.exchange()
        self._started.set()
        while not self._closing.wait(self._every_s):
            self.exchange()
        self._guarded(self._tell_the_rest)

    def _guarded(self, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:  # noqa: BLE001 - a store is someone else's disk or process
            if not self._failing:
                _LOG.warning(
                    "maps can't be shared (%s: %s); going on without, and trying again",
                    type(error).__name__,
                    _line(error),
                )
            self._failing = True
        else:
            if self._failing:
                _LOG.warning("maps are shared again")
            self._failing = False

    def _exchange(self) -> None:
        rests = self._worker.run_when_idle(self._learner.end_requests, self._patience_s)
        pulled = self._store.pull(self._version) if rests else None
        if pulled is not None and pulled.version.store != self._told_whom:
            self._told = None  # the store is new, or was lost: it is told everything
        elif pulled is None and self._told is not None and self._learner.num_updates == num_updates(self._told):
            return
        now, told = self._learner.learned(), self._told
        known = self._version if pulled is None else pulled.version
        published = self._publish(now)
        if published is not None and published.follows(known):  # nobody else has: there is nothing new for us in it
            known = published
        if pulled is None or pulled.maps is None:
            self._version = known
        elif self._take_in(pulled.maps, now, told):
            self._version, self._told_whom = known, pulled.version.store

    def _publish(self, now: Maps | None) -> Version | None:
        """Tells others what is new; returns the store's version then, `None` if nothing is."""
        fresh = None if now is None else new_maps(now, self._told)
        if fresh is None:
            return None
        version = self._store.publish(fresh)
        lost = self._told is not None and version.store != self._told_whom  # it does not know what it was told before
        self._told, self._told_whom = None if lost else now, version.store
        return version

    def _take_in(self, pulled: Maps, now: Maps | None, told: Maps | None) -> bool:
        """What others know and what is known here, as one; if nothing was learned here in the meantime."""
        self._learner.refuse_others(pulled)
        merged = pulled if now is None else merge([pulled, with_new_totals(now, told)])
        before = 0 if now is None else num_updates(now)
        taken: list[bool] = []
        self._worker.run_when_idle(lambda: taken.append(self._learner.take_in(merged, before)), self._patience_s)
        if any(taken):
            self._told = merged
            return True
        return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
