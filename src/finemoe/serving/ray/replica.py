"""A Ray Serve replica: the server without a socket of its own; and the deployment that stores shared maps.

Imports ray.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finemoe.config import LoadConfig
from finemoe.learned import LocalMaps, Maps, Pulled, Version
from finemoe.serving.app import open_service
from finemoe.serving.config import ServeConfig
from finemoe.serving.middleware import log_to_stderr
from finemoe.serving.server import read_api_key

REPLICA_HEADER = "x-finemoe-replica"
_CALL_TIMEOUT_S = 60.0  # for calls of the store, which may be restarting


class Replica:
    """A model with its server. Ray creates one per process and calls its methods.

    Args:
        load: settings of the model.
        config: settings of the server.
        store: handle of the application's `SharedMapStore`; `None` if it has none.

    Raises:
        FinemoeError: the model can't be loaded or served.
    """

    def __init__(self, load: LoadConfig, config: ServeConfig, store: Any = None) -> None:
        log_to_stderr()
        self._open = ExitStack()
        self._service = self._open.enter_context(
            open_service(
                load,
                config,
                read_api_key(config),
                store=None if store is None else lambda: RemoteMaps(store),
                page=False,  # it shows one server, and its requests would reach different replicas
            )
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The ASGI application; Ray calls this once the model is loaded."""
        self._service.app.add_middleware(
            ReplicaHeaderMiddleware, replica_id=serve.get_replica_context().replica_id.unique_id
        )
        return self._service.app

    async def check_health(self) -> None:
        """Raises if the model thread has failed; Ray replaces a replica that fails repeatedly."""
        if (failure := self._service.worker.failure()) is not None:
            raise RuntimeError(failure)

    async def __del__(self) -> None:
        """Publishes the remaining maps and frees everything; Ray calls this after running requests have finished."""
        if hasattr(self, "_service"):
            self._service.app_state.admission.draining = True
            self._service.app_state.prompts.close()
            await asyncio.to_thread(self._open.close)


class ReplicaHeaderMiddleware:
    """Adds the replica's id to every response, in the header `x-finemoe-replica`.

    Args:
        app: the wrapped application.
        replica_id: Ray's unique id of the replica.
    """

    def __init__(self, app: ASGIApp, replica_id: str) -> None:
        self._app = app
        self._replica_id = replica_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REPLICA_HEADER] = self._replica_id
            await send(message)

        await self._app(scope, receive, send_with_header)


class SharedMapStore:
    """The maps of all replicas; runs as a deployment of one replica.

    If it dies, Ray restarts it empty, and the replicas publish everything again.

    Args:
        limit: number of maps that are kept.
    """

    def __init__(self, limit: int) -> None:
        self._maps = LocalMaps(limit)

    def publish(self, maps: Maps) -> Version:
        return self._maps.publish(maps)

    def pull(self, since: Version | None) -> Pulled | None:
        return self._maps.pull(since)


class RemoteMaps:
    """Client of a `SharedMapStore`; implements `SharedMaps`. Blocks: must not be called on an event loop.

    Args:
        handle: Ray's handle of the deployment.
        timeout_s: of a call.
    """

    def __init__(self, handle: Any, timeout_s: float = _CALL_TIMEOUT_S) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    def publish(self, maps: Maps) -> Version:
        version: Version = self._handle.publish.remote(maps).result(timeout_s=self._timeout_s)
        return version

    def pull(self, since: Version | None = None) -> Pulled | None:
        pulled: Pulled | None = self._handle.pull.remote(since).result(timeout_s=self._timeout_s)
        return pulled
