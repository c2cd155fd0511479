"""Statistics are what plain loops over the trace give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finemoe.trace import Trace, open_trace
from finemoe.trace import stats as counting
from finemoe.trace.stats import TraceStats, measure
from tests.trace.make import make_header, make_trace

FIELDS = ("weights", "probs", "lookahead")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("stats") / "it.trace"
    make_trace(path, requests=6, header=make_header(FIELDS))
    return open_trace(path)


@pytest.fixture(scope="module", params=[counting._CHUNK_ROWS, 2])
def stats(trace: Trace, request: pytest.FixtureRequest) -> TraceStats:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_CHUNK_ROWS", request.param)
        return measure(trace)


def sets(trace: Trace, index: int, layer: int) -> list[set[int]]:
    ids = trace.request(index).expert_ids[:, layer]
    return [{int(expert) for expert in row if expert < trace.header.experts} for row in ids]


def test_reuse_is_the_share_of_experts_that_the_token_before_executed(trace: Trace, stats: TraceStats) -> None:
    for phase, code in (("prefill", 0), ("decode", 1)):
        again, ran = np.zeros(3), np.zeros(3)
        for index, request in enumerate(trace):
            phases = np.repeat(request.phases, np.diff(request.rows))
            for layer in range(3):
                executed = sets(trace, index, layer)
                for row in range(1, len(executed)):
                    if phases[row] == code:
                        again[layer] += len(executed[row] & executed[row - 1])
                        ran[layer] += len(executed[row])
        assert stats.reuse[phase] == pytest.approx(again / ran)


def test_usage_and_popularity_count_accesses(trace: Trace, stats: TraceStats) -> None:
    usage = np.zeros((3, 8), int)
    for index in range(len(trace)):
        for layer in range(3):
            for executed in sets(trace, index, layer):
                for expert in executed:
                    usage[layer, expert] += 1
    assert np.array_equal(stats.usage, usage)
    most = np.sort(usage.reshape(-1))[::-1]
    assert stats.top(0.25, stats.popularity) == pytest.approx(most[:6].sum() / usage.sum())
    assert stats.top(0.5, stats.popularity_of_request) >= stats.top(0.5, stats.popularity)


def test_recall_is_of_the_executed_experts_among_as_many_foreseen(trace: Trace, stats: TraceStats) -> None:
    assert stats.recall is not None
    for distance in (1, 2):
        found = ran = 0
        for index, request in enumerate(trace):
            assert request.lookahead is not None
            for layer in range(3 - distance):
                for row, executed in enumerate(sets(trace, index, layer + distance)):
                    scores = request.lookahead[row, distance - 1, layer]
                    found += len(executed & set(np.argsort(-scores.astype(float))[:2].tolist()))
                    ran += len(executed)
        assert stats.recall[distance - 1] == pytest.approx(found / ran, abs=0.02)  # equal scores may go either way


def test_entropies_are_in_bits(trace: Trace, stats: TraceStats) -> None:
    probs = trace.column("probs")
    assert probs is not None and stats.gate_entropy is not None
    shares = probs.astype(float) / probs.astype(float).sum(2, keepdims=True)
    expected = -(shares * np.log2(shares)).sum(2).mean(0)
    assert stats.gate_entropy == pytest.approx(expected)
    assert (stats.usage_entropy <= 3).all()


def test_what_was_not_recorded_is_said_to_be_so(tmp_path: Path) -> None:
    make_trace(tmp_path / "it.trace", header=make_header(()))
    with open_trace(tmp_path / "it.trace") as trace:
        stats = measure(trace)
    told = stats.as_dict()
    assert told["gate_entropy"] is None
    assert told["lookahead_recall"] is None
    assert str(stats).count("not recorded") == 2
