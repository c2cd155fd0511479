"""Request bodies: JSON alone, of a bounded size, read strictly."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from finemoe.serving.errors import ApiError


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
        given = Message()
        given["content-type"] = self.headers.get("content-type", "")
        if given.get_content_type() != "application/json":
            raise ApiError(415, "the body must be JSON; send Content-Type: application/json", code="not_json")
