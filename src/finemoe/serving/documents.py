"""What the OpenAPI document says of responses."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from finemoe.serving.errors import ErrorBody

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
