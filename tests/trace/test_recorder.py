"""A recording is what the model executed, independent of the budget, the batch and earlier interrupts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finemoe
from finemoe.checkpoint import read_headers
from finemoe.checkpoint.headers import fingerprint
from finemoe.config import GenerateConfig
from finemoe.errors import UnsupportedModelError
from finemoe.model.generation import Session
from finemoe.trace import RequestTrace
from finemoe.trace.recorder import Recorder
from tests.chat_model import make_chat_model
from tests.trace.make import equal

PROMPTS = ("Hi", "What is photosynthesis?", "Name three colours.")
GREEDY = GenerateConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("recorded") / "tiny-chat")


def recorded(
    folder: Path, budget: str = "50%", batch: int = 1, config: GenerateConfig = GREEDY, **options: Any
) -> list[RequestTrace]:
    """Records the prompts in float32, so that batches of any size agree up to rounding."""
    with finemoe.load(folder, expert_memory=budget, dtype="float32") as model:
        session = Session(model)
        recorder = Recorder(session, config, **options)
        ids = [session.prompt_ids(prompt) for prompt in PROMPTS]
        return [
            request for first in range(0, len(ids), batch) for request in recorder.record(ids[first : first + batch], 0)
        ]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[RequestTrace]:
    return recorded(folder, lookahead=2)


def test_the_budget_changes_nothing(folder: Path, alone: list[RequestTrace]) -> None:
    for budget in ("17%", "all"):
        assert all(equal(one, other) for one, other in zip(recorded(folder, budget, lookahead=2), alone, strict=True))


def test_a_batch_changes_only_rounding(folder: Path, alone: list[RequestTrace]) -> None:
    for one, other in zip(recorded(folder, batch=3, lookahead=2), alone, strict=True):
        for name in ("phases", "rows", "token_ids", "expert_ids"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        for name in ("weights", "probs", "embeddings", "lookahead"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=2e-3), name


def test_iterations_are_the_prompt_and_every_token_but_the_last(folder: Path, alone: list[RequestTrace]) -> None:
    with finemoe.load(folder, expert_memory="all", dtype="float32") as model:
        session = Session(model)
        for prompt, request in zip(PROMPTS, alone, strict=True):
            ids = session.prompt_ids(prompt)
            reply = session.reply(prompt, GREEDY)
            inputs = [*ids[0].tolist(), *reply.token_ids[:-1]]
            assert request.token_ids.tolist() == inputs
            assert request.phases.tolist() == [0] + [1] * (len(reply.token_ids) - 1)
            assert request.rows.tolist() == [0, *range(ids.shape[1], len(inputs) + 1)]
            table = model.get_input_embeddings().weight.detach()
            prefill, last = table[inputs[: ids.shape[1]]].float().mean(0), table[inputs[-1]].float()
            assert request.embeddings is not None
            assert request.embeddings[0] == pytest.approx(prefill.numpy(), abs=1e-3)
            assert request.embeddings[-1] == pytest.approx(last.numpy(), abs=1e-3)


def test_distributions_agree_with_executed_experts(alone: list[RequestTrace]) -> None:
    for request in alone:
        assert request.probs is not None and request.weights is not None
        assert request.probs.astype(float).sum(2) == pytest.approx(np.ones(request.probs.shape[:2]), abs=0.01)
        chosen = np.take_along_axis(request.probs.astype(float), request.expert_ids.astype(int), 2)
        assert chosen / chosen.sum(2, keepdims=True) == pytest.approx(request.weights.astype(float), abs=2e-3)
        assert (np.diff(request.weights, axis=2) <= 0).all()


def test_a_request_that_ends_early_ends_in_the_trace(folder: Path, alone: list[RequestTrace]) -> None:
    end = int(alone[0].token_ids[alone[0].rows[3]])  # input of the first prompt's fourth pass
    with finemoe.load(folder, expert_memory="50%", dtype="float32") as model:
        model.generation_config.eos_token_id = [end]
        session = Session(model)
        requests = Recorder(session, GREEDY).record([session.prompt_ids(prompt) for prompt in PROMPTS], 0)
    for request, other in zip(requests, alone, strict=True):
        inputs = other.token_ids[other.rows[1] :].tolist()
        assert len(request) == (1 + inputs.index(end) if end in inputs else len(other))
        assert np.array_equal(request.expert_ids, other.expert_ids[: len(request.token_ids)])
    assert len(requests[0]) < len(alone[0])


def test_sampling_depends_on_the_seed_alone(folder: Path) -> None:
    def tokens(seed: int) -> list[list[int]]:
        config = GenerateConfig(max_new_tokens=6, temperature=2.0, seed=seed)
        return [request.token_ids.tolist() for request in recorded(folder, config=config)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_a_request_run_by_the_caller_is_recorded_alike(folder: Path, alone: list[RequestTrace]) -> None:
    with finemoe.load(folder, expert_memory="50%", dtype="float32") as model:
        session = Session(model)
        recorder = Recorder(session, GREEDY, lookahead=2)
        ids = session.prompt_ids(PROMPTS[1])

        def answer() -> int:
            options = {"max_new_tokens": GREEDY.max_new_tokens, "pad_token_id": session.pad_token_id()}
            output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
            return int(output.shape[1] - ids.shape[1])

        assert equal(recorder.record_call(answer, ids.shape[1]), alone[1])
        with pytest.raises(UnsupportedModelError, match="one token a pass"):
            recorder.record_call(lambda: answer() + 1, ids.shape[1])


@pytest.fixture(scope="module")
def recorder(folder: Path) -> Iterator[Recorder]:
    with finemoe.load(folder, expert_memory="50%") as model:
        yield Recorder(Session(model), GREEDY, lookahead=1, settings={"a": 1})


def test_the_header_describes_the_model(folder: Path, recorder: Recorder) -> None:
    header = recorder.header
    assert (header.model, header.layers, header.experts, header.active) == ("tiny-chat", 3, 8, 3)
    assert (header.width, header.lookahead, header.missing) == (64, 1, ())
    assert header.normalisation == "softmax of the gates' logits"
    assert header.settings == {"a": 1}
    assert recorder.notices == []


def test_the_fingerprint_depends_on_content_not_on_the_path(folder: Path, recorder: Recorder, tmp_path: Path) -> None:
    own = recorder.header.fingerprint
    other = make_chat_model(tmp_path / "copy")
    headers = read_headers([other / "model.safetensors"])
    assert fingerprint(other, headers) == own
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    assert fingerprint(other, headers) == own
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert fingerprint(other, headers) != own


def test_gates_that_cannot_be_tapped_give_a_notice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.model.router_hooks.find_routers", lambda _model, experts: [None] * len(experts))
    with finemoe.load(folder, expert_memory="50%") as model:
        session = Session(model)
        recorder = Recorder(session, GREEDY)
        (request,) = recorder.record([session.prompt_ids("Hi")], 0)
    assert [notice.partition(":")[0] for notice in recorder.notices] == ["probs"]
    assert recorder.header.missing == ("probs", "lookahead")
    assert recorder.header.normalisation is None
    assert request.probs is None
    request.check(recorder.header)


def test_recording_works_after_an_interrupt(recorder: Recorder) -> None:
    ids = [torch.arange(5, 12)[None]]
    (before,) = recorder.record(ids, 0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorder.record(ids, 0, on_token=interrupt)
    (after,) = recorder.record(ids, 0)
    assert equal(before, after)
