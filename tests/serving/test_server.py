"""The server on a port, with OpenAI's client and with clients that misbehave."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from finemoe.errors import ConfigError
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Job
from finemoe.serving.server import read_api_key, reserve
from tests.serving.fake_worker import FakeWorker
from tests.serving.serve import NAME, TEXT, LiveServer, count_up, ids, live, make_app_state, say

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    made = FakeWorker(say(TEXT))
    yield made
    made.close()


@pytest.fixture
def server(worker: FakeWorker) -> Iterator[LiveServer]:
    with live(make_app_state(worker)) as made:
        yield made


def idle(server: LiveServer) -> bool:
    load = server.app_state.served.worker.load()
    return not (server.app_state.admission.answers or load.running or load.waiting)


def test_the_openai_client_chats(server: LiveServer) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    answer = client.chat.completions.create(model=NAME, messages=HI, n=2, logprobs=True, top_logprobs=1, seed=3)
    assert [choice.message.content for choice in answer.choices] == [TEXT] * 2
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids("<user>Hi<assistant>"))
    # an answer can be sent back unchanged
    turns = [*HI, answer.choices[0].message.model_dump(), {"role": "user", "content": "More"}]
    assert client.chat.completions.create(model=NAME, messages=turns).choices[0].finish_reason == "stop"  # type: ignore[arg-type]


def test_the_openai_client_streams(server: LiveServer) -> None:
    client = server.client()
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=HI, stream=True, stream_options={"include_usage": True}, stop="open"
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT.partition("open")[0]
    assert chunks[-1].usage is not None
    texts = [c.choices[0].text for c in client.completions.create(model=NAME, prompt="a", max_tokens=99, stream=True)]
    assert "".join(texts) == TEXT
    with client.chat.completions.stream(model=NAME, messages=HI) as stream:  # collects the chunks into one answer
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_the_openai_client_parses_structured_output(server: LiveServer, worker: FakeWorker) -> None:
    class Verdict(BaseModel):
        good: bool

    worker.script = say('{"good": true}')
    parsed = server.client().chat.completions.parse(model=NAME, messages=HI, response_format=Verdict)
    assert parsed.choices[0].message.parsed == Verdict(good=True)


def test_the_openai_client_raises_its_own_errors(server: LiveServer) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=HI, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-0", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=NAME, messages=HI, extra_body={"top_k": 4})
    assert unknown.value.param == "top_k"


def test_the_api_key_is_required(worker: FakeWorker) -> None:
    with live(make_app_state(worker), api_key="s3cret") as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert list(server.client("s3cret").models.list())


def test_a_full_queue_refuses(worker: FakeWorker) -> None:
    worker.may_step.clear()
    with live(make_app_state(worker, max_running=2, max_waiting=1)) as server, ThreadPoolExecutor() as pool:
        client = server.client()
        admitted = [pool.submit(client.chat.completions.create, model=NAME, messages=HI) for _ in range(3)]
        until(lambda: server.app_state.admission.answers == 3)
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model=NAME, messages=HI)
        assert full.value.code == "queue_full"
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
        with pytest.raises(openai.BadRequestError) as never:
            client.chat.completions.create(model=NAME, messages=HI, n=4)
        assert never.value.param == "n"
        worker.may_step.set()
        assert [one.result().choices[0].message.content for one in admitted] == [TEXT] * 3
        patient = server.client(max_retries=3)
        assert patient.chat.completions.create(model=NAME, messages=HI).choices[0].message.content == TEXT


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_times_out(worker: FakeWorker, stream: bool) -> None:
    worker.may_step.clear()
    with live(make_app_state(worker, request_timeout_s=0.2)) as server:
        expected = openai.APIError if stream else openai.InternalServerError
        with pytest.raises(expected) as late:
            list(server.client().chat.completions.create(model=NAME, messages=HI, stream=stream))
        assert late.value.code == "request_timeout"
        assert len(worker.cancelled) == 1
        worker.may_step.set()
        until(lambda: idle(server))


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_error_fails_only_its_request(worker: FakeWorker, stream: bool) -> None:
    def failing(_: Job) -> Iterator[int]:
        yield from ids("ab")
        raise OSError("can't read expert 3 of layer 1 from /models/secret.safetensors")

    with live(make_app_state(worker)) as server:
        worker.script = failing
        with pytest.raises(openai.APIError) as failed:
            list(server.client().chat.completions.create(model=NAME, messages=HI, stream=stream))
        assert failed.value.code == "model_error"
        assert "secret" not in str(failed.value)
        worker.script = say(TEXT)
        assert server.client().chat.completions.create(model=NAME, messages=HI).choices[0].message.content == TEXT


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_place(worker: FakeWorker, stream: bool) -> None:
    worker.script = count_up
    with live(make_app_state(worker, context_tokens=1 << 20, max_output_tokens=1 << 19)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        body = json.dumps({"model": NAME, "messages": HI, "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        if stream:
            answer = connection.getresponse()
            assert answer.read(200)
            answer.close()
        else:
            until(lambda: server.app_state.served.worker.load().running == 1)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        until(lambda: idle(server))
        assert worker.cancelled == [worker.jobs[0].name]
        assert 'finemoe_requests_total{outcome="cancelled"} 1.0' in server.app_state.metrics.render("")[0].decode()


def status(server: LiveServer, path: str) -> int:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request("GET", path)
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_shutdown_finishes_running_requests(worker: FakeWorker) -> None:
    worker.may_step.clear()
    with live(make_app_state(worker)) as server, ThreadPoolExecutor() as pool:
        client = server.client()

        def streamed() -> str:
            chunks = client.chat.completions.create(model=NAME, messages=HI, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        unstreamed = pool.submit(client.chat.completions.create, model=NAME, messages=HI)
        stream = pool.submit(streamed)
        until(lambda: server.app_state.admission.answers == 2)
        assert status(server, "/ready") == 200
        server.server.stop()
        until(lambda: status(server, "/ready") == 503)
        assert status(server, "/health") == 200
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model=NAME, messages=HI)
        assert refused.value.status_code == 503
        worker.may_step.set()
        assert unstreamed.result().choices[0].message.content == stream.result() == TEXT


def test_shutdown_waits_for_the_drain_timeout_at_most(worker: FakeWorker) -> None:
    worker.script = count_up
    config: dict[str, Any] = {"context_tokens": 1 << 20, "max_output_tokens": 1 << 19, "drain_timeout_s": 0.3}
    with live(make_app_state(worker, **config)) as server, ThreadPoolExecutor() as pool:
        endless = pool.submit(server.client().chat.completions.create, model=NAME, messages=HI)
        until(lambda: server.app_state.admission.answers == 1)
        server.server.stop()
        with pytest.raises(openai.InternalServerError) as ended:
            endless.result()
        assert ended.value.code == "shutting_down"


def test_unusable_addresses_are_refused_in_one_line() -> None:
    with reserve(ServeConfig(port=0)) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^--port: can't listen on 127.0.0.1 port {port} \(.*\); give another"):
            reserve(ServeConfig(port=port))
    with pytest.raises(ConfigError, match=r"^--host: "):
        reserve(ServeConfig(host="256.1.1.1", port=0))
    with pytest.raises(ConfigError, match=r"^--host: "):
        reserve(ServeConfig(host="192.0.2.1", port=0))


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINEMOE_API_KEY", raising=False)
    assert read_api_key(ServeConfig()) is None
    monkeypatch.setenv("FINEMOE_API_KEY", "from-environment")
    assert read_api_key(ServeConfig()) == "from-environment"
    (tmp_path / "key").write_text("from-file\n")
    assert read_api_key(ServeConfig(api_key_file=str(tmp_path / "key"))) == "from-file"
    (tmp_path / "key").write_text("two words")
    with pytest.raises(ConfigError, match=r"^--api-key-file: holds no key"):
        read_api_key(ServeConfig(api_key_file=str(tmp_path / "key")))
    with pytest.raises(ConfigError, match=r"^--api-key-file: can't read .*absent"):
        read_api_key(ServeConfig(api_key_file=str(tmp_path / "absent")))
    monkeypatch.setenv("FINEMOE_API_KEY", "")
    with pytest.raises(ConfigError, match=r"^FINEMOE_API_KEY: holds no key"):
        read_api_key(ServeConfig())
