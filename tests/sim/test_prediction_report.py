"""A policy's predictions against recorded routing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finemoe.errors import ConfigError
from finemoe.policy import make_policy
from finemoe.sim.prediction_report import RoutingPrediction, draw_prediction, predict_request
from finemoe.trace import Trace
from finemoe.types import DECODE
from tests.sim.by_hand import request, write_trace
from tests.sim.traces import EXPERTS, LAYERS, make_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return make_trace(tmp_path_factory.mktemp("traces"), requests=4, prompt=3)


@pytest.mark.parametrize("name", ["finemoe", "expert-map"])
def test_predictions_are_probabilities_and_needs_are_recorded(trace: Trace, name: str) -> None:
    found = predict_request(trace, make_policy(name, LAYERS, EXPERTS), 3, [0, 1, 2, 3])
    assert found.expected.shape == found.needed.shape == (len(trace.request(3)), LAYERS, EXPERTS)
    assert (found.expected >= 0).all() and (found.expected <= 1).all()
    executed = trace.request(3).expert_ids
    last = found.needed[-1]
    assert all(set(np.flatnonzero(last[layer])) == set(executed[-1, layer].tolist()) for layer in range(LAYERS))
    assert (found.recall >= 0).all() and (found.recall <= 1).all()


def test_repeated_routing_is_predicted(tmp_path: Path) -> None:
    again = np.tile([[1, 4], [2, 7], [0, 3]], (9, 1, 1))
    weights = np.full(again.shape, 0.5, np.float16)
    trace = write_trace(tmp_path / "again.trace", [request(again, weights=weights)] * 2)
    found = predict_request(trace, make_policy("finemoe", 3, 8), 1, [0])
    assert found.recall[1:].min() == 1


def test_recall_is_a_share_of_the_needed_experts() -> None:
    expected = np.array([[[0.9, 0.1, 0.5, 0.4]]], np.float32)
    needed = np.array([[[True, False, False, True]]])
    assert RoutingPrediction(expected, needed, np.array([DECODE], np.uint8)).recall.tolist() == [[0.5]]


def test_unknown_requests_and_policies_without_predictions_are_refused(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="--request: 4 is not one of 0 to 3"):
        predict_request(trace, make_policy("finemoe", LAYERS, EXPERTS), 4, [])
    with pytest.raises(ConfigError, match="--policy"):
        predict_request(trace, make_policy("lru", LAYERS, EXPERTS), 0, [])


@pytest.mark.parametrize("iteration", [None, 0])
def test_a_figure_is_drawn(trace: Trace, tmp_path: Path, iteration: int | None) -> None:
    pytest.importorskip("matplotlib")
    found = predict_request(trace, make_policy("finemoe", LAYERS, EXPERTS), 3, [0])
    draw_prediction(found, "a request", tmp_path / "map.png", iteration)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
