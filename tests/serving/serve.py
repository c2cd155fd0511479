"""A server with the fake worker: in-process, or on a free port of this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

from fastapi import FastAPI
from openai import OpenAI
from starlette.testclient import TestClient

from finemoe.metrics import Stats
from finemoe.serving.app import make_app
from finemoe.serving.config import ServeConfig
from finemoe.serving.model_info import ServedModel
from finemoe.serving.scheduler.job import Job, Worker
from finemoe.serving.server import Server, address_of, reserve
from finemoe.serving.state import AppState
from tests.chat_model import make_tokenizer
from tests.serving.fake_worker import END, FakeWorker, Script

NAME = "tiny"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TEXT = "The café 😀 is open."
TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = (
    "{% for turn in messages %}"
    "{% if turn['role'] == 'tool' and not tools %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ turn['role'] }}>{{ turn['content'] }}{% endfor %}"
    "{% if tools %}write <tool_call> around calls of {{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_FIGURES: dict[str, Any] = {field.name: 0 for field in fields(Stats)}
_FIGURES |= {"model": NAME, "policy": "lru", "io": "direct", "link_bandwidth_bytes_s": None, "explained": None}
_FIGURES |= {"hits": 5, "late": 2, "misses": 3, "bytes_read": 700, "stall_s": 0.25, "prefetched": 4, "wasted": 1}
STATS = Stats(**_FIGURES)


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER(text)["input_ids"]
    return encoded


def say(text: str) -> Script:
    return lambda _: iter([*ids(text), END])


def count_up(job: Job) -> Iterator[int]:
    """Endless letters that depend on the seed."""
    at = job.seed or 0
    while True:
        yield ids("abcdefghij")[at % 10]
        at += 1


def events(response: Any) -> list[Any]:
    """The objects of a complete stream."""
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


@dataclass
class Fake:
    """A server's parts, and a test client."""

    app_state: AppState
    worker: FakeWorker
    app: FastAPI
    client: TestClient

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json={"model": NAME} | body)

    def chat(self, **body: Any) -> Any:
        return self.post(CHAT, **{"messages": [{"role": "user", "content": "Hi"}]} | body)

    def metric(self, name: str) -> float:
        text = self.client.get("/metrics").text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def make_app_state(worker: Worker, tokenizer: Any = TOKENIZER, **config: Any) -> AppState:
    served = ServedModel(
        name=NAME,
        tokenizer=tokenizer,
        worker=worker,
        stats=lambda: STATS,
        stop_ids=frozenset({END}),
        context_tokens=config.pop("context_tokens", 512),
        vocabulary_size=258,
        config=ServeConfig(**{"max_output_tokens": 256} | config),
    )
    return AppState(served)


@contextmanager
def fake(script: Script | None = None, *, api_key: str | None = None, **config: Any) -> Iterator[Fake]:
    """An in-process server."""
    worker = FakeWorker(script or say(TEXT), config.get("max_running", 4))
    app_state = make_app_state(worker, **config)
    app = make_app(app_state, api_key=api_key)
    try:
        with TestClient(app) as client:
            yield Fake(app_state, worker, app, client)
    finally:
        worker.close()
        app_state.prompts.close()


@dataclass
class LiveServer:
    """A server on a port."""

    app_state: AppState
    server: Server
    url: str
    clients: ExitStack

    def client(self, api_key: str = "none", **options: Any) -> OpenAI:
        """An OpenAI client; closed with the server."""
        options = {"max_retries": 0, "timeout": 30} | options
        return self.clients.enter_context(OpenAI(base_url=f"{self.url}/v1", api_key=api_key, **options))


@contextmanager
def live(app_state: AppState, api_key: str | None = None) -> Iterator[LiveServer]:
    """A server on a free port while the block runs."""
    bound = reserve(ServeConfig(port=0))
    server = Server(make_app(app_state, api_key=api_key), app_state)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(bound, ready.set), name="server")
    thread.start()
    assert ready.wait(30)
    try:
        with ExitStack() as clients:
            yield LiveServer(app_state, server, address_of(bound), clients)
    finally:
        if thread.is_alive():
            server.stop()
        thread.join(30)
        assert not thread.is_alive()
        bound.close()
