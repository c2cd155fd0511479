"""Answers of an in-process server: every parameter has its effect."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finemoe.serving.scheduler.job import Job
from tests.serving.fake_worker import END
from tests.serving.serve import COMPLETIONS, NAME, TEXT, count_up, events, fake, ids, say


def test_a_chat_is_answered() -> None:
    with fake() as server:
        body = server.chat().json()
    assert body["object"] == "chat.completion"
    assert body["model"] == NAME
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt, completion = len(ids("<user>Hi<assistant>")), len(ids(TEXT)) + 1
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    assert server.worker.jobs[0].prompt == ids("<user>Hi<assistant>")


def test_a_streamed_chat_has_the_same_text() -> None:
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
        body = server.post(COMPLETIONS, prompt=["a", "bc"], n=2, max_tokens=50).json()
        chunks = events(server.post(COMPLETIONS, prompt=[3, 4], max_tokens=50, stream=True))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in body["choices"]} == {TEXT}
    assert body["usage"]["prompt_tokens"] == 3
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


def test_each_choice_has_its_own_seed() -> None:
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
        server.app_state.served.worker.drain(5)
        assert server.worker.cancelled == [server.worker.jobs[0].name]
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(response)]
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == text
        assert chunks[-1]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_an_answer_of_max_tokens_ends_with_length() -> None:
    with fake(count_up) as server:
        choice = server.chat(max_tokens=3).json()["choices"][0]
        assert len(server.chat().json()["choices"][0]["message"]["content"]) == 256
    assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", "length")


def test_log_probabilities_of_a_chat() -> None:
    with fake(say("aé")) as server:
        body = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
        chunks = events(server.chat(logprobs=True, top_logprobs=2, stream=True))
    assert [one["token"] for one in body] == ["a", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]
    assert bytes(byte for one in body for byte in one["bytes"]).decode() == "aé"
    assert [len(one["top_logprobs"]) for one in body] == [2, 2, 2]
    assert body[0]["top_logprobs"][0] == {"token": "a", "logprob": -0.5, "bytes": [97]}
    streamed = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == body


def test_log_probabilities_of_a_completion() -> None:
    with fake(say("abc")) as server:
        logprobs = server.post(COMPLETIONS, prompt="x", logprobs=2, stop="c").json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b"]
    assert logprobs["text_offset"] == [0, 1]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.5}


def test_answers_match_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["colour", "size"],
        "additionalProperties": False,
    }
    given = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    # the fake model prefers a quote, and otherwise takes a random allowed token
    with fake(lambda _: iter(ids('"') * 99)) as server:
        choices = [server.chat(response_format=given, n=2, seed=seed).json()["choices"] for seed in range(4)]
    for choice in [choice for made in choices for choice in made]:
        assert choice["finish_reason"] in {"stop", "length"}
        if choice["finish_reason"] == "stop":
            thing = json.loads(choice["message"]["content"])
            assert thing["colour"] in {"red", "blue"}
            assert 1 <= thing["size"] <= 9
    assert any(choice["finish_reason"] == "stop" for made in choices for choice in made)


def test_json_object_format_gives_an_object() -> None:
    with fake(say('{"a": [1, 2]} and more')) as server:
        choice = server.chat(response_format={"type": "json_object"}, seed=1).json()["choices"][0]
        assert server.chat(response_format={"type": "text"}).json()["choices"][0]["message"]["content"].endswith("more")
    assert json.loads(choice["message"]["content"]) == {"a": [1, 2]}
