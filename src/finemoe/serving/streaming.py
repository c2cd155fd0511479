"""Responses from pieces of text: one JSON object, or server-sent events; and log probabilities as objects."""

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
from finemoe.serving.request import ClientDisconnected, RequestRun
from finemoe.serving.structured_output import GrammarVocabulary

_JSON = "application/json"
_DONE = "data: [DONE]\n\n"
_SEND_GRACE_S = 30.0  # for slow readers, after the request's own timeout
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for the log; the client is gone
_MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI uses this value too


class ResponseShape(Protocol):
    """Builds the response objects of an endpoint from pieces of text."""

    def first_chunks(self) -> Iterable[BaseModel]:
        """Stream chunks before the first piece."""

    def chunks(self, piece: TextPiece) -> Iterable[BaseModel]:
        """The stream chunks of a piece."""

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The last chunk of a stream with `include_usage`."""

    def response(self, pieces: Sequence[Sequence[TextPiece]], usage: Usage) -> BaseModel:
        """The response without streaming, from all pieces of each choice."""


async def respond(
    request: Request, run: RequestRun, shape: ResponseShape, *, choices: int, stream: bool, include_usage: bool
) -> Response:
    """Waits for the answers, or streams them. `run` must be started; it is closed in any case."""
    if stream:
        return EventStream(_events(run, shape, include_usage=include_usage), run, request)
    pieces: list[list[TextPiece]] = [[] for _ in range(choices)]
    try:
        async for piece in run.pieces():
            if piece is not None:
                pieces[piece.choice].append(piece)
    except ClientDisconnected:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        run.close("cancelled")
        _log_outcome(request, run)
    return Response(shape.response(pieces, _usage(run)).model_dump_json(exclude_unset=True), 200, None, _JSON)


class EventStream(Response):
    """Server-sent events. Closes the request's run however the response ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], run: RequestRun, request: Request) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._run = run
        self._request = request

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Sends all events; gives up on clients that read too slowly."""
        try:
            async with asyncio.timeout(self._run.timeout_s + _SEND_GRACE_S):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return
        finally:
            self._run.close("cancelled")
            _log_outcome(self._request, self._run)


async def _events(run: RequestRun, shape: ResponseShape, *, include_usage: bool) -> AsyncIterator[str]:
    try:
        for chunk in shape.first_chunks():
            yield _data(chunk)
        async for piece in run.pieces():
            if piece is None:
                yield ": still running\n\n"  # a comment: keeps proxies from closing an idle connection
                continue
            for chunk in shape.chunks(piece):
                yield _data(chunk)
        if include_usage:
            yield _data(shape.usage_chunk(_usage(run)))
        yield _DONE
    except ApiError as error:  # the status line has already been sent
        yield f"data: {json.dumps(error.body())}\n\n"
    except ClientDisconnected:
        return


def _data(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def _usage(run: RequestRun) -> Usage:
    prompt, completion = run.timings.prompt_tokens, run.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _log_outcome(request: Request, run: RequestRun) -> None:
    """Adds the outcome, token counts and time to first token to the request's log line."""
    timings = run.timings
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
        fields["answers"] = run.texts


def chat_logprobs(vocabulary: GrammarVocabulary, tokens: Sequence[TokenText]) -> ChatLogprobs:
    """Log probabilities in the format of chat completions."""
    return ChatLogprobs(content=[_chat_logprob(vocabulary, each) for each in tokens], refusal=None)


def _chat_logprob(vocabulary: GrammarVocabulary, token_text: TokenText) -> ChatLogprob:
    token = token_text.token
    return ChatLogprob(
        token=vocabulary.text(token.id),
        logprob=_finite(token.logprob),
        bytes=list(vocabulary.bytes(token.id)),
        top_logprobs=[
            TopLogprob(token=vocabulary.text(i), logprob=_finite(logprob), bytes=list(vocabulary.bytes(i)))
            for i, logprob in token.top_logprobs
        ],
    )


def completion_logprobs(vocabulary: GrammarVocabulary, tokens: Sequence[TokenText]) -> CompletionLogprobs:
    """Log probabilities in the format of completions."""
    return CompletionLogprobs(
        text_offset=[each.start for each in tokens],
        token_logprobs=[_finite(each.token.logprob) for each in tokens],
        tokens=[vocabulary.text(each.token.id) for each in tokens],
        top_logprobs=[
            {vocabulary.text(i): _finite(logprob) for i, logprob in reversed(each.token.top_logprobs)}
            for each in tokens
        ],
    )


def _finite(logprob: float | None) -> float:
    return max(_MIN_LOGPROB, logprob) if logprob is not None else _MIN_LOGPROB
