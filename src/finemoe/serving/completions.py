"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from finemoe.serving.answer import Piece, Said
from finemoe.serving.body import JsonRoute
from finemoe.serving.documents import refusals, streamed
from finemoe.serving.fingerprint import FINGERPRINT
from finemoe.serving.house import House
from finemoe.serving.jobs import answer_tokens, plan, refuse_other_model
from finemoe.serving.logprobs import completion_logprobs
from finemoe.serving.objects import Completion, CompletionChoice, CompletionLogprobs, FinishReason, Usage
from finemoe.serving.parameters import CompletionRequest
from finemoe.serving.stream import respond

_DEFAULT_TOKENS = 16  # OpenAI's


def routes(house: House) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/v1/completions", responses=streamed(Completion) | refusals(400, 401, 404, 413, 415, 429, 500, 503, 504)
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, or several."""
        served = house.served
        refuse_other_model(served, body)
        house.admission.check(len(body.prompts) * (body.n or 1))  # before the work of making prompts
        request.state.remember(user=body.user, prompt=body.prompts)
        prompts = [await house.prompts.text(prompt) for prompt in body.prompts]
        max_tokens = answer_tokens(served, body.max_tokens, _DEFAULT_TOKENS, max(map(len, prompts)), "max_tokens")
        if body.logprobs is not None:
            await house.prompts.run(lambda: served.vocabulary.prepare("logprobs"))
        jobs, answers = plan(served, body, prompts, max_tokens, body.logprobs)
        running = house.run(request, jobs, answers, sum(map(len, prompts)))
        shape = CompletionShape(house, body)
        return await respond(
            request, running, shape, choices=len(jobs), stream=bool(body.stream), include_usage=body.include_usage
        )

    return router


class CompletionShape:
    """A completion's `Shape`.

    Args:
        house: of the server.
        body: the request.
    """

    def __init__(self, house: House, body: CompletionRequest) -> None:
        self._vocabulary = None if body.logprobs is None else house.served.vocabulary
        self._include_usage = body.include_usage
        self._common: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": house.served.name,
            "system_fingerprint": FINGERPRINT,
        }

    def opening(self) -> Iterator[Completion]:
        return iter(())

    def chunks(self, piece: Piece) -> Iterator[Completion]:
        counted: dict[str, Any] = {"usage": None} if self._include_usage else {}
        choice = self._choice(piece.choice, piece.text, piece.said, piece.finish)
        yield Completion(**self._common, choices=[choice], **counted)

    def count(self, usage: Usage) -> Completion:
        return Completion(**self._common, choices=[], usage=usage)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> Completion:
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

    def _choice(self, index: int, text: str, said: Sequence[Said], finish: FinishReason | None) -> CompletionChoice:
        logprobs: CompletionLogprobs | None = None
        if self._vocabulary is not None:
            logprobs = completion_logprobs(self._vocabulary, said)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)
