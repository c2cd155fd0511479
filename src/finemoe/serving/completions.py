"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from finemoe.serving.detokenizer import TextPiece, TokenText
from finemoe.serving.errors import refusals, streamed
from finemoe.serving.middleware import JsonRoute
from finemoe.serving.model_info import FINGERPRINT
from finemoe.serving.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    FinishReason,
    Usage,
)
from finemoe.serving.state import AppState, answer_tokens, plan, refuse_other_model
from finemoe.serving.streaming import completion_logprobs, respond

_DEFAULT_TOKENS = 16  # OpenAI's


def routes(app_state: AppState) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/v1/completions", responses=streamed(Completion) | refusals(400, 401, 404, 413, 415, 429, 500, 503, 504)
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, or several."""
        served = app_state.served
        refuse_other_model(served, body)
        app_state.admission.check(len(body.prompts) * (body.n or 1))  # before the work of making prompts
        request.state.remember(user=body.user, prompt=body.prompts)
        prompts = [await app_state.prompts.text(prompt) for prompt in body.prompts]
        max_tokens = answer_tokens(served, body.max_tokens, _DEFAULT_TOKENS, max(map(len, prompts)), "max_tokens")
        if body.logprobs is not None:
            await app_state.prompts.run(lambda: served.vocabulary.prepare("logprobs"))
        jobs, answers = plan(served, body, prompts, max_tokens, body.logprobs)
        running = app_state.run(request, jobs, answers, sum(map(len, prompts)))
        shape = CompletionShape(app_state, body)
        return await respond(
            request, running, shape, choices=len(jobs), stream=bool(body.stream), include_usage=body.include_usage
        )

    return router


class CompletionShape:
    """A completion's `ResponseShape`.

    Args:
        house: of the server.
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
            "system_fingerprint": FINGERPRINT,
        }

    def opening(self) -> Iterator[Completion]:
        return iter(())

    def chunks(self, piece: TextPiece) -> Iterator[Completion]:
        counted: dict[str, Any] = {"usage": None} if self._include_usage else {}
        choice = self._choice(piece.choice, piece.text, piece.said, piece.finish)
        yield Completion(**self._common, choices=[choice], **counted)

    def count(self, usage: Usage) -> Completion:
        return Completion(**self._common, choices=[], usage=usage)

    def whole(self, pieces: Sequence[Sequence[TextPiece]], usage: Usage) -> Completion:
        choices = [
            self._choice(
                index,
                "".join(piece.text for piece in made),
                [said for piece in made for said in piece.said],
                made[-1].finish,
            )
            for index, made in enumerate(pieces)
        ]
        return Completion(**self._common, choices=choices, usage=usage)

    def _choice(
        self, index: int, text: str, said: Sequence[TokenText], finish: FinishReason | None
    ) -> CompletionChoice:
        logprobs: CompletionLogprobs | None = None
        if self._vocabulary is not None:
            logprobs = completion_logprobs(self._vocabulary, said)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)
