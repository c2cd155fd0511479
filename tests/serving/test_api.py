"""The endpoints, in the process: every parameter is honoured, or refused by name in OpenAI's shape."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

from finemoe.serving.job import Job
from tests.serving.fake_worker import END
from tests.serving.serve import NAME, TEXT, count_up, fake, ids, say

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def events(response: Any) -> list[Any]:
    """The objects of a stream that ended as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def refusal(response: Any, status: int = 400) -> Any:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    assert "\n" not in body["error"]["message"]
    return body["error"]


def test_a_chat_is_answered() -> None:
    with fake() as server:
        whole = server.chat().json()
    assert whole["object"] == "chat.completion"
    assert whole["model"] == NAME
    assert whole["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt, completion = len(ids("<user>Hi<assistant>")), len(ids(TEXT)) + 1
    assert whole["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    assert server.worker.jobs[0].prompt == ids("<user>Hi<assistant>")


def test_a_streamed_chat_says_the_same() -> None:
    with fake() as server:
        chunks = events(server.chat(stream=True, stream_options={"include_usage": True}, n=2))
        plain = events(server.chat(stream=True))
    for index in range(2):
        deltas = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(d["delta"].get("content") or "" for d in deltas) == TEXT
        assert [d["finish_reason"] for d in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * (len(ids(TEXT)) + 1)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert not any("usage" in chunk for chunk in plain)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_completion_continues_each_prompt() -> None:
    with fake() as server:
        whole = server.post(COMPLETIONS, prompt=["a", "bc"], n=2, max_tokens=50).json()
        chunks = events(server.post(COMPLETIONS, prompt=[3, 4], max_tokens=50, stream=True))
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in whole["choices"]} == {TEXT}
    assert whole["usage"]["prompt_tokens"] == 3
    assert [list(job.prompt) for job in server.worker.jobs] == [ids("a")] * 2 + [ids("bc")] * 2 + [[3, 4]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"temperature": 1.0, "top_p": 1.0, "seed": None, "max_tokens": 256, "logprobs": None}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1e-300}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 5}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}),
        ({"top_p": 0}, {"temperature": 0.0, "top_p": 1.0}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"temperature": None, "stop": None, "n": None, "tools": None}, {"temperature": 1.0}),
        ({"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}, {}),
    ],
)
def test_parameters_reach_the_job(given: dict[str, Any], expected: dict[str, Any]) -> None:
    with fake() as server:
        assert server.chat(**given).status_code == 200
    job = server.worker.jobs[0]
    assert {name: getattr(job, name) for name in expected} == expected
    assert job.stop == {END}


def test_choices_have_seeds_of_their_own() -> None:
    with fake(count_up) as server:
        first, second = (server.chat(n=3, seed=2**63 - 1, max_tokens=4).json()["choices"] for _ in range(2))
    assert first == second
    assert len({choice["message"]["content"] for choice in first}) == 3


@pytest.mark.parametrize(
    ("stop", "text"), [("é", "The caf"), (["zz", " 😀"], "The café"), (["is op", "open"], TEXT[:11])]
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_the_job(stop: Any, text: str, stream: bool) -> None:
    def endless(_: Job) -> Any:
        while True:
            yield from ids(TEXT)

    with fake(endless) as server:
        response = server.chat(stop=stop, stream=stream)
        server.house.served.worker.drain(5)
        assert server.worker.cancelled == [server.worker.jobs[0].name]
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(response)]
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == text
        assert chunks[-1]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_the_longest_answer_ends_with_length() -> None:
    with fake(count_up) as server:
        choice = server.chat(max_tokens=3).json()["choices"][0]
        assert len(server.chat().json()["choices"][0]["message"]["content"]) == 256
    assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", "length")


def test_log_probabilities_of_a_chat() -> None:
    with fake(say("aé")) as server:
        whole = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
        chunks = events(server.chat(logprobs=True, top_logprobs=2, stream=True))
    assert [one["token"] for one in whole] == ["a", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]
    assert bytes(byte for one in whole for byte in one["bytes"]).decode() == "aé"
    assert [len(one["top_logprobs"]) for one in whole] == [2, 2, 2]
    assert whole[0]["top_logprobs"][0] == {"token": "a", "logprob": -0.5, "bytes": [97]}
    streamed = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == whole


def test_log_probabilities_of_a_completion() -> None:
    with fake(say("abc")) as server:
        logprobs = server.post(COMPLETIONS, prompt="x", logprobs=2, stop="c").json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b"]
    assert logprobs["text_offset"] == [0, 1]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.5}


def test_answers_fit_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["colour", "size"],
        "additionalProperties": False,
    }
    given = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    # the model goes for a quote wherever it may, and for anything else where it may not
    with fake(lambda _: iter(ids('"') * 99)) as server:
        choices = [server.chat(response_format=given, n=2, seed=seed).json()["choices"] for seed in range(4)]
    for choice in [choice for made in choices for choice in made]:
        assert choice["finish_reason"] in {"stop", "length"}
        if choice["finish_reason"] == "stop":
            thing = json.loads(choice["message"]["content"])
            assert thing["colour"] in {"red", "blue"}
            assert 1 <= thing["size"] <= 9
    assert any(choice["finish_reason"] == "stop" for made in choices for choice in made)


def test_a_json_object_is_one() -> None:
    with fake(say('{"a": [1, 2]} and more')) as server:
        choice = server.chat(response_format={"type": "json_object"}, seed=1).json()["choices"][0]
        assert server.chat(response_format={"type": "text"}).json()["choices"][0]["message"]["content"].endswith("more")
    assert json.loads(choice["message"]["content"]) == {"a": [1, 2]}


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Löwen"}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_functions(stream: bool) -> None:
    with fake(say(f"Let me see. {CALL}\n{CALL}")) as server:
        response = server.chat(tools=TOOLS, stream=stream)
        alone = server.chat(tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]
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
    assert len(alone["message"]["tool_calls"]) == 1
    assert forbidden["message"]["content"] == f"Let me see. {CALL}\n{CALL}"


@pytest.mark.parametrize("text", ["<tool_call>no json</tool_call>", '<tool_call>{"nome": 1}', "a <tool_cal", "<"])
def test_what_is_no_call_is_text(text: str) -> None:
    with fake(say(text)) as server:
        chunks = [chunk["choices"][0] for chunk in events(server.chat(tools=TOOLS, stream=True))]
        whole = server.chat(tools=TOOLS).json()["choices"][0]
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == text == whole["message"]["content"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"] == "stop"


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
        prompt = server.house.served.decode(server.worker.jobs[0].prompt)
        assert prompt.startswith("<system>Be brief<user>Hi<assistant><tool>rain")
        error = refusal(server.chat(messages=messages))  # the template wants tools for this
        assert (error["param"], "no tools here" in error["message"]) == ("messages", True)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_demanded(choice: Any) -> None:
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
def test_bodies_that_are_none(body: bytes, kind: str, status: int, code: str, path: str) -> None:
    with fake(max_body_bytes="150000") as server:
        error = refusal(server.client.post(path, content=body, headers={"Content-Type": kind}), status)
    assert error["code"] == code


def test_a_body_in_pieces_is_bounded_too() -> None:
    with fake(max_body_bytes="1000") as server:
        pieces = (b"a" * 100 for _ in range(100))
        error = refusal(server.client.post(CHAT, content=pieces, headers={"Content-Type": "application/json"}), 413)
    assert error["code"] == "body_too_long"


def test_what_is_not_there() -> None:
    with fake() as server:
        error = refusal(server.chat(model="other"), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert refusal(server.client.get("/v1/models/org/other"), 404)["code"] == "model_not_found"
        assert refusal(server.client.get("/v1/nothing"), 404)["code"] == "not_found"
        response = server.client.get(CHAT)
        assert refusal(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == "POST"
        assert server.client.get("/docs").status_code == 404  # its scripts come from elsewhere


def test_the_model_is_listed() -> None:
    with fake() as server:
        models = server.client.get("/v1/models").json()
        assert models["object"] == "list"
        assert server.client.get(f"/v1/models/{NAME}").json() == models["data"][0]
        assert models["data"][0]["max_model_len"] == 512


def test_a_key_is_asked_for_and_nothing_else_opens() -> None:
    with fake(api_key="s3cret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "é"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                response = server.client.get(path, headers=[(k.encode(), v.encode()) for k, v in headers.items()])
                assert refusal(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/ready").status_code == 200
        opened = server.client.get("/v1/models", headers={"Authorization": "Bearer s3cret"})
        assert opened.status_code == 200


def test_a_model_that_is_dead_is_told_to_probes_and_clients() -> None:
    with fake() as server:
        server.worker.failed = "the model's thread has failed (OSError: /secret/path)"
        for response in (server.client.get("/health"), server.client.get("/ready"), server.chat()):
            error = refusal(response, 503)
            assert error["code"] == "model_failed"
            assert error["message"].startswith("the model's thread has failed; ")
        assert server.client.get("/metrics").status_code == 200


def test_a_key_is_asked_for_below_another_root_too() -> None:
    with fake(api_key="s3cret") as server, TestClient(server.app, root_path="/moe") as mounted:
        for path in ("/moe/v1/models", "/moe/metrics", "/v1/models"):
            assert mounted.get(path).status_code == 401
        assert mounted.get("/moe/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert mounted.get("/moe/health").status_code == 200


def test_every_response_has_a_request_id() -> None:
    with fake() as server:
        assert server.client.get("/health").headers["x-request-id"].startswith("req-")
        assert server.client.get("/v1/nothing", headers={"x-request-id": "a-1.b"}).headers["x-request-id"] == "a-1.b"
        odd = server.client.get("/health", headers={"x-request-id": 'a"b{}'}).headers["x-request-id"]
        assert odd.startswith("req-")


def test_what_fails_is_told_apart_in_the_metrics() -> None:
    with fake() as server:
        server.chat()
        server.chat(n=0)
        server.chat(model="other")
        assert server.metric('finemoe_requests_total{outcome="finished"}') == 1
        assert server.metric('finemoe_requests_total{outcome="invalid"}') == 2
        assert server.metric("finemoe_generated_tokens_total") == len(ids(TEXT)) + 1
        assert server.metric("finemoe_time_to_first_token_seconds_count") == 1
        assert server.metric('finemoe_expert_accesses_total{result="hit"}') == 5
        assert server.metric("finemoe_expert_stall_seconds_total") == 0.25
        assert server.metric("finemoe_answers_running") == 0
        page = server.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert page.headers["content-type"].startswith("application/openmetrics-text")
        assert page.text.endswith("# EOF\n")


def test_something_that_breaks_is_a_500_in_the_same_shape() -> None:
    def broken() -> Any:
        raise KeyError("secret")

    with fake() as server:
        server.app.get("/broken")(broken)
        error = refusal(server.client.get("/broken"), 500)
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_where_asked_for(log_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "finemoe.serving"), fake(say("sesame"), log_prompts=log_prompts) as server:
        server.chat(messages=[{"role": "user", "content": "open up"}], user="ann")
        server.chat(messages=[{"role": "user", "content": "open up"}], stream=True)
    lines = [getattr(record, "fields", {}) for record in caplog.records if record.getMessage() == "request"]
    assert len(lines) == 2
    assert {line["outcome"] for line in lines} == {"finished"}
    assert lines[0]["user"] == "ann"
    assert lines[0]["completion_tokens"] == 7
    assert ("open up" in str(lines)) == ("sesame" in str(lines)) == log_prompts


def test_a_model_without_a_chat_template_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake() as server:
        monkeypatch.setattr(server.house.served.tokenizer, "chat_template", None)
        assert refusal(server.chat())["code"] == "no_chat_template"
        assert refusal(server.chat(tools=TOOLS))["param"] == "tools"


def test_a_prompt_that_never_fits_the_cache_is_refused() -> None:
    with fake() as server:
        server.worker.longest_prompt = 3
        assert refusal(server.chat(n=2))["code"] == "context_length_exceeded"
        assert server.house.admission.answers == 0
        assert (
            server.metric("finemoe_requests_total") == server.metric('finemoe_requests_total{outcome="invalid"}') == 1
        )
