"""One replica: the server of `finemoe.serving`, without a socket of its own, under Ray's care. Imports ray."""

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
from finemoe.serving.middleware import to_standard_error
from finemoe.serving.server import read_api_key

_TIMEOUT_S = 60.0  # of a call; the store may be starting anew


class SharedMapStore:
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
    """A `SharedMapStore` in another process; a `SharedMaps`. Must not be called from an event loop.

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


HEADER = "x-finemoe-replica"


class Replica:
    """A model with its server; Ray makes one in each process, and calls the methods.

    Args:
        load: the model.
        config: of the server.
        store: the handle of the application's store of maps; `None` where it has none.

    Raises:
        FinemoeError: the model can't be loaded or served.
    """

    def __init__(self, load: LoadConfig, config: ServeConfig, store: Any = None) -> None:
        to_standard_error()
        self._open = ExitStack()
        self._service = self._open.enter_context(
            open_service(
                load,
                config,
                read_api_key(config),
                store=None if store is None else lambda: RemoteMaps(store),
                page=False,  # its figures are those of one server, and each request may meet another
            )
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application; Ray asks for it when the model is loaded."""
        self._service.app.add_middleware(Named, name=serve.get_replica_context().replica_id.unique_id)
        return self._service.app

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises again and again."""
        if (failure := self._service.worker.failure()) is not None:
            raise RuntimeError(failure)

    async def __del__(self) -> None:
        """The end, when Ray has let the running requests finish: tells others what was learned, frees everything."""
        if hasattr(self, "_service"):
            self._service.app_state.admission.draining = True
            self._service.app_state.prompts.close()
            await asyncio.to_thread(self._open.close)


class Named:
    """An application that says in each response who has answered.

    Args:
        app: what answers.
        name: who it is.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = self._name
            await send(message)

        await self._app(scope, receive, named)
