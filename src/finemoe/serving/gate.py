"""The gate around all endpoints: request ids, the key, the log, and an answer even where something broke."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finemoe.serving.errors import ApiError
from finemoe.serving.house import House
from finemoe.serving.logs import log

OPEN = frozenset({"/", "/health", "/ready", "/openapi.json"})
_GUARDED = ("/v1/", "/metrics")
_GENERATE = frozenset({"/v1/chat/completions", "/v1/completions"})
_SANE_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


class Gate:
    """Pure ASGI, so that nothing stands between a stream and its client.

    Args:
        app: what is guarded.
        house: of the server.
        api_key: that `/v1/` and `/metrics` ask for; `None` for none.
    """

    def __init__(self, app: ASGIApp, house: House, api_key: str | None = None) -> None:
        self._app = app
        self._house = house
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(self._house, scope, send)
        try:
            self._refuse_stranger(scope)
            await self._app(scope, receive, passage.send)
        except ApiError as refusal:
            await refusal.response()(scope, receive, passage.send)
        except Exception:  # whatever broke, the client hears of it and the server goes on
            logging.getLogger("finemoe.serving").exception("broken", extra={"fields": {"request_id": passage.id}})
            if passage.status is None:
                broken = ApiError(500, "something broke here; the server's log says what", code="internal_error")
                await broken.response()(scope, receive, passage.send)
        finally:
            passage.end()

    def _refuse_stranger(self, scope: Scope) -> None:
        if self._api_key is None or not _path(scope).startswith(_GUARDED):
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        key = given.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key, self._api_key.encode()):
            raise ApiError(
                401,
                "this server asks for a key; send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _path(scope: Scope) -> str:
    """The request's path below where the application is mounted, as its router sees it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


class _Passage:
    """One request on its way through."""

    def __init__(self, house: House, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.id = given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        self.status: int | None = None
        self._house = house
        self._scope = scope
        self._send = send
        self._started_s = time.monotonic()
        self._fields: dict[str, Any] = {}
        config = house.served.config
        scope.setdefault("state", {}).update(
            arrived_s=self._started_s,
            fields=self._fields,
            log_prompts=config.log_prompts,
            max_body_bytes=config.body_bytes,
            remember=self._remember,
        )

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)

    def end(self) -> None:
        """Write the log's line."""
        path, status = _path(self._scope), self.status or 0
        generates = self._scope["method"] == "POST" and path in _GENERATE
        if generates and status >= 400 and "outcome" not in self._fields:
            self._house.metrics.refused(status)
        log(
            "request",
            logging.INFO if generates or status >= 400 else logging.DEBUG,
            request_id=self.id,
            method=self._scope["method"],
            path=path,
            status=status,
            seconds=round(time.monotonic() - self._started_s, 4),
            **self._fields,
        )

    def _remember(self, user: str | None, prompt: Any) -> None:
        """Who asks, and, if the log may hold it, what."""
        if user is not None:
            self._fields["user"] = user
        if self._house.served.config.log_prompts:
            self._fields["prompt"] = prompt
