"""Invalid requests are refused in OpenAI's error shape, naming the parameter."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.serve import CHAT, COMPLETIONS, TOOLS, fake, refusal

BROKEN_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "nope"}}}
MESSAGE = {"role": "user", "content": "x"}
NESTED = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nope"}}}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"speed": 9}, "speed"),
        ({"top_k": 5}, "top_k"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 257}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": ["a" * 257]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": NESTED}, "response_format.json_schema.schema"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [BROKEN_TOOL], "tool_choice": "required"}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [MESSAGE, {"role": "king", "content": "x"}]}, "messages[1].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 200}, "max_tokens"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"user": 5}, "user"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(given: dict[str, Any], param: str) -> None:
    with fake() as server:
        error = refusal(server.chat(**given))
        assert server.worker.jobs == []
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)
    assert error["code"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": "a" * 600}, "prompt"),
    ],
    ids=str,
)
def test_bad_completions_are_refused_by_name(given: dict[str, Any], param: str) -> None:
    with fake() as server:
        error = refusal(server.post(COMPLETIONS, **given))
    assert (error["param"] or "").startswith(param)


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "application/json", 400, "invalid_json"),
        (b"{", "application/json", 400, "invalid_json"),
        (b"[1]", "application/json", 400, "invalid_type"),
        (b"null", "application/json", 400, "invalid_type"),
        (b'{"model": "\xff"}', "application/json", 400, "invalid_json"),
        (b'{"model": "\\ud800"}', "application/json", 400, "invalid_json"),
        (b'{"\\ud800": 1}', "application/json", 400, "invalid_json"),
        (b'{"temperature": NaN}', "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "application/json", 400, "invalid_json"),
        (b"{}", "text/plain", 415, "not_json"),
        (b"{}", "application/x-www-form-urlencoded", 415, "not_json"),
        (b'{"a": "' + b"a" * 200_000 + b'"}', "application/json", 413, "body_too_long"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_invalid_bodies_are_refused(body: bytes, kind: str, status: int, code: str, path: str) -> None:
    with fake(max_body_bytes="150000") as server:
        error = refusal(server.client.post(path, content=body, headers={"Content-Type": kind}), status)
    assert error["code"] == code


def test_a_chunked_body_is_limited_too() -> None:
    with fake(max_body_bytes="1000") as server:
        pieces = (b"a" * 100 for _ in range(100))
        error = refusal(server.client.post(CHAT, content=pieces, headers={"Content-Type": "application/json"}), 413)
    assert error["code"] == "body_too_long"


def test_a_model_without_a_chat_template_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake() as server:
        monkeypatch.setattr(server.app_state.served.tokenizer, "chat_template", None)
        assert refusal(server.chat())["code"] == "no_chat_template"
        assert refusal(server.chat(tools=TOOLS))["param"] == "tools"


def test_a_prompt_that_never_fits_the_cache_is_refused() -> None:
    with fake() as server:
        server.worker.longest_prompt = 3
        assert refusal(server.chat(n=2))["code"] == "context_length_exceeded"
        assert server.app_state.admission.answers == 0
        assert (
            server.metric("finemoe_requests_total") == server.metric('finemoe_requests_total{outcome="invalid"}') == 1
        )
