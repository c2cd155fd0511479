"""Imports published routing of gpt-oss-20b and granite-3.0-1b. Needs the traces next to the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finemoe.trace import Trace, open_trace
from finemoe.trace.importing import import_trace
from finemoe.trace.stats import measure

ROUTING = Path(__file__).parents[3] / "shared" / "data" / "routing"
ARRAYS, SIMLLM = ROUTING / "gpt-oss-20b", ROUTING / "granite-3.0-1b"


@pytest.fixture(scope="module", autouse=True)
def _traces_are_here() -> None:
    if not ARRAYS.is_dir() or not SIMLLM.is_dir():
        pytest.skip("the published traces are not next to this repository")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("real") / "large.trace"
    list(import_trace(ARRAYS, path))
    return open_trace(path)


def test_every_row_is_imported(large: Trace) -> None:
    ids, weights = large.column("expert_ids"), large.column("weights")
    assert ids is not None and weights is not None
    with np.load(ARRAYS / "routing.npz") as source:
        assert np.array_equal(ids, source["expert_ids"])
        assert np.array_equal(weights, source["probs"])
        assert np.array_equal(large.row_offsets, source["offsets"])
    header = large.header
    assert (header.layers, header.experts, header.active, len(large), large.tokens) == (24, 32, 4, 425, 124437)
    assert header.vocabulary is not None
    assert [header.vocabulary[token] for token in large.request(0).token_ids[:3]] == [
        "<|channel|>",
        "analysis",
        "<|message|>",
    ]


def test_routing_is_local_within_a_request(large: Trace) -> None:
    stats = measure(large)
    assert stats.reuse["prefill"] is None
    assert stats.reuse["decode"] is not None
    assert stats.reuse["decode"].mean() == pytest.approx(0.430, abs=0.001)
    assert stats.top(0.25, stats.popularity_of_request) > stats.top(0.25, stats.popularity) > 0.5


def test_prefill_and_decode_are_imported(tmp_path: Path) -> None:
    importing = import_trace(SIMLLM / "routing-trace.jsonl", tmp_path / "it.trace")
    assert (len(importing), sum(importing)) == (8, 8 * 27)
    with open_trace(tmp_path / "it.trace") as trace:
        assert (trace.header.layers, trace.header.experts, trace.header.active) == (24, 32, 8)
        assert all(request.phases.tolist() == [0] + [1] * 19 for request in trace)
        assert trace.request(0).expert_ids[0, 0].tolist() == [13, 14, 29, 28, 12, 18, 1, 23]
