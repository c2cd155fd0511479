"""From pieces to a response: all at once, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from finemoe.serving.answer import Piece
from finemoe.serving.errors import ApiError
from finemoe.serving.objects import Usage
from finemoe.serving.running import ClientGone, Running

_LINGER_S = 30.0  # for a slow reader, once everything was said
_NOBODY = 499  # a client that went away hears no status; the log shows this one
_DONE = "data: [DONE]\n\n"


class Shape(Protocol):
    """How an endpoint puts an answer."""

    def opening(self) -> Iterable[BaseModel]:
        """Chunks before the first piece."""

    def chunks(self, piece: Piece) -> Iterable[BaseModel]:
        """A piece, as chunks of a stream."""

    def count(self, usage: Usage) -> BaseModel:
        """The last chunk of a stream that counts tokens."""

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> BaseModel:
        """The pieces of each choice, as one object."""


async def respond(
    request: Request, running: Running, shape: Shape, *, choices: int, stream: bool, include_usage: bool
) -> Response:
    """Wait for the answers, or stream them. `running` was started; it is closed here in any case."""
    if stream:
        return EventStream(_events(running, shape, include_usage=include_usage), running, request)
    pieces: list[list[Piece]] = [[] for _ in range(choices)]
    try:
        async for piece in running.pieces():
            if piece is not None:
                pieces[piece.choice].append(piece)
    except ClientGone:
        return Response(status_code=_NOBODY)
    finally:
        running.close("cancelled")
        note(request, running)
    return Response(shape.whole(pieces, _usage(running)).model_dump_json(exclude_unset=True), 200, None, JSON)


JSON = "application/json"


def note(request: Request, running: Running) -> None:
    """What a request came to, for the log."""
    timings = running.timings
    fields: dict[str, Any] = request.state.fields
    fields |= {
        "outcome": timings.outcome,
        "prompt_tokens": timings.prompt_tokens,
        "completion_tokens": timings.completion_tokens,
    }
    if timings.ttft_s:
        fields["ttft_s"] = round(min(timings.ttft_s), 4)
    if timings.message:
        fields["error"] = timings.message
    if request.state.log_prompts:
        fields["answers"] = running.texts


class EventStream(Response):
    """Server-sent events. However it ends, the jobs behind it do too."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], running: Running, request: Request) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._running = running
        self._request = request

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Sends everything; a client that reads too slowly is dropped."""
        try:
            async with asyncio.timeout(self._running.timeout_s + _LINGER_S):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return
        finally:
            self._running.close("cancelled")
            note(self._request, self._running)


async def _events(running: Running, shape: Shape, *, include_usage: bool) -> AsyncIterator[str]:
    try:
        for chunk in shape.opening():
            yield _data(chunk)
        async for piece in running.pieces():
            if piece is None:
                yield ": still running\n\n"  # a comment, so that no proxy takes the connection for dead
                continue
            for chunk in shape.chunks(piece):
                yield _data(chunk)
        if include_usage:
            yield _data(shape.count(_usage(running)))
        yield _DONE
    except ApiError as error:  # the status was sent long ago
        yield f"data: {json.dumps(error.body())}\n\n"
    except ClientGone:
        return


def _data(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def _usage(running: Running) -> Usage:
    prompt, completion = running.timings.prompt_tokens, running.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
