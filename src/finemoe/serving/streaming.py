"""From pieces to a response: all at once, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from finemoe.serving.detokenizer import TextPiece, TokenText
from finemoe.serving.errors import ApiError
from finemoe.serving.protocol import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob, Usage
from finemoe.serving.request import ClientGone, RequestRun
from finemoe.serving.structured_output import GrammarVocabulary

_LINGER_S = 30.0  # for a slow reader, once everything was said
_NOBODY = 499  # a client that went away hears no status; the log shows this one
_DONE = "data: [DONE]\n\n"


class ResponseShape(Protocol):
    """How an endpoint puts an answer."""

    def opening(self) -> Iterable[BaseModel]:
        """Chunks before the first piece."""

    def chunks(self, piece: TextPiece) -> Iterable[BaseModel]:
        """A piece, as chunks of a stream."""

    def count(self, usage: Usage) -> BaseModel:
        """The last chunk of a stream that counts tokens."""

    def whole(self, pieces: Sequence[Sequence[TextPiece]], usage: Usage) -> BaseModel:
        """The pieces of each choice, as one object."""


async def respond(
    request: Request, running: RequestRun, shape: ResponseShape, *, choices: int, stream: bool, include_usage: bool
) -> Response:
    """Wait for the answers, or stream them. `running` was started; it is closed here in any case."""
    if stream:
        return EventStream(_events(running, shape, include_usage=include_usage), running, request)
    pieces: list[list[TextPiece]] = [[] for _ in range(choices)]
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


def note(request: Request, running: RequestRun) -> None:
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

    def __init__(self, events: AsyncIterator[str], running: RequestRun, request: Request) -> None:
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


async def _events(running: RequestRun, shape: ResponseShape, *, include_usage: bool) -> AsyncIterator[str]:
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


def _usage(running: RequestRun) -> Usage:
    prompt, completion = running.timings.prompt_tokens, running.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


_LEAST = -9999.0  # JSON has no infinity; OpenAI's stand-in


def chat_logprobs(vocabulary: GrammarVocabulary, said: Sequence[TokenText]) -> ChatLogprobs:
    """Of a chat's tokens."""
    return ChatLogprobs(content=[_chat_logprob(vocabulary, one) for one in said], refusal=None)


def _chat_logprob(vocabulary: GrammarVocabulary, said: TokenText) -> ChatLogprob:
    token = said.token
    return ChatLogprob(
        token=vocabulary.text(token.id),
        logprob=_finite(token.logprob),
        bytes=list(vocabulary.bytes(token.id)),
        top_logprobs=[
            TopLogprob(token=vocabulary.text(i), logprob=_finite(logprob), bytes=list(vocabulary.bytes(i)))
            for i, logprob in token.likeliest
        ],
    )


def completion_logprobs(vocabulary: GrammarVocabulary, said: Sequence[TokenText]) -> CompletionLogprobs:
    """Of a completion's tokens."""
    return CompletionLogprobs(
        text_offset=[one.start for one in said],
        token_logprobs=[_finite(one.token.logprob) for one in said],
        tokens=[vocabulary.text(one.token.id) for one in said],
        top_logprobs=[
            {vocabulary.text(i): _finite(logprob) for i, logprob in reversed(one.token.likeliest)} for one in said
        ],
    )


def _finite(logprob: float | None) -> float:
    return max(_LEAST, logprob) if logprob is not None else _LEAST
