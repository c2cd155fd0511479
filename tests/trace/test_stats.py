"""Statistics equal those of plain loops over the trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finemoe.trace import Trace, open_trace
from finemoe.trace import stats as stats_module
from finemoe.trace.stats import TraceStats, measure
from tests.trace.make import make_header, make_trace

FIELDS = ("weights", "probs", "lookahead")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("stats") / "it.trace"
    make_trace(path, requests=6, header=make_header(FIELDS))
    return open_trace(path)


@pytest.fixture(scope="module", params=[stats_module._CHUNK_ROWS, 2])
def stats(trace: Trace, request: pytest.FixtureRequest) -> TraceStats:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats_module, "_CHUNK_ROWS", request.param)
        return measure(trace)


def executed_sets(trace: Trace, index: int, layer: int) -> list[set[int]]:
    """The executed experts of each token of a request."""
    ids = trace.request(index).expert_ids[:, layer]
    return [{int(expert) for expert in row if expert < trace.header.experts} for row in ids]


def test_reuse_is_the_share_of_experts_that_the_previous_token_executed(trace: Trace, stats: TraceStats) -> None:
    for phase, code in (("prefill", 0), ("decode", 1)):
        reused, total = np.zeros(3), np.zeros(3)
        for index, request in enumerate(trace):
            phases = np.repeat(request.phases, np.diff(request.rows))
            for layer in range(3):
                executed = executed_sets(trace, index, layer)
                for row in range(1, len(executed)):
                    if phases[row] == code:
                        reused[layer] += len(executed[row] & executed[row - 1])
                        total[layer] += len(executed[row])
        assert stats.reuse[phase] == pytest.approx(reused / total)


def test_usage_and_popularity_count_accesses(trace: Trace, stats: TraceStats) -> None:
    usage = np.zeros((3, 8), int)
    for index in range(len(trace)):
        for layer in range(3):
            for executed in executed_sets(trace, index, layer):
                for expert in executed:
                    usage[layer, expert] += 1
    assert np.array_equal(stats.usage, usage)
    most = np.sort(usage.reshape(-1))[::-1]
    assert stats.top(0.25, stats.popularity) == pytest.approx(most[:6].sum() / usage.sum())
    assert stats.top(0.5, stats.popularity_of_request) >= stats.top(0.5, stats.popularity)


def test_recall_is_the_share_of_executed_experts_among_the_top_predicted(trace: Trace, stats: TraceStats) -> None:
    assert stats.recall is not None
    for distance in (1, 2):
        hits = total = 0
        for index, request in enumerate(trace):
            assert request.lookahead is not None
            for layer in range(3 - distance):
                for row, executed in enumerate(executed_sets(trace, index, layer + distance)):
                    scores = request.lookahead[row, distance - 1, layer]
                    hits += len(executed & set(np.argsort(-scores.astype(float))[:2].tolist()))
                    total += len(executed)
        assert stats.recall[distance - 1] == pytest.approx(hits / total, abs=0.02)  # ties may be broken differently


def test_entropies_are_in_bits(trace: Trace, stats: TraceStats) -> None:
    probs = trace.column("probs")
    assert probs is not None and stats.gate_entropy is not None
    shares = probs.astype(float) / probs.astype(float).sum(2, keepdims=True)
    expected = -(shares * np.log2(shares)).sum(2).mean(0)
    assert stats.gate_entropy == pytest.approx(expected)
    assert (stats.usage_entropy <= 3).all()


def test_statistics_of_missing_fields_are_not_recorded(tmp_path: Path) -> None:
    make_trace(tmp_path / "it.trace", header=make_header(()))
    with open_trace(tmp_path / "it.trace") as trace:
        stats = measure(trace)
    table = stats.as_dict()
    assert table["gate_entropy"] is None
    assert table["lookahead_recall"] is None
    assert str(stats).count("not recorded") == 2
