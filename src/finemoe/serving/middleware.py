"""ASGI middleware: request ids, API key, error responses, request log. Also JSON bodies with a size limit."""

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

LOG = logging.getLogger("finemoe.serving")
_LOGGERS = ("finemoe.serving", "uvicorn.error")
_KEY_PREFIXES = ("/v1/", "/metrics")  # paths that need the API key
_GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
_VALID_REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


class ApiMiddleware:
    """Wraps the whole application. Plain ASGI, so that streams are passed on without buffering.

    Args:
        app: the wrapped application.
        app_state: of the server.
        api_key: required below `/v1/` and at `/metrics`; `None` for no key.
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
        record = _RequestLog(self._app_state, scope, send)
        try:
            self._check_api_key(scope)
            await self._app(scope, receive, record.send)
        except ApiError as error:
            await error.response()(scope, receive, record.send)
        except Exception:  # any other error becomes a 500; the server goes on
            LOG.exception("broken", extra={"fields": {"request_id": record.id}})
            if record.status is None:
                internal = ApiError(500, "internal error; see the server's log", code="internal_error")
                await internal.response()(scope, receive, record.send)
        finally:
            record.end()

    def _check_api_key(self, scope: Scope) -> None:
        if self._api_key is None or not _path(scope).startswith(_KEY_PREFIXES):
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        key = given.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key, self._api_key.encode()):
            raise ApiError(
                401,
                "this server requires an API key; send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class _RequestLog:
    """The id, status and log line of one request."""

    def __init__(self, app_state: AppState, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.id = given if _VALID_REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
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
            log_request=self._log_request,
        )

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)

    def end(self) -> None:
        """Write the log line, and count a refused generation request."""
        path, status = _path(self._scope), self.status or 0
        generates = self._scope["method"] == "POST" and path in _GENERATION_PATHS
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

    def _log_request(self, user: str | None, prompt: Any) -> None:
        """Adds the user and, with `--log-prompts`, the prompt to the log line."""
        if user is not None:
            self._fields["user"] = user
        if self._app_state.served.config.log_prompts:
            self._fields["prompt"] = prompt


def _path(scope: Scope) -> str:
    """The request's path relative to where the application is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


class JsonRoute(APIRoute):
    """A route whose body is read through `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


class JsonRequest(Request):
    """A request whose body must be JSON of limited size.

    Raises:
        ApiError: 415 for another content type, 413 for a body that is too long, 400 for invalid JSON.
    """

    _body_bytes: bytes | None = None

    async def body(self) -> bytes:
        if self._body_bytes is None:
            self._check_content_type()
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
            self._body_bytes = bytes(read)
        return self._body_bytes

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:  # also invalid UTF-8, lone surrogates and excessive nesting
            raise ApiError(400, f"the body is not JSON ({error})", code="invalid_json") from error

    def _check_content_type(self) -> None:
        given = ContentType()
        given["content-type"] = self.headers.get("content-type", "")
        if given.get_content_type() != "application/json":
            raise ApiError(415, "the body must be JSON; send Content-Type: application/json", code="not_json")


class JsonLines(logging.Formatter):
    """One JSON object per record: `time`, `level`, `event`, and the entries of `extra={"fields": {..}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)  # ASCII only, so that it can be read in any encoding


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Writes a line to the server's log."""
    LOG.log(level, event, extra={"fields": fields})


def log_to_stderr() -> None:
    """Sends the server's log and uvicorn's warnings to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO if name == LOG.name else logging.WARNING)
        logger.propagate = False
