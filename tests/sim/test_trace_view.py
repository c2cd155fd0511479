"""What a policy may observe of a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemoe.sim.workload import TraceView, make_schedule, mean_gates
from finemoe.trace import Trace, open_trace
from finemoe.types import DECODE, PREFILL
from tests.policy.compile import compiled
from tests.sim.by_hand import request, write_trace
from tests.sim.traces import make_trace
from tests.trace.make import make_header
from tests.trace.make import make_trace as random_trace

# a prompt of two tokens, then one more; one layer, K = 2 of 4
IDS = [[[0, 1]], [[1, 3]], [[2, 0]]]
WEIGHTS = np.array([[[3, 1]], [[2, 2]], [[0.75, 0.25]]], np.float16)
PROBS = np.array([[[0.5, 0.25, 0.25, 0]], [[0, 0.5, 0, 0.5]], [[0.25, 0, 0.75, 0]]], np.float16)
COUNTS = [2, 1]


def small(folder: Path, **fields: Any) -> Trace:
    return write_trace(folder / "small.trace", [request(IDS, COUNTS, **fields)], experts=4)


def gates(trace: Trace) -> Any:
    """Of all iterations, one request at a time: `[S, L, E]`."""
    schedule, view = make_schedule(trace, range(len(trace))), TraceView(trace)
    shown = [view.gates(schedule, i) for i in range(len(schedule))]
    return None if shown[0] is None else np.concatenate([g for g in shown if g is not None])


def test_gates_are_the_recorded_distributions_the_mean_over_a_prompt(tmp_path: Path) -> None:
    shown = gates(small(tmp_path, probs=PROBS))
    np.testing.assert_allclose(shown[:, 0], [[0.25, 0.375, 0.125, 0.25], [0.25, 0, 0.75, 0]])


def test_weights_alone_give_gates_that_are_zero_elsewhere_and_sum_to_1(tmp_path: Path) -> None:
    shown = gates(small(tmp_path, weights=WEIGHTS))
    np.testing.assert_allclose(shown[:, 0], [[0.375, 0.375, 0, 0.25], [0.25, 0, 0.75, 0]])


def test_distributions_are_preferred_to_weights(tmp_path: Path) -> None:
    both = gates(small(tmp_path, probs=PROBS, weights=WEIGHTS))
    np.testing.assert_allclose(both[:, 0], [[0.25, 0.375, 0.125, 0.25], [0.25, 0, 0.75, 0]])


def test_without_probs_and_weights_there_are_no_gates_and_no_recorded_requests(tmp_path: Path) -> None:
    trace = small(tmp_path)
    assert gates(trace) is None
    assert TraceView(trace).fields == frozenset()
    assert list(TraceView(trace).recorded([0])) == []


def test_tokens_without_any_expert_have_no_gate(tmp_path: Path) -> None:
    weights = np.array([[[1, 1]]], np.float16)
    trace = write_trace(tmp_path / "none.trace", [request([[[255, 255]]], weights=weights)])
    assert not gates(trace).any()


@pytest.mark.parametrize("fields", [("probs",), ("weights",), ("weights", "probs", "embeddings")])
def test_recorded_requests_equal_what_is_observed(tmp_path: Path, fields: tuple[str, ...]) -> None:
    random_trace(tmp_path / "it.trace", 3, make_header(fields))
    trace = open_trace(tmp_path / "it.trace")
    view = TraceView(trace)
    for index, recorded in enumerate(view.recorded(range(3))):
        schedule = make_schedule(trace, [index])
        seen = [view.gates(schedule, i) for i in range(len(schedule))]
        steps = [view.steps(schedule, i)[0] for i in range(len(schedule))]
        np.testing.assert_allclose(recorded.gates, np.concatenate([g for g in seen if g is not None]), rtol=1e-3)
        assert recorded.phases.tolist() == [step.phase for step in steps]
        assert recorded.token_ids.tolist() == [step.token_ids[-1] for step in steps]
        needed = np.zeros(recorded.executed.size, np.bool_)
        events = np.repeat(np.arange(len(schedule) * schedule.layers), np.diff(schedule.ptr))
        needed[(events // schedule.layers) * schedule.layers * schedule.experts + schedule.needs] = True
        np.testing.assert_array_equal(recorded.executed.ravel(), needed)
        if recorded.embeddings is None:
            assert all(step.embedding is None for step in steps)
        else:
            np.testing.assert_array_equal(recorded.embeddings, [step.embedding for step in steps])


def test_steps_have_request_tokens_and_embedding(tmp_path: Path) -> None:
    embeddings = np.array([[1, 2], [3, 4]], np.float16)
    one = request(IDS, COUNTS, embeddings=embeddings)
    other = request(IDS, COUNTS, embeddings=10 * embeddings, first_token=7)
    trace = write_trace(tmp_path / "it.trace", [one, other], experts=4, width=2)
    schedule = make_schedule(trace, [1, 0], interleave=2)
    steps = [TraceView(trace).steps(schedule, i) for i in range(2)]
    assert [[(s.request, s.phase, s.token_ids.tolist()) for s in each] for each in steps] == [
        [(1, PREFILL, [7, 8]), (0, PREFILL, [0, 1])],
        [(1, DECODE, [9]), (0, DECODE, [2])],
    ]
    shown = [[s.embedding.tolist() for s in each if s.embedding is not None] for each in steps]
    assert shown == [[[10, 20], [1, 2]], [[30, 40], [3, 4]]]


def test_recorded_lookahead_is_the_mean_over_a_prompt_layer_by_layer(tmp_path: Path) -> None:
    trace = make_trace(tmp_path, requests=1, iterations=2)
    schedule, column = make_schedule(trace, [0]), trace.column("lookahead")
    assert column is not None
    shown = TraceView(trace).lookahead(schedule, 0)
    assert shown is not None
    prompt = column[: schedule.rows[0, 1]].astype(np.float32)
    np.testing.assert_allclose(shown[0], prompt.mean(axis=0).swapaxes(0, 1), rtol=1e-5)  # [L, n, E]


def test_without_recorded_lookahead_there_is_none(tmp_path: Path) -> None:
    trace = small(tmp_path, probs=PROBS)
    assert TraceView(trace).lookahead(make_schedule(trace, [0]), 0) is None


# emulated lookahead: made up from the truth, one layer ahead
LAYERS, EXPERTS, ACTIVE, TOKENS = 30, 32, 4, 40


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    ids = np.random.default_rng(0).random((TOKENS, LAYERS, EXPERTS)).argsort(2)[..., :ACTIVE]
    return write_trace(tmp_path_factory.mktemp("deep") / "it.trace", [request(ids)], experts=EXPERTS)


def emulated(trace: Trace, recall: float, seed: int = 0) -> Any:
    """`[S, L, E]`."""
    schedule, view = make_schedule(trace, [0]), TraceView(trace, (recall,), seed)
    assert "lookahead" in view.fields
    shown = [view.lookahead(schedule, i) for i in range(len(schedule))]
    return np.concatenate([ahead[:, :, 0] for ahead in shown if ahead is not None])


@pytest.mark.parametrize("recall", [0.0, 0.5, 0.8, 1.0])
def test_recall_is_as_declared_and_wrong_ones_are_wrong(deep: Trace, recall: float) -> None:
    ids = deep.column("expert_ids")
    assert ids is not None
    truth = np.zeros((TOKENS, LAYERS, EXPERTS), np.bool_)
    np.put_along_axis(truth, ids.astype(np.int64), values=True, axis=2)
    predicted = emulated(deep, recall)[:, :-1] > 0
    assert (predicted & truth[:, 1:]).sum() / truth[:, 1:].sum() == pytest.approx(recall, abs=0.02)
    assert (predicted.sum(axis=2) == ACTIVE).all()  # had a wrong one been among the truth, there would be fewer


def test_emulated_lookahead_is_a_distribution_over_the_next_layer(deep: Trace) -> None:
    shown = emulated(deep, 0.8)
    np.testing.assert_allclose(shown[:, :-1].sum(axis=2), 1, rtol=1e-6)
    assert not shown[:, -1].any()


def test_the_same_rows_have_the_same_errors_whoever_asks_and_when(deep: Trace) -> None:
    schedule, view = make_schedule(deep, [0]), TraceView(deep, (0.8,))
    last, again = (view.lookahead(schedule, TOKENS - 1) for _ in range(2))
    assert last is not None
    assert again is not None
    np.testing.assert_array_equal(last, again)
    np.testing.assert_array_equal(last[0, :, 0], emulated(deep, 0.8)[-1])
    assert not np.array_equal(last[0, :, 0], emulated(deep, 0.8, seed=1)[-1])


def test_several_layers_ahead_each_have_their_own_recall(deep: Trace) -> None:
    recalls = (1.0, 0.5, 0.0)
    schedule, view = make_schedule(deep, [0]), TraceView(deep, recalls)
    shown = [view.lookahead(schedule, i) for i in range(len(schedule))]
    ahead = np.concatenate([each for each in shown if each is not None])  # [S, L, n, E]
    ids = deep.column("expert_ids")
    assert ids is not None
    truth = np.zeros((TOKENS, LAYERS, EXPERTS), np.bool_)
    np.put_along_axis(truth, ids.astype(np.int64), values=True, axis=2)
    assert ahead.shape == (TOKENS, LAYERS, len(recalls), EXPERTS)
    for distance, recall in enumerate(recalls, 1):
        predicted = ahead[:, :-distance, distance - 1] > 0
        assert (predicted & truth[:, distance:]).sum() / truth[:, distance:].sum() == pytest.approx(recall, abs=0.03)
        assert not ahead[:, -distance:, distance - 1].any()
    np.testing.assert_array_equal(ahead[:, :, 0], emulated(deep, 1.0))  # whatever the other recalls


def one_iteration(folder: Path, ids: Any, recall: float, **header: Any) -> Any:
    """Emulated lookahead of the first layer `[E]`, for a prompt of these experts `[T, 2, K]`."""
    trace = write_trace(folder / "it.trace", [request(ids, [len(ids)])], **header)
    return emulated(trace, recall)[0, 0]


def test_a_prompts_lookahead_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    shown = one_iteration(tmp_path, [[[0, 1], [2, 3]], [[0, 1], [3, 4]]], 1.0)
    np.testing.assert_allclose(shown, [0, 0, 0.25, 0.5, 0.25, 0, 0, 0])


@pytest.mark.parametrize("recall", [0.0, 1.0])
def test_sentinels_are_never_predicted(tmp_path: Path, recall: float) -> None:
    shown = one_iteration(tmp_path, [[[0, 1], [5, 255]]], recall)
    assert np.count_nonzero(shown) == 1
    assert (shown[5] > 0) == bool(recall)


def test_fewer_experts_are_predicted_if_wrong_ones_run_out(tmp_path: Path) -> None:
    shown = one_iteration(tmp_path, [[[0, 1], [0, 2]]], 0.0, experts=3)
    assert np.flatnonzero(shown).tolist() == [1]


def test_compiled_and_interpreted_mean_gates_agree() -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, 10, (5, 3, 2)).astype(np.uint8)  # 8 and 9 are sentinels
    weights = random.random((5, 3, 2)).astype(np.float32)
    interpreted_, compiled_ = np.ones((2, 3, 8), np.float32)
    mean_gates(ids, weights, interpreted_)
    compiled(mean_gates)(ids, weights, compiled_)
    np.testing.assert_allclose(interpreted_, compiled_, rtol=1e-6)
