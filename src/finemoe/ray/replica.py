"""One replica: the server of `finemoe.serving`, without a socket of its own, under Ray's care. Imports ray."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finemoe.config import LoadConfig
from finemoe.ray.store import RemoteMaps
from finemoe.serving.config import ServeConfig
from finemoe.serving.logs import to_standard_error
from finemoe.serving.server import read_api_key
from finemoe.serving.service import open_service

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
            self._service.house.admission.draining = True
            self._service.house.prompts.close()
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
