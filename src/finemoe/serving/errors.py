"""What the API answers where it can't answer: OpenAI's shape, whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the path of the parameter, such as `messages[0].content`."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is no answer."""

    error: ErrorDetail


_LONGEST = 1000  # characters of a message: it may quote the request
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(HTTPException):
    """A refusal with OpenAI's fields.

    Args:
        status: of HTTP.
        message: one sentence for people.
        param: the parameter at fault.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """`{"error": {..}}`."""
        kind = _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        # a name or value from the request may hold what can't be written back
        message = self.detail.encode("utf-8", "replace").decode()[:_LONGEST]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def bad_value(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400, and the parameter whose value can't be used."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def model_failed() -> ApiError:
    """503: the thread that ran the model has ended; nothing but a restart helps."""
    return ApiError(503, "the model's thread has failed; restart the server, its log says why", code="model_failed")


async def on_http_exception(_: Request, error: Exception) -> JSONResponse:
    """Starlette's own refusals (404, 405) in the same shape."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        code = _CODES.get(error.status_code)
        error = ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
    return error.response()


async def on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    """The first thing that pydantic found wrong."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    rooted = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
    # a union names every alternative that did not fit: the one that fits the longest way is what was meant
    first = max(rooted, key=lambda one: (_depth(one, error.body), not one["type"].endswith("_type")))
    place = first["loc"]
    param = str(place[1]) if place[0] == "query" and len(place) > 1 else spell(_path(first), error.body)
    match first["type"]:
        case "extra_forbidden":
            refusal = ApiError(400, f"{param}: is not supported; leave it out", param=param, code="unknown_parameter")
        case "missing" if param is None:
            refusal = ApiError(400, "a JSON body is required", code="invalid_json")
        case "missing":
            refusal = ApiError(400, f"{param}: is required", param=param, code="missing_required_parameter")
        case "inconsistent":
            message = first["msg"]
            refusal = ApiError(400, message, param=message.partition(":")[0], code="invalid_value")
        case kind:
            wrong_type = kind.endswith("_type")
            refusal = ApiError(
                400,
                f"{param or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}",
                param=param,
                code="invalid_type" if wrong_type else "invalid_value",
            )
    return refusal.response()


def _path(found: Any) -> Sequence[int | str]:
    path: Sequence[int | str] = found["loc"]
    return path[1:] if path[:1] == ("body",) else path


def _depth(found: Any, given: Any) -> int:
    spelled = spell(_path(found), given) or ""
    return spelled.count(".") + spelled.count("[")


def spell(path: Sequence[int | str], given: Any) -> str | None:
    """A place in a request as its sender would write it: `messages[0].content`.

    pydantic's places also name the alternative of a union that it tried: what is no key of `given` is left out, but for
    the first such word where a key is missing.
    """
    spelled = ""
    for part in path:
        if isinstance(given, list) and isinstance(part, int) and part < len(given):
            spelled, given = f"{spelled}[{part}]", given[part]
        elif isinstance(given, dict) and isinstance(part, str):
            known = part in given
            if known or part == path[-1]:
                spelled = f"{spelled}.{part}" if spelled else part
            given = given[part] if known else given
    return spelled or None


Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """Statuses that come with an `ErrorBody`."""
    refused: Responses = {status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in statuses}
    # in place of FastAPI's own 422, which is never sent
    return refused | {"4XX": {"model": ErrorBody, "description": "Any other refusal"}}


def streamed(whole: type[BaseModel]) -> Responses:
    """An object, or server-sent events."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    events = {"text/event-stream": {"itemSchema": event}}  # OpenAPI 3.2's word for what a stream consists of
    return {200: {"model": whole, "content": events, "description": "The answer; with stream: true as events"}}
