"""Exchanges learned maps between servers: publishes what this server's policy has learned, merges what others have."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from finemoe.learned import Maps, SharedMaps, Version, merge, new_maps, num_updates, with_new_totals

_LOG = logging.getLogger(__name__)
_IDLE_TIMEOUT_S = 10.0  # how long an exchange waits until no request runs


class PersistentPolicyModel(Protocol):
    """The part of `ModelHandle` that an exchange uses."""

    @property
    def num_updates(self) -> int: ...

    def learned(self) -> Maps | None: ...

    def check_maps(self, maps: Maps) -> None: ...

    def end_requests(self) -> None: ...

    def load_maps(self, maps: Maps, num_updates: int) -> bool: ...


class IdleRunner(Protocol):
    """The part of `BatchingWorker` that an exchange uses."""

    def run_when_idle(self, call: Callable[[], object], timeout_s: float) -> bool: ...


class MapExchange:
    """Exchanges maps with a shared store at intervals, on its own thread, from `start` to `close`.

    Maps are published at any time, but loaded into the policy only while no request runs: a server that is never idle
    publishes its maps and learns only from its own requests. Errors never stop the server: the first one is logged as
    a warning, and so is the recovery.

    Args:
        model: handle of the loaded model.
        worker: runs the model.
        store: the shared maps.
        every_s: seconds between two exchanges.
        idle_timeout_s: seconds that an exchange waits for the worker to be idle.
    """

    def __init__(
        self,
        model: PersistentPolicyModel,
        worker: IdleRunner,
        store: SharedMaps,
        every_s: float,
        idle_timeout_s: float = _IDLE_TIMEOUT_S,
    ) -> None:
        self._model = model
        self._worker = worker
        self._store = store
        self._every_s = every_s
        self._idle_timeout_s = idle_timeout_s
        self._version: Version | None = None  # the newest version of the store whose maps are loaded here
        self._published: Maps | None = None  # the policy's maps when the store last had all of them
        self._published_to = ""  # id of the store that has them
        self._failing = False
        self._started, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="finemoe-sharing", daemon=True)

    def start(self) -> None:
        """Starts the thread; returns after the first exchange."""
        self._thread.start()
        self._started.wait()

    def close(self) -> None:
        """Publishes the remaining maps and ends the thread. Close the model afterwards."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def exchange(self) -> None:
        """One exchange, now. Errors are logged."""
        self._log_errors(self._exchange)

    def _run(self) -> None:
        self.exchange()
        self._started.set()
        while not self._closing.wait(self._every_s):
            self.exchange()
        self._log_errors(self._publish_rest)

    def _log_errors(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the store is another process, disk or service
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
        is_idle = self._worker.run_when_idle(self._model.end_requests, self._idle_timeout_s)
        pulled = self._store.pull(self._version) if is_idle else None
        if pulled is not None and pulled.version.store != self._published_to:
            self._published = None  # the store is new or was lost: publish everything again
        elif pulled is None and self._published is not None and self._model.num_updates == num_updates(self._published):
            return
        own, published = self._model.learned(), self._published
        known = self._version if pulled is None else pulled.version
        version = self._publish(own)
        if version is not None and version.follows(known):  # no other server published in between
            known = version
        if pulled is None or pulled.maps is None:
            self._version = known
        elif self._load(pulled.maps, own, published):
            self._version, self._published_to = known, pulled.version.store

    def _publish(self, own: Maps | None) -> Version | None:
        """Publishes what is new in the policy's maps. Returns the store's version, or `None` if nothing is new."""
        new = None if own is None else new_maps(own, self._published)
        if new is None:
            return None
        version = self._store.publish(new)
        lost = self._published is not None and version.store != self._published_to  # a new store lacks earlier maps
        self._published, self._published_to = None if lost else own, version.store
        return version

    def _publish_rest(self) -> None:
        self._worker.run_when_idle(self._model.end_requests, min(1.0, self._idle_timeout_s))
        self._publish(self._model.learned())

    def _load(self, pulled: Maps, own: Maps | None, published: Maps | None) -> bool:
        """Loads the merged maps of the store and this server, unless the policy has learned more in the meantime.

        Returns:
            Whether they were loaded.
        """
        self._model.check_maps(pulled)
        merged = pulled if own is None else merge([pulled, with_new_totals(own, published)])
        updates = 0 if own is None else num_updates(own)
        loaded: list[bool] = []
        self._worker.run_when_idle(lambda: loaded.append(self._model.load_maps(merged, updates)), self._idle_timeout_s)
        if any(loaded):
            self._published = merged
            return True
        return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
