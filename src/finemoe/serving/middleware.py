"""The gate around all endpoints: request ids, the key, the log, and an answer even where something broke."""

from __future__ import annotations

import hmac
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from email.message import Message as ContentType
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finemoe.serving.errors import ApiError
from finemoe.serving.state import AppState


class JsonRoute(APIRoute):
    """A route whose body is a `JsonRequest`'s."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


class JsonRequest(Request):
    """A request whose body is checked as it is read.

    Raises:
        ApiError: 415, 413 or 400, as the body is no JSON by its header, too long, or none after all.
    """

    _whole: bytes | None = None

    async def body(self) -> bytes:
        if self._whole is None:
            self._refuse_other_types()
            limit = self.state.max_body_bytes
            too_long = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_long")
            declared = self.headers.get("content-length", "")
            if declared.isdecimal() and int(declared[:20]) > limit:
                raise too_long
            read = bytearray()
            async for chunk in self.stream():
                read += chunk
                if len(read) > limit:
                    raise too_long
            self._whole = bytes(read)
        return self._whole

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:  # UTF-8 that is none, half a surrogate pair and endless nesting too
            raise ApiError(400, f"the body is no JSON ({error})", code="invalid_json") from error

    def _refuse_other_types(self) -> None:
        given = ContentType()
        given["content-type"] = self.headers.get("content-type", "")
        if given.get_content_type() != "application/json":
            raise ApiError(415, "the body must be JSON; send Content-Type: application/json", code="not_json")


LOG = logging.getLogger("finemoe.serving")
_OURS = ("finemoe.serving", "uvicorn.error")


class JsonLines(logging.Formatter):
    """`time`, `level`, `event`, and whatever came with `extra={"fields": {..}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)  # in ASCII: a log's reader may know no other encoding


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Write a line."""
    LOG.log(level, event, extra={"fields": fields})


def to_standard_error() -> None:
    """Send the server's own lines, and uvicorn's complaints, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO if name == LOG.name else logging.WARNING)
        logger.propagate = False


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

    def __init__(self, app: ASGIApp, app_state: AppState, api_key: str | None = None) -> None:
        self._app = app
        self._app_state = app_state
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(self._app_state, scope, send)
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

    def __init__(self, app_state: AppState, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.id = given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        self.status: int | None = None
        self._app_state = app_state
        self._scope = scope
        self._send = send
        self._started_s = time.monotonic()
        self._fields: dict[str, Any] = {}
        config = app_state.served.config
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
            self._app_state.metrics.refused(status)
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
        if self._app_state.served.config.log_prompts:
            self._fields["prompt"] = prompt
