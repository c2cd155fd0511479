"""Tool calls: in answers, in conversations, and required."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving.serve import TOOLS, events, fake, refusal, say

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Löwen"}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_are_parsed(stream: bool) -> None:
    with fake(say(f"Let me see. {CALL}\n{CALL}")) as server:
        response = server.chat(tools=TOOLS, stream=stream)
        first_only = server.chat(tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]
        forbidden = server.chat(tools=TOOLS, tool_choice="none").json()["choices"][0]
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(response)]
        content = "".join(chunk["delta"].get("content") or "" for chunk in chunks).rstrip()
        calls = next(chunk["delta"]["tool_calls"] for chunk in chunks if "tool_calls" in chunk["delta"])
        assert [call.pop("index") for call in calls] == [0, 1]
        finish = chunks[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        content, calls, finish = choice["message"]["content"], choice["message"]["tool_calls"], choice["finish_reason"]
    assert (content, finish) == ("Let me see.", "tool_calls")
    assert [call["function"] for call in calls] == [{"name": "weather", "arguments": '{"city": "Löwen"}'}] * 2
    assert len({call["id"] for call in calls}) == 2
    assert len(first_only["message"]["tool_calls"]) == 1
    assert forbidden["message"]["content"] == f"Let me see. {CALL}\n{CALL}"


@pytest.mark.parametrize("text", ["<tool_call>no json</tool_call>", '<tool_call>{"nome": 1}', "a <tool_cal", "<"])
def test_malformed_calls_are_text(text: str) -> None:
    with fake(say(text)) as server:
        chunks = [chunk["choices"][0] for chunk in events(server.chat(tools=TOOLS, stream=True))]
        unstreamed = server.chat(tools=TOOLS).json()["choices"][0]
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == text == unstreamed["message"]["content"]
    assert chunks[-1]["finish_reason"] == unstreamed["finish_reason"] == "stop"


def test_a_conversation_with_calls_goes_through_the_template() -> None:
    with fake() as server:
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        messages = [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "Hi", "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
            {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
        ]
        assert server.chat(messages=messages, tools=TOOLS).status_code == 200
        prompt = server.app_state.served.decode(server.worker.jobs[0].prompt)
        assert prompt.startswith("<system>Be brief<user>Hi<assistant><tool>rain")
        error = refusal(server.chat(messages=messages))  # the template refuses a tool message without tools
        assert (error["param"], "no tools here" in error["message"]) == ("messages", True)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_required(choice: Any) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": city | {"additionalProperties": False}}}
    ]
    with fake(say("I would rather talk.")) as server:
        answer = server.chat(tools=tools, tool_choice=choice, seed=1).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert answer["finish_reason"] == "tool_calls"
