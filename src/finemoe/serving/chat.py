"""`POST /v1/chat/completions`."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from finemoe.serving.detokenizer import StopStrings, TextPiece, TokenText
from finemoe.serving.errors import bad_value, refusals, streamed
from finemoe.serving.middleware import JsonRoute
from finemoe.serving.model_info import FINGERPRINT
from finemoe.serving.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    FinishReason,
    Function,
    FunctionCall,
    JsonObject,
    JsonSchemaFormat,
    MessageToolCall,
    Usage,
)
from finemoe.serving.state import AppState, answer_tokens, plan, refuse_other_model
from finemoe.serving.streaming import chat_logprobs, respond
from finemoe.serving.structured_output import LAYOUT, Grammar

_OPEN = "<tool_call>"
_BLOCKS = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_OTHER_WRITING = re.compile(r"<function=|<arg_key>|<parameter=")  # the same tag around something that is no JSON


def teaches_calls(template: str) -> bool:
    """Whether a chat template tells the model of tools, in the one notation that is read here."""
    return "tools" in template and _OPEN in template and not _OTHER_WRITING.search(template)


def split_calls(text: str, *, one: bool = False) -> tuple[str, list[MessageToolCall]]:
    """What an answer says, and what it calls. What can't be read as calls is left as text.

    Args:
        text: a whole answer.
        one: keep the first call alone.
    """
    said, opened, _ = text.partition(_OPEN)
    if not opened:
        return text, []
    calls = [_call(block) for block in _BLOCKS.findall(text)]
    known = [call for call in calls if call is not None]
    if len(known) < len(calls):
        return text, []
    return said.rstrip(), [call.model_copy(update={"index": i}) for i, call in enumerate(known[:1] if one else known)]


def must_call(functions: Sequence[Function]) -> str:
    """A grammar, in llguidance's dialect of Lark, of a call of one of `functions`."""
    alternatives = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": function.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": LAYOUT,
        }
        for function in functions
    ]
    schema = alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives, "x-guidance": LAYOUT}
    return f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {json.dumps(schema)}\n'


class CallFilter:
    """Splits a streamed answer: text up to the first call as it comes, the calls when the answer has ended."""

    def __init__(self, *, one: bool = False) -> None:
        self._watch = StopStrings([_OPEN])
        self._one = one
        self._opened = False
        self._text = ""
        self._shown = 0

    def feed(self, piece: str) -> str:
        """Text that may be shown now."""
        self._text += piece
        if self._opened:
            return ""
        text, self._opened = self._watch.feed(piece)
        self._shown += len(text)
        return text

    def end(self) -> tuple[str, list[MessageToolCall]]:
        """What is left to show, and the calls; nothing follows."""
        said, calls = split_calls(self._text, one=self._one)
        return said[self._shown :], calls


def _call(block: str) -> MessageToolCall | None:
    try:
        given: Any = json.loads(block)
        name, arguments = given["name"], given.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return MessageToolCall(
        id=f"call_{uuid.uuid4().hex[:24]}", type="function", function=FunctionCall(name=name, arguments=text)
    )


def routes(app_state: AppState) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/v1/chat/completions",
        responses=streamed(ChatCompletion) | refusals(400, 401, 404, 413, 415, 429, 500, 503, 504),
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        served = app_state.served
        refuse_other_model(served, body)
        app_state.admission.check(body.n or 1)  # before the work of making a prompt
        tools = body.tools if body.tool_choice != "none" else None
        if tools and not teaches_calls(_template(served.tokenizer)):
            raise bad_value("tools", "this model's chat template has none, or in a notation that is not read here")
        request.state.remember(user=body.user, prompt=[message.text for message in body.messages])
        ids = await app_state.prompts.chat(body.messages, tools)
        param = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
        max_tokens = answer_tokens(served, body.tokens_asked, served.config.max_output_tokens, len(ids), param)
        grammar = await app_state.prompts.run(lambda: _prepare(app_state, body))
        jobs, answers = plan(served, body, [ids], max_tokens, body.likeliest, grammar)
        running = app_state.run(request, jobs, answers, len(ids))
        shape = ChatShape(app_state, body, calls=bool(tools))
        return await respond(
            request, running, shape, choices=len(jobs), stream=bool(body.stream), include_usage=body.include_usage
        )

    return router


def _template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=[{}]))
    except ValueError:
        return ""


def _prepare(app_state: AppState, body: ChatRequest) -> Grammar | None:
    """What takes a moment, off the event loop: the vocabulary where it is needed, and the grammar."""
    if body.logprobs:
        app_state.served.vocabulary.prepare("logprobs")
    if functions := body.must_call:
        return app_state.served.vocabulary.lark(must_call(functions), "tools")
    match body.response_format:
        case JsonObject():
            return app_state.served.vocabulary.json({"type": "object"}, "response_format")
        case JsonSchemaFormat(json_schema=given):
            return app_state.served.vocabulary.json(given.schema_, "response_format.json_schema.schema")
    return None


class ChatShape:
    """A chat's `ResponseShape`.

    Args:
        house: of the server.
        body: the request.
        calls: whether the answer may hold calls of functions.
    """

    def __init__(self, app_state: AppState, body: ChatRequest, *, calls: bool) -> None:
        self._vocabulary = app_state.served.vocabulary if body.logprobs else None
        self._choices = body.n or 1
        self._include_usage = body.include_usage
        self._one = body.parallel_tool_calls is False
        self._calls = calls
        self._filters = [CallFilter(one=self._one) for _ in range(self._choices)] if calls else []
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": app_state.served.name,
            "system_fingerprint": FINGERPRINT,
        }

    def opening(self) -> Iterator[ChatChunk]:
        for choice in range(self._choices):
            yield self._chunk(choice, AssistantMessage(role="assistant", content="", refusal=None), None, None)

    def chunks(self, piece: TextPiece) -> Iterator[ChatChunk]:
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

    def whole(self, pieces: Sequence[Sequence[TextPiece]], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            **self._common,
            object="chat.completion",
            choices=[self._choice(i, made) for i, made in enumerate(pieces)],
            usage=usage,
        )

    def _choice(self, index: int, pieces: Sequence[TextPiece]) -> ChatChoice:
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

    def _logprobs(self, said: Sequence[TokenText]) -> ChatLogprobs | None:
        return None if self._vocabulary is None else chat_logprobs(self._vocabulary, said)

    def _chunk(
        self, index: int, delta: AssistantMessage, logprobs: ChatLogprobs | None, finish: FinishReason | None
    ) -> ChatChunk:
        counted: dict[str, Any] = {"usage": None} if self._include_usage else {}
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**self._common, object="chat.completion.chunk", choices=[choice], **counted)


def _delta(**fields: Any) -> AssistantMessage:
    return AssistantMessage(**fields)
