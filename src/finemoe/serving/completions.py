"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from finemoe.serving.detokenizer import TextPiece, TokenText
from finemoe.serving.errors import error_responses, stream_responses
from finemoe.serving.middleware import JsonRoute
from finemoe.serving.model_info import SYSTEM_FINGERPRINT
from finemoe.serving.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    FinishReason,
    Usage,
)
from finemoe.serving.state import AppState, check_model, make_jobs, resolve_max_tokens
from finemoe.serving.streaming import completion_logprobs, respond

_DEFAULT_MAX_TOKENS = 16  # OpenAI's default


def routes(app_state: AppState) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/v1/completions",
        responses=stream_responses(Completion) | error_responses(400, 401, 404, 413, 415, 429, 500, 503, 504),
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several texts."""
        served = app_state.served
        check_model(served, body)
        app_state.admission.check(len(body.prompts) * (body.n or 1))  # before the cost of encoding
        request.state.log_request(user=body.user, prompt=body.prompts)
        prompts = [await app_state.prompts.text(prompt) for prompt in body.prompts]
        longest = max(map(len, prompts))
        max_tokens = resolve_max_tokens(served, body.max_tokens, _DEFAULT_MAX_TOKENS, longest, "max_tokens")
        if body.logprobs is not None:
            await app_state.prompts.run(lambda: served.vocabulary.prepare("logprobs"))
        jobs, outputs = make_jobs(served, body, prompts, max_tokens, body.logprobs)
        run = app_state.run(request, jobs, outputs, sum(map(len, prompts)))
        shape = CompletionShape(app_state, body)
        return await respond(
            request, run, shape, choices=len(jobs), stream=bool(body.stream), include_usage=body.include_usage
        )

    return router


class CompletionShape:
    """The `ResponseShape` of completions.

    Args:
        app_state: of the server.
        body: the request.
    """

    def __init__(self, app_state: AppState, body: CompletionRequest) -> None:
        self._vocabulary = None if body.logprobs is None else app_state.served.vocabulary
        self._include_usage = body.include_usage
        self._common: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": app_state.served.name,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }

    def first_chunks(self) -> Iterator[Completion]:
        return iter(())

    def chunks(self, piece: TextPiece) -> Iterator[Completion]:
        usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        choice = self._choice(piece.choice, piece.text, piece.tokens, piece.finish)
        yield Completion(**self._common, choices=[choice], **usage)

    def usage_chunk(self, usage: Usage) -> Completion:
        return Completion(**self._common, choices=[], usage=usage)

    def response(self, pieces: Sequence[Sequence[TextPiece]], usage: Usage) -> Completion:
        choices = [
            self._choice(
                index,
                "".join(piece.text for piece in own),
                [token for piece in own for token in piece.tokens],
                own[-1].finish,
            )
            for index, own in enumerate(pieces)
        ]
        return Completion(**self._common, choices=choices, usage=usage)

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenText], finish: FinishReason | None
    ) -> CompletionChoice:
        logprobs: CompletionLogprobs | None = None
        if self._vocabulary is not None:
            logprobs = completion_logprobs(self._vocabulary, tokens)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)
