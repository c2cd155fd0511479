"""Tool calls: recognised in chat templates, forced by grammars, parsed from answers."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from finemoe.serving.detokenizer import StopStrings
from finemoe.serving.protocol import Function, FunctionCall, MessageToolCall
from finemoe.serving.structured_output import JSON_WHITESPACE

_OPENING_TAG = "<tool_call>"
_CALLS = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_OTHER_NOTATIONS = re.compile(r"<function=|<arg_key>|<parameter=")  # the same tag around something other than JSON


def supports_tools(template: str) -> bool:
    """Whether a chat template describes tools to the model in the supported notation: JSON in `<tool_call>` tags."""
    return "tools" in template and _OPENING_TAG in template and not _OTHER_NOTATIONS.search(template)


def tool_call_grammar(functions: Sequence[Function]) -> str:
    """A grammar, in llguidance's variant of Lark, of one call of any of `functions`."""
    alternatives = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": function.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": JSON_WHITESPACE,
        }
        for function in functions
    ]
    schema = alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives, "x-guidance": JSON_WHITESPACE}
    return f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {json.dumps(schema)}\n'


def parse_tool_calls(text: str, *, first_only: bool = False) -> tuple[str, list[MessageToolCall]]:
    """Splits a complete answer into its text and its tool calls. If any call is malformed, all of it is text.

    Args:
        text: the answer.
        first_only: drop all calls but the first.
    """
    content, opened, _ = text.partition(_OPENING_TAG)
    if not opened:
        return text, []
    parsed = [_parse_call(block) for block in _CALLS.findall(text)]
    calls = [call for call in parsed if call is not None]
    if len(calls) < len(parsed):
        return text, []
    kept = calls[:1] if first_only else calls
    return content.rstrip(), [call.model_copy(update={"index": i}) for i, call in enumerate(kept)]


def _parse_call(block: str) -> MessageToolCall | None:
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


class ToolCallParser:
    """Parses a streamed answer: passes on the text before the first call, and returns the calls at the end.

    Args:
        first_only: drop all calls but the first.
    """

    def __init__(self, *, first_only: bool = False) -> None:
        self._tag = StopStrings([_OPENING_TAG])
        self._first_only = first_only
        self._opened = False
        self._text = ""
        self._emitted = 0  # characters

    def feed(self, piece: str) -> str:
        """The text that can be emitted now."""
        self._text += piece
        if self._opened:
            return ""
        text, self._opened = self._tag.feed(piece)
        self._emitted += len(text)
        return text

    def finish(self) -> tuple[str, list[MessageToolCall]]:
        """The rest of the text, and the calls of the complete answer."""
        content, calls = parse_tool_calls(self._text, first_only=self._first_only)
        return content[self._emitted :], calls
