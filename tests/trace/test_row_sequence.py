"""The recorded rows that a request's tokens get, and the checks of a trace before its routing is replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.errors import ConfigError, TraceError
from finemoe.trace import Trace, TraceWriter, open_trace
from finemoe.trace.forced_routing import RowSequence, check_fit, open_routing
from tests.trace.make import make_header, make_request

DECODED = (4, 2, 7)


@pytest.fixture(scope="module", params=[0, 3], ids=["decode only", "with prompts"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Three requests, each with a number of prompt rows (the parameter) and its decoded rows."""
    path, header = tmp_path_factory.mktemp("rows") / "trace", make_header(("weights",))
    rng = np.random.default_rng(0)
    with TraceWriter(path, header) as writer:
        for decoded in DECODED:
            writer.add(make_request(header, rng, prompt=request.param, decoded=decoded))
    return open_trace(path)


def decoded_rows(trace: Trace, index: int) -> list[int]:
    return list(range(int(trace.row_offsets[index + 1]) - DECODED[index], int(trace.row_offsets[index + 1])))


@settings(deadline=None)
@given(prompts=st.lists(st.integers(1, 9), min_size=1, max_size=4), steps=st.integers(0, 13))
def test_decode_step_t_gets_decoded_iteration_t_then_those_of_the_next_request(
    trace: Trace, prompts: list[int], steps: int
) -> None:
    sequence = RowSequence(trace, iter(range(3)))
    for tokens in prompts:
        sequence.next_prompt(tokens)
    rows = [int(sequence.next_decode()[0]) for _ in range(steps)]
    assert rows == [row for index in range(3) for row in decoded_rows(trace, index)][:steps]


@settings(deadline=None)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_prompt_gets_the_same_rows_however_it_is_chunked(trace: Trace, chunks: list[int]) -> None:
    chunked, unchunked = RowSequence(trace, iter(range(3))), RowSequence(trace, iter(range(3)))
    rows = np.concatenate([chunked.next_prompt(tokens) for tokens in chunks]).tolist()
    assert rows == unchunked.next_prompt(sum(chunks)).tolist()
    first, last = (int(offset) for offset in trace.row_offsets[:2])
    recorded = list(range(first, first + 3)) if not trace.decode_only else list(range(first, last))[::-1]
    assert rows == [recorded[position % len(recorded)] for position in range(sum(chunks))]


def test_each_request_gets_the_next_recorded_one_until_none_is_left(trace: Trace) -> None:
    unused = iter(range(3))
    firsts = [int(RowSequence(trace, unused).next_decode()[0]) for _ in range(3)]
    assert firsts == [decoded_rows(trace, index)[0] for index in range(3)]
    with pytest.raises(TraceError, match=r"--replay-routing: all 3 requests of .* are replayed; ask for fewer"):
        RowSequence(trace, unused)


def test_an_answer_longer_than_the_trace_is_an_error(trace: Trace) -> None:
    sequence = RowSequence(trace, iter(range(3)))
    for _ in range(sum(DECODED)):
        sequence.next_decode()
    with pytest.raises(TraceError, match="shorter answers"):
        sequence.next_decode()


@pytest.mark.parametrize(("layers", "experts", "active"), [(4, [8] * 4, 2), (3, [8, 8, 6], 2), (3, [8] * 3, 3)])
def test_a_trace_of_another_shape_is_refused(trace: Trace, layers: int, experts: list[int], active: int) -> None:
    with pytest.raises(ConfigError, match=r"--replay-routing: .* routes to 2 of 8 experts in 3 layers, model-x to"):
        check_fit(trace, "model-x", layers, experts, active)


def test_a_model_with_fewer_layers_than_the_trace_is_accepted(trace: Trace) -> None:
    check_fit(trace, "model-x", 2, [8, 8], 2)


def test_a_missing_trace_and_one_without_weights_are_refused(tmp_path: Path) -> None:
    header = make_header(())
    with TraceWriter(tmp_path / "ids", header) as writer:
        writer.add(make_request(header, np.random.default_rng(0)))
    with pytest.raises(TraceError, match=r"--replay-routing: .*neither weights nor probs"):
        open_routing(tmp_path / "ids")
    with pytest.raises(TraceError, match=r"--replay-routing: .*no such trace"):
        open_routing(tmp_path / "nowhere")
