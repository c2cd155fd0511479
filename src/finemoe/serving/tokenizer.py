"""Encodes prompts on a thread of its own, so that long ones do not block the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError

from finemoe.serving.errors import ApiError, bad_value
from finemoe.serving.model_info import ServedModel
from finemoe.serving.protocol import Message, Tool

T = TypeVar("T")


class PromptEncoder:
    """Encodes prompts, one at a time.

    Args:
        served: its tokenizer, chat template and limits are used.
    """

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` on the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def chat(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        """Token ids of a conversation, by the model's chat template.

        Raises:
            ApiError: 400: there is no template, it rejects the messages, or the prompt is too long.
        """
        conversation = [template_message(message, i) for i, message in enumerate(messages)]
        tool_specs = None if tools is None else [tool.model_dump(exclude_none=True) for tool in tools]
        tokenizer = self._served.tokenizer

        def encode() -> list[int]:
            try:
                encoded = tokenizer.apply_chat_template(
                    conversation, tools=tool_specs, add_generation_prompt=True, tokenize=True, return_dict=True
                )
            except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
                raise bad_value("messages", f"the model's chat template rejects them ({_line(error)})") from error
            return list(encoded["input_ids"])

        if not tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
        return self._checked(await self.run(encode), "messages")

    async def text(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a completion prompt.

        Raises:
            ApiError: 400: the prompt is empty, has invalid ids, or is too long.
        """
        if isinstance(prompt, str):
            ids = list(await self.run(lambda: self._served.tokenizer(prompt, verbose=False)["input_ids"]))
        else:
            ids = list(prompt)
            if invalid := [i for i in ids if not 0 <= i < self._served.vocabulary_size]:
                raise bad_value(
                    "prompt", f"token id {invalid[0]} is not between 0 and {self._served.vocabulary_size - 1}"
                )
        return self._checked(ids, "prompt")

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise bad_value(param, "is empty")
        if len(ids) > self._served.max_prompt_tokens:
            raise bad_value(
                param,
                f"has {len(ids)} tokens; this server takes at most {self._served.max_prompt_tokens}",
                "context_length_exceeded",
            )
        return ids

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def template_message(message: Message, index: int) -> dict[str, Any]:
    """A message in the format of chat templates: text as one string, arguments of calls as objects.

    Raises:
        ApiError: 400, naming the part of `messages[index]` that is missing or invalid.
    """
    if message.text is None and not message.tool_calls:
        raise bad_value(f"messages[{index}].content", "is required")
    if message.tool_calls and message.role != "assistant":
        raise bad_value(f"messages[{index}].tool_calls", f"a message of role {message.role} can't have tool calls")
    role = "system" if message.role == "developer" else message.role  # templates have no developer role
    fields: dict[str, Any] = {"role": role, "content": message.text or ""}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(
                        call.function.arguments, f"messages[{index}].tool_calls[{j}].function.arguments"
                    ),
                },
            }
            for j, call in enumerate(message.tool_calls)
        ]
    return fields


def _arguments(text: str, param: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise bad_value(param, "is not JSON") from error
    if not isinstance(arguments, dict):
        raise bad_value(param, "is not a JSON object")
    return arguments


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
