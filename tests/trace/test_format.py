"""Traces round-trip, are readable by the safetensors library, and are memory-mapped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from finemoe.errors import TraceError
from finemoe.trace import RequestTrace, TraceHeader, TraceWriter, open_trace, split
from finemoe.trace.format import OPTIONAL
from tests.trace.make import equal, make_header, make_request, make_trace


@given(
    present=st.sets(st.sampled_from(OPTIONAL)),
    layers=st.integers(1, 4),
    experts=st.sampled_from([1, 4, 255, 256, 300]),
    shape=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=4),
    appended=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_requests_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    present: set[str],
    layers: int,
    experts: int,
    shape: list[tuple[int, int]],
    appended: bool,
    seed: int,
) -> None:
    header = make_header(tuple(present), layers=layers, experts=experts, active=min(2, experts))
    rng = np.random.default_rng(seed)
    made = [make_request(header, rng, prompt, decoded) for prompt, decoded in shape]
    path = tmp_path_factory.mktemp("round-trip") / "it.trace"
    for requests in [[request] for request in made] if appended else [made]:
        with TraceWriter(path, header, append=appended) as writer:
            for request in requests:
                writer.add(request)
    with open_trace(path) as trace:
        assert trace.header == header
        assert len(trace) == len(made)
        assert all(equal(one, other) for one, other in zip(trace, made, strict=True))
        assert trace.tokens == sum(len(request.token_ids) for request in made)
        assert trace.decode_only == all(request.phases.all() for request in made)


def test_the_safetensors_library_reads_traces(tmp_path: Path) -> None:
    made = make_trace(tmp_path / "it.trace", header=make_header(("weights", "probs", "embeddings")))
    tables = load_file(tmp_path / "it.trace")
    assert np.array_equal(tables["expert_ids"], np.concatenate([request.expert_ids for request in made]))
    assert np.array_equal(tables["iterations"], [len(request) for request in made])
    assert tables["probs"].dtype == np.float16
    with safe_open(tmp_path / "it.trace", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "finemoe-trace"
    assert json.loads(metadata["header"])["experts"] == 8


def test_requests_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    make_trace(tmp_path / "it.trace")
    trace = open_trace(tmp_path / "it.trace")
    request, column = trace.request(1), trace.column("expert_ids")
    assert column is not None
    assert np.shares_memory(request.expert_ids, column)
    with pytest.raises(ValueError, match="read-only"):
        request.expert_ids[0, 0, 0] = 1
    offsets = trace.row_offsets
    assert np.array_equal(column[offsets[1] : offsets[2]], request.expert_ids)
    trace.close()
    assert request.expert_ids.shape[1:] == (3, 2)  # a view stays valid after `close`


def test_columns_are_aligned(tmp_path: Path) -> None:
    header = make_header(OPTIONAL, experts=7)
    make_trace(tmp_path / "it.trace", requests=5, header=header)
    with open_trace(tmp_path / "it.trace") as trace:
        assert all(trace.column(name).flags.aligned for name in ("iterations", "rows", "token_ids", "probs"))  # type: ignore[union-attr]


def test_a_missing_request_is_an_index_error(tmp_path: Path) -> None:
    make_trace(tmp_path / "it.trace")
    with open_trace(tmp_path / "it.trace") as trace, pytest.raises(IndexError, match="no request 3"):
        trace.request(3)


def test_reading_imports_no_torch() -> None:
    check = "import finemoe.trace, finemoe.trace.importing, finemoe.trace.stats, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": None}, "weights"),
        ({"batch": 3}, "batch"),
        ({"token_ids": np.zeros(4, np.int32)}, "token_ids"),
        ({"token_ids": np.zeros(5, np.float32)}, "token_ids"),
        ({"rows": np.array([0, 3, 3, 5])}, "rows"),
        ({"rows": np.array([0, 5])}, "rows"),
        ({"phases": np.array([0, 1, 2], np.uint8)}, "phases"),
        ({"expert_ids": np.full((5, 3, 2), 8, np.uint8)}, "expert_ids"),
        ({"expert_ids": np.full((5, 3, 2), -1)}, "expert_ids"),
        ({"expert_ids": np.full((5, 3, 2), 256)}, "expert_ids"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], named: str) -> None:
    header = make_header()
    good = make_request(header, np.random.default_rng(0))
    bad = RequestTrace(**{**vars(good), **change})
    with TraceWriter(tmp_path / "it.trace", header) as writer:
        writer.add(good)
        with pytest.raises(TraceError, match=named):
            writer.add(bad)
        writer.add(good)
    with open_trace(tmp_path / "it.trace") as trace:
        assert [equal(request, good) for request in trace] == [True, True]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"layers": 0}, "layers"),
        ({"experts": 70_000}, "experts"),
        ({"active": 9}, "9 active of 8"),
        ({"fields": ("probs", "weights")}, "fields"),
        ({"fields": ("lookahead",)}, "lookahead"),
        ({"width": 4}, "embeddings"),
    ],
)
def test_an_inconsistent_header_is_refused(sizes: dict[str, int], named: str) -> None:
    with pytest.raises(TraceError, match=named):
        TraceHeader(**{"model": "m", "layers": 3, "experts": 8, "active": 2, **sizes})  # type: ignore[arg-type]


def test_a_split_is_by_request_shuffled_and_reproducible() -> None:
    store, test = split(10, 0.7, seed=3)
    assert len(store) == 7
    assert sorted([*store, *test]) == list(range(10))
    assert np.array_equal(store, split(10, 0.7, seed=3)[0])
    assert not np.array_equal(store, split(10, 0.7, seed=4)[0])
    assert np.array_equal(np.concatenate([store, test]), np.random.default_rng(3).permutation(10))
