"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from finemoe.serving.detokenizer import TextPiece, TokenText
from finemoe.serving.errors import bad_value, error_responses, stream_responses
from finemoe.serving.middleware import JsonRoute
from finemoe.serving.model_info import SYSTEM_FINGERPRINT
from finemoe.serving.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    FinishReason,
    JsonObject,
    JsonSchemaFormat,
    MessageToolCall,
    Usage,
)
from finemoe.serving.state import AppState, check_model, make_jobs, resolve_max_tokens
from finemoe.serving.streaming import chat_logprobs, respond
from finemoe.serving.structured_output import Grammar
from finemoe.serving.tool_calls import ToolCallParser, parse_tool_calls, supports_tools, tool_call_grammar


def routes(app_state: AppState) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/v1/chat/completions",
        responses=stream_responses(ChatCompletion) | error_responses(400, 401, 404, 413, 415, 429, 500, 503, 504),
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        served = app_state.served
        check_model(served, body)
        app_state.admission.check(body.n or 1)  # before the cost of encoding
        tools = body.tools if body.tool_choice != "none" else None
        if tools and not supports_tools(_template(served.tokenizer)):
            raise bad_value("tools", "this model's chat template has none, or in a notation that is not supported")
        request.state.log_request(user=body.user, prompt=[message.text for message in body.messages])
        ids = await app_state.prompts.chat(body.messages, tools)
        param = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
        default = served.config.max_output_tokens
        max_tokens = resolve_max_tokens(served, body.max_output_tokens, default, len(ids), param)
        grammar = await app_state.prompts.run(lambda: _prepare(app_state, body))
        jobs, outputs = make_jobs(served, body, [ids], max_tokens, body.num_top_logprobs, grammar)
        run = app_state.run(request, jobs, outputs, len(ids))
        shape = ChatShape(app_state, body, parse_tools=bool(tools))
        return await respond(
            request, run, shape, choices=len(jobs), stream=bool(body.stream), include_usage=body.include_usage
        )

    return router


def _template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=[{}]))
    except ValueError:
        return ""


def _prepare(app_state: AppState, body: ChatRequest) -> Grammar | None:
    """The request's grammar, if any; also prepares the vocabulary if it is needed. Slow: runs off the event loop."""
    vocabulary = app_state.served.vocabulary
    if body.logprobs:
        vocabulary.prepare("logprobs")
    if functions := body.required_functions:
        return vocabulary.lark(tool_call_grammar(functions), "tools")
    match body.response_format:
        case JsonObject():
            return vocabulary.json({"type": "object"}, "response_format")
        case JsonSchemaFormat(json_schema=given):
            return vocabulary.json(given.schema_, "response_format.json_schema.schema")
    return None


class ChatShape:
    """The `ResponseShape` of chat completions.

    Args:
        app_state: of the server.
        body: the request.
        parse_tools: whether the answer may contain tool calls.
    """

    def __init__(self, app_state: AppState, body: ChatRequest, *, parse_tools: bool) -> None:
        self._vocabulary = app_state.served.vocabulary if body.logprobs else None
        self._choices = body.n or 1
        self._include_usage = body.include_usage
        self._first_only = body.parallel_tool_calls is False
        self._parse_tools = parse_tools
        self._parsers = [ToolCallParser(first_only=self._first_only) for _ in range(self._choices)]
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": app_state.served.name,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }

    def first_chunks(self) -> Iterator[ChatChunk]:
        for choice in range(self._choices):
            yield self._chunk(choice, AssistantMessage(role="assistant", content="", refusal=None), None, None)

    def chunks(self, piece: TextPiece) -> Iterator[ChatChunk]:
        text, finish, calls = piece.text, piece.finish, list[MessageToolCall]()
        if self._parse_tools:
            text = self._parsers[piece.choice].feed(text)
            if finish:
                rest, calls = self._parsers[piece.choice].finish()
                text += rest
        logprobs = self._logprobs(piece.tokens)
        if text or (logprobs and logprobs.content):
            yield self._chunk(piece.choice, AssistantMessage(content=text), logprobs, None)
        if calls:
            yield self._chunk(piece.choice, AssistantMessage(tool_calls=calls), None, None)
        if finish:
            yield self._chunk(piece.choice, AssistantMessage(), None, "tool_calls" if calls else finish)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self._common, object="chat.completion.chunk", choices=[], usage=usage)

    def response(self, pieces: Sequence[Sequence[TextPiece]], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            **self._common,
            object="chat.completion",
            choices=[self._choice(i, own) for i, own in enumerate(pieces)],
            usage=usage,
        )

    def _choice(self, index: int, pieces: Sequence[TextPiece]) -> ChatChoice:
        text, calls = "".join(piece.text for piece in pieces), list[MessageToolCall]()
        if self._parse_tools:
            text, calls = parse_tool_calls(text, first_only=self._first_only)
        message = AssistantMessage(role="assistant", content=text, refusal=None)
        if calls:
            unindexed = [call.model_copy() for call in calls]  # only chunks have an index
            for call in unindexed:
                call.model_fields_set.discard("index")
            message = AssistantMessage(role="assistant", content=text or None, refusal=None, tool_calls=unindexed)
        finish = pieces[-1].finish
        assert finish is not None
        return ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs([token for piece in pieces for token in piece.tokens]),
            finish_reason="tool_calls" if calls else finish,
        )

    def _logprobs(self, tokens: Sequence[TokenText]) -> ChatLogprobs | None:
        return None if self._vocabulary is None else chat_logprobs(self._vocabulary, tokens)

    def _chunk(
        self, index: int, delta: AssistantMessage, logprobs: ChatLogprobs | None, finish: FinishReason | None
    ) -> ChatChunk:
        usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**self._common, object="chat.completion.chunk", choices=[choice], **usage)
