"""Error responses in OpenAI's shape, and their OpenAPI descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_MAX_MESSAGE_LENGTH = 1000  # characters; a message may quote the request
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}
ResponseDocs = dict[int | str, dict[str, Any]]  # FastAPI's `responses` argument


class ErrorDetail(BaseModel):
    """An error; `param` is the path of the parameter, such as `messages[0].content`."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error response with OpenAI's fields.

    Args:
        status: HTTP status.
        message: one sentence for people.
        param: the parameter at fault, or `None`.
        code: for programs, or `None`.
        headers: extra headers of the response.
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
        # text quoted from the request may contain surrogates, which can't be encoded
        message = self.detail.encode("utf-8", "replace").decode()[:_MAX_MESSAGE_LENGTH]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def bad_value(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400 for a parameter whose value is invalid."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def model_failed() -> ApiError:
    """503: the model thread has ended; the server must be restarted."""
    return ApiError(503, "the model's thread has failed; restart the server, its log says why", code="model_failed")


def error_responses(*statuses: int) -> ResponseDocs:
    """OpenAPI descriptions of error statuses, all with an `ErrorBody`."""
    errors: ResponseDocs = {
        status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in statuses
    }
    # replaces FastAPI's 422, which is never sent
    return errors | {"4XX": {"model": ErrorBody, "description": "Any other refusal"}}


def stream_responses(model: type[BaseModel]) -> ResponseDocs:
    """OpenAPI description of a response that is either a `model` object or server-sent events."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    events = {"text/event-stream": {"itemSchema": event}}  # OpenAPI 3.2's key for the items of a stream
    return {200: {"model": model, "content": events, "description": "The answer; with stream: true as events"}}


async def on_http_exception(_: Request, error: Exception) -> JSONResponse:
    """Exception handler for `ApiError` and Starlette's own errors (404, 405)."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        code = _CODES.get(error.status_code)
        error = ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
    return error.response()


async def on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    """Exception handler for pydantic's validation errors; reports the first one."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    same_field = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
    # a union reports an error for each alternative: the one that matched deepest is the one that was meant
    first = max(same_field, key=lambda each: (_depth(each, error.body), not each["type"].endswith("_type")))
    location = first["loc"]
    if location[0] == "query" and len(location) > 1:
        param: str | None = str(location[1])
    else:
        param = parameter_path(_body_path(first), error.body)
    match first["type"]:
        case "extra_forbidden":
            response = ApiError(400, f"{param}: is not supported; leave it out", param=param, code="unknown_parameter")
        case "missing" if param is None:
            response = ApiError(400, "a JSON body is required", code="invalid_json")
        case "missing":
            response = ApiError(400, f"{param}: is required", param=param, code="missing_required_parameter")
        case "inconsistent":
            message = first["msg"]
            response = ApiError(400, message, param=message.partition(":")[0], code="invalid_value")
        case kind:
            wrong_type = kind.endswith("_type")
            response = ApiError(
                400,
                f"{param or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}",
                param=param,
                code="invalid_type" if wrong_type else "invalid_value",
            )
    return response.response()


def parameter_path(location: Sequence[int | str], body: Any) -> str | None:
    """The path of a parameter as the client would write it: `messages[0].content`; `None` for the whole body.

    pydantic's locations also name the alternatives of unions. Parts that are not keys of `body` are therefore left
    out, except the last one: the name of a missing key.
    """
    path = ""
    for part in location:
        if isinstance(body, list) and isinstance(part, int) and part < len(body):
            path, body = f"{path}[{part}]", body[part]
        elif isinstance(body, dict) and isinstance(part, str):
            known = part in body
            if known or part == location[-1]:
                path = f"{path}.{part}" if path else part
            body = body[part] if known else body
    return path or None


def _body_path(error: Any) -> Sequence[int | str]:
    location: Sequence[int | str] = error["loc"]
    return location[1:] if location[:1] == ("body",) else location


def _depth(error: Any, body: Any) -> int:
    path = parameter_path(_body_path(error), body) or ""
    return path.count(".") + path.count("[")
