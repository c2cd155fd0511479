"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from finemoe.serving.answer import Piece, Said
from finemoe.serving.body import JsonRoute
from finemoe.serving.documents import refusals, streamed
from finemoe.serving.errors import bad_value
from finemoe.serving.fingerprint import FINGERPRINT
from finemoe.serving.grammar import Grammar
from finemoe.serving.house import House
from finemoe.serving.jobs import answer_tokens, plan, refuse_other_model
from finemoe.serving.logprobs import chat_logprobs
from finemoe.serving.objects import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    FinishReason,
    MessageToolCall,
    Usage,
)
from finemoe.serving.parameters import ChatRequest, JsonObject, JsonSchemaFormat
from finemoe.serving.stream import respond
from finemoe.serving.tools import CallFilter, must_call, split_calls, teaches_calls


def routes(house: House) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/v1/chat/completions",
        responses=streamed(ChatCompletion) | refusals(400, 401, 404, 413, 415, 429, 500, 503, 504),
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        served = house.served
        refuse_other_model(served, body)
        house.admission.check(body.n or 1)  # before the work of making a prompt
        tools = body.tools if body.tool_choice != "none" else None
        if tools and not teaches_calls(_template(served.tokenizer)):
            raise bad_value("tools", "this model's chat template has none, or in a notation that is not read here")
        request.state.remember(user=body.user, prompt=[message.text for message in body.messages])
        ids = await house.prompts.chat(body.messages, tools)
        param = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
        max_tokens = answer_tokens(served, body.tokens_asked, served.config.max_output_tokens, len(ids), param)
        grammar = await house.prompts.run(lambda: _prepare(house, body))
        jobs, answers = plan(served, body, [ids], max_tokens, body.likeliest, grammar)
        running = house.run(request, jobs, answers, len(ids))
        shape = ChatShape(house, body, calls=bool(tools))
        return await respond(
            request, running, shape, choices=len(jobs), stream=bool(body.stream), include_usage=body.include_usage
        )

    return router


def _template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=[{}]))
    except ValueError:
        return ""


def _prepare(house: House, body: ChatRequest) -> Grammar | None:
    """What takes a moment, off the event loop: the vocabulary where it is needed, and the grammar."""
    if body.logprobs:
        house.served.vocabulary.prepare("logprobs")
    if functions := body.must_call:
        return house.served.vocabulary.lark(must_call(functions), "tools")
    match body.response_format:
        case JsonObject():
            return house.served.vocabulary.json({"type": "object"}, "response_format")
        case JsonSchemaFormat(json_schema=given):
            return house.served.vocabulary.json(given.schema_, "response_format.json_schema.schema")
    return None


class ChatShape:
    """A chat's `Shape`.

    Args:
        house: of the server.
        body: the request.
        calls: whether the answer may hold calls of functions.
    """

    def __init__(self, house: House, body: ChatRequest, *, calls: bool) -> None:
        self._vocabulary = house.served.vocabulary if body.logprobs else None
        self._choices = body.n or 1
        self._include_usage = body.include_usage
        self._one = body.parallel_tool_calls is False
        self._calls = calls
        self._filters = [CallFilter(one=self._one) for _ in range(self._choices)] if calls else []
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": house.served.name,
            "system_fingerprint": FINGERPRINT,
        }

    def opening(self) -> Iterator[ChatChunk]:
        for choice in range(self._choices):
            yield self._chunk(choice, AssistantMessage(role="assistant", content="", refusal=None), None, None)

    def chunks(self, piece: Piece) -> Iterator[ChatChunk]:
        text, finish, calls = piece.text, piece.finish, list[MessageToolCall]()
        if self._calls:
            text = self._filters[piece.choice].feed(text)
            if finish:
                rest, calls = self._filters[piece.choice].end()
                text += rest
        logprobs = self._logprobs(piece.said)
        if text or (logprobs and logprobs.content):
            yield self._chunk(piece.choice, _delta(content=text), logprobs, None)
        if calls:
            yield self._chunk(piece.choice, _delta(tool_calls=calls), None, None)
        if finish:
            yield self._chunk(piece.choice, _delta(), None, "tool_calls" if calls else finish)

    def count(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self._common, object="chat.completion.chunk", choices=[], usage=usage)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            **self._common,
            object="chat.completion",
            choices=[self._choice(i, made) for i, made in enumerate(pieces)],
            usage=usage,
        )

    def _choice(self, index: int, pieces: Sequence[Piece]) -> ChatChoice:
        text, calls = "".join(piece.text for piece in pieces), list[MessageToolCall]()
        if self._calls:
            text, calls = split_calls(text, one=self._one)
        message = AssistantMessage(role="assistant", content=text, refusal=None)
        if calls:
            plain = [call.model_copy() for call in calls]
            for call in plain:
                call.model_fields_set.discard("index")
            message = AssistantMessage(role="assistant", content=text or None, refusal=None, tool_calls=plain)
        finish = pieces[-1].finish
        assert finish is not None
        return ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs([said for piece in pieces for said in piece.said]),
            finish_reason="tool_calls" if calls else finish,
        )

    def _logprobs(self, said: Sequence[Said]) -> ChatLogprobs | None:
        return None if self._vocabulary is None else chat_logprobs(self._vocabulary, said)

    def _chunk(
        self, index: int, delta: AssistantMessage, logprobs: ChatLogprobs | None, finish: FinishReason | None
    ) -> ChatChunk:
        counted: dict[str, Any] = {"usage": None} if self._include_usage else {}
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**self._common, object="chat.completion.chunk", choices=[choice], **counted)


def _delta(**fields: Any) -> AssistantMessage:
    return AssistantMessage(**fields)
