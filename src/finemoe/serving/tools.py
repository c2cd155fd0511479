"""Calls of functions in an answer, as models write them whose chat template teaches `<tool_call>{json}</tool_call>`."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from finemoe.serving.grammar import LAYOUT
from finemoe.serving.objects import FunctionCall, MessageToolCall
from finemoe.serving.parameters import Function
from finemoe.serving.text import StopStrings

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
