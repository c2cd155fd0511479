"""Forced routing: executed experts, the policy's events, and answers equal to eager with the same routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finemoe
from finemoe.engine.engine import Engine
from finemoe.errors import ConfigError, UnsupportedModelError
from finemoe.model.router_hooks import RouterTap
from finemoe.trace import RequestTrace
from finemoe.trace.forced_routing import replay_routing
from finemoe.types import Routed
from tests.chat_model import make_chat_model
from tests.tiny import answer, eager
from tests.trace.make import make_header, make_trace

ALL = ("weights", "probs", "lookahead")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("replay") / "model")


@pytest.fixture(scope="module")
def trace(folder: Path) -> tuple[Path, list[RequestTrace]]:
    """A trace with one layer more than the model."""
    path = folder.parent / "trace"
    return path, make_trace(path, 24, make_header(ALL, layers=4, active=3))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Routed]:
    """The events that the engine gets, one per layer."""
    served: list[Routed] = []
    serve = Engine.serve

    def record(self: Engine, event: Routed) -> Any:
        served.append(event)
        return serve(self, event)

    monkeypatch.setattr(Engine, "serve", record)
    return served


@pytest.mark.parametrize("policy", ["lru", "finemoe", "mixtral-offloading"])
@pytest.mark.parametrize("batch", [1, 2])
def test_answers_equal_eager_with_the_same_routing(
    folder: Path, trace: tuple[Path, list[RequestTrace]], policy: str, batch: int
) -> None:
    reference = eager(folder)
    unforced = answer(reference, batch=batch)
    replay_routing(reference, trace[0])
    expected = [answer(reference, batch=batch) for _ in range(2)]
    with finemoe.load(folder, expert_memory="30%", policy=policy, map_store="none") as model:
        replay_routing(model, trace[0])
        for right in expected:
            assert torch.equal(answer(model, batch=batch), right)
        assert model.finemoe.stats().replayed_routing == str(trace[0])
        model.finemoe.check_integrity()
    assert not torch.equal(expected[0], expected[1])  # another request of the trace
    assert not torch.equal(expected[0], unforced)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_all_of_transformers_experts_implementations_can_be_forced(
    folder: Path, trace: tuple[Path, list[RequestTrace]], implementation: str
) -> None:
    one, other = eager(folder), eager(folder)
    other.set_experts_implementation(implementation)
    for model in (one, other):
        replay_routing(model.float(), trace[0])
    assert torch.equal(answer(one), answer(other))


def test_executed_experts_are_the_recorded_ones(folder: Path, trace: tuple[Path, list[RequestTrace]]) -> None:
    path, requests = trace
    with finemoe.load(folder, expert_memory="50%") as model:
        replay_routing(model, path)
        tap = RouterTap(model)
        with tap.recording():
            answer(model, new_tokens=4)
        passes = tap.take()
    recorded = requests[0]  # one row of prompt, four decoded
    rows = [[0] * 12, [1], [2], [3]]
    for executed, row in zip(passes, rows, strict=True):
        ids, weights = recorded.expert_ids[row, :3], recorded.weights
        assert weights is not None
        shares = np.where(ids < 8, weights[row, :3].astype(np.float32), 0)
        shares /= shares.sum(-1, keepdims=True)
        for layer in range(3):
            found, expected = np.zeros((len(row), 9)), np.zeros((len(row), 9))
            for token in range(len(row)):
                np.add.at(found[token], executed.ids[token, layer].numpy(), executed.weights[token, layer].numpy())
                np.add.at(expected[token], np.minimum(ids[token, layer], 8), shares[token, layer])
            assert np.allclose(found, expected, atol=0.01)  # weights are bfloat16


def test_policies_get_recorded_gates_and_lookahead(
    folder: Path, trace: tuple[Path, list[RequestTrace]], events: list[Routed]
) -> None:
    path, requests = trace
    with finemoe.load(folder, expert_memory="50%", policy="mixtral-offloading") as model:
        replay_routing(model, path)
        answer(model, new_tokens=3)
    probs, lookahead = requests[0].probs, requests[0].lookahead
    assert probs is not None
    assert lookahead is not None
    routed = events[-6:]  # two decoded tokens
    for number, event in enumerate(routed):
        row, layer = 1 + number // 3, number % 3
        expected = probs[row, layer].astype(np.float32)
        assert event.layer == layer
        assert event.gates is not None
        assert np.allclose(event.gates[0], expected / expected.sum(), atol=1e-3)
        assert event.lookahead is not None
        ahead = lookahead[row, 0, layer].astype(np.float32) if layer < 2 else np.zeros(8)
        assert np.allclose(event.lookahead[0, 0], ahead, atol=1e-3)


def test_missing_lookahead_stays_missing(folder: Path, events: list[Routed], tmp_path: Path) -> None:
    make_trace(tmp_path / "plain", 2, make_header(("weights",), active=3))
    with finemoe.load(folder, policy="finemoe", map_store="none", expert_memory="50%") as model:
        replay_routing(model, tmp_path / "plain")
        answer(model)
    assert all(event.lookahead is None for event in events)
    assert all(np.count_nonzero(event.gates) <= 3 for event in events[-3:] if event.gates is not None)
    with (
        finemoe.load(folder, policy="mixtral-offloading", expert_memory="50%") as model,
        pytest.raises(ConfigError, match="no lookahead, which --policy mixtral-offloading needs"),
    ):
        replay_routing(model, tmp_path / "plain")


def test_saving_maps_of_replayed_routing_is_refused(
    folder: Path, trace: tuple[Path, list[RequestTrace]], tmp_path: Path
) -> None:
    with (
        finemoe.load(folder, policy="finemoe", map_store=tmp_path / "maps", expert_memory="50%") as model,
        pytest.raises(ConfigError, match="--map-store: maps of replayed routing"),
    ):
        replay_routing(model, trace[0])


def test_a_model_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    make_trace(tmp_path / "wider", 1, make_header(experts=9, active=3))
    with pytest.raises(ConfigError, match=r"--replay-routing: .* routes to 3 of 9"):
        replay_routing(eager(folder), tmp_path / "wider")


def test_restarting_gives_the_same_answers_again(folder: Path, trace: tuple[Path, list[RequestTrace]]) -> None:
    model = eager(folder)
    forced = replay_routing(model, trace[0])
    first = answer(model)
    forced.restart()
    assert torch.equal(answer(model), first)


def test_embeddings_in_place_of_tokens_are_refused(folder: Path, trace: tuple[Path, list[RequestTrace]]) -> None:
    model = eager(folder)
    replay_routing(model, trace[0])
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="replayed only"):
        model(inputs_embeds=torch.zeros(1, 3, 64, dtype=torch.bfloat16))
