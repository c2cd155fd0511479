"""The application's own store of shared maps: one process of the cluster, that replicas call through Ray."""

from __future__ import annotations

from typing import Any

from finemoe.maps import LocalMaps, Maps, Pulled, Version

_TIMEOUT_S = 60.0  # of a call; the store may be starting anew


class Store:
    """What runs as a deployment of one replica. Ray replaces it when it dies: it is empty then, and is told anew.

    Args:
        limit: how many maps are kept.
    """

    def __init__(self, limit: int) -> None:
        self._maps = LocalMaps(limit)

    def publish(self, maps: Maps) -> Version:
        return self._maps.publish(maps)

    def pull(self, since: Version | None) -> Pulled | None:
        return self._maps.pull(since)


class RemoteMaps:
    """A `Store` in another process; a `SharedMaps`. Must not be called from an event loop.

    Args:
        handle: Ray's, of the deployment.
        timeout_s: of a call.
    """

    def __init__(self, handle: Any, timeout_s: float = _TIMEOUT_S) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    def publish(self, maps: Maps) -> Version:
        version: Version = self._handle.publish.remote(maps).result(timeout_s=self._timeout_s)
        return version

    def pull(self, since: Version | None = None) -> Pulled | None:
        pulled: Pulled | None = self._handle.pull.remote(since).result(timeout_s=self._timeout_s)
        return pulled
