"""The server with a real, tiny, offloaded model and the batching worker."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import finemoe
from finemoe.model.generation import load_tokenizer
from finemoe.serving.config import ServeConfig
from finemoe.serving.model_info import served_model
from finemoe.serving.scheduler.worker import BatchingWorker
from finemoe.serving.state import AppState
from finemoe.store import DiskStore
from tests.chat_model import make_chat_model
from tests.serving.serve import LiveServer, live
from tests.serving.test_server import HI, idle, until

NAME = "my-model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("serving") / NAME)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    config = ServeConfig(cache_bytes="16MiB", max_batch_tokens=64, max_running=4)
    with finemoe.load(folder, expert_memory="17%", dtype="float32") as model:
        worker = BatchingWorker(model, config)
        try:
            tokenizer = load_tokenizer(folder)
            with live(AppState(served_model(model, tokenizer, worker, config, worker.capacity_tokens))) as made:
                yield made
        finally:
            worker.close()


def test_greedy_answers_are_those_of_generate(server: LiveServer, folder: Path) -> None:
    with finemoe.load(folder, expert_memory="17%", dtype="float32") as model:
        tokenizer = load_tokenizer(folder)
        prompt = tokenizer("The experts", return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    client = server.client()
    response = client.completions.create(model=NAME, prompt="The experts", max_tokens=12, temperature=0)
    assert response.choices[0].text == expected
    chunks = client.completions.create(model=NAME, prompt="The experts", max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_a_seed_gives_the_same_answer_whatever_else_runs(server: LiveServer) -> None:
    client = server.client()

    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(model=NAME, messages=HI, seed=seed, n=2, max_tokens=12)
        return [choice.message.content for choice in answer.choices]

    alone = [ask(seed) for seed in range(4)]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(ask, range(4)))
    assert alone == together
    assert len({text for texts in alone for text in texts}) > 4


def test_answers_match_a_schema_and_have_log_probabilities(server: LiveServer) -> None:
    given: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": {"enum": ["yes", "no"]}}}
    answer = server.client().chat.completions.create(
        model=NAME,
        messages=HI,
        logprobs=True,
        top_logprobs=2,
        n=2,
        seed=1,
        response_format=given,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert json.loads(choice.message.content or "") in {"yes", "no"}
        assert choice.logprobs is not None
        assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in choice.logprobs.content or [])


def test_a_read_error_fails_only_its_request(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads_left = DiskStore.read, [20]

    def broken(store: DiskStore, run: Any, start_bytes: int, into: memoryview) -> None:
        reads_left[0] -= 1
        if reads_left[0] < 0:
            raise OSError(errno.EIO, "Input/output error", store.name(run.file))
        read(store, run, start_bytes, into)

    client = server.client()
    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "read", broken)
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(model=NAME, messages=HI, max_tokens=64)
        assert failed.value.code == "model_error"
    until(lambda: idle(server))
    assert client.chat.completions.create(model=NAME, messages=HI, max_tokens=4).choices


def test_clients_that_disconnect_free_all_blocks(server: LiveServer) -> None:
    free = server.app_state.served.worker.load().free_cache_blocks
    client = server.client()
    for _ in range(5):
        stream = client.chat.completions.create(model=NAME, messages=HI, max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
    until(lambda: idle(server))
    assert server.app_state.served.worker.load().free_cache_blocks == free
