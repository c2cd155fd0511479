"""Which recorded rows the tokens of a request take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.errors import ConfigError, TraceError
from finemoe.trace import Trace, TraceWriter, open_trace
from finemoe.trace.forced_routing import Course, check_fit, open_routing
from tests.trace.make import make_header, make_request

DECODED = (4, 2, 7)


@pytest.fixture(scope="module", params=[0, 3], ids=["decode only", "with prompts"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Three requests; `prompt` rows each before what was decoded."""
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
def test_decode_step_t_takes_decoded_iteration_t_and_goes_on_with_the_next_request(
    trace: Trace, prompts: list[int], steps: int
) -> None:
    course = Course(trace, iter(range(3)))
    for tokens in prompts:
        course.feed(tokens)
    taken = [int(course.step()[0]) for _ in range(steps)]
    assert taken == [row for index in range(3) for row in decoded_rows(trace, index)][:steps]


@settings(deadline=None)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_prompt_takes_rows_of_its_request_however_it_is_cut(trace: Trace, pieces: list[int]) -> None:
    cut, whole = Course(trace, iter(range(3))), Course(trace, iter(range(3)))
    taken = np.concatenate([cut.feed(tokens) for tokens in pieces]).tolist()
    assert taken == whole.feed(sum(pieces)).tolist()
    first, last = (int(offset) for offset in trace.row_offsets[:2])
    recorded = list(range(first, first + 3)) if not trace.decode_only else list(range(first, last))[::-1]
    assert taken == [recorded[position % len(recorded)] for position in range(sum(pieces))]


def test_each_request_takes_the_next_recorded_one_until_none_is_left(trace: Trace) -> None:
    untaken = iter(range(3))
    firsts = [int(Course(trace, untaken).step()[0]) for _ in range(3)]
    assert firsts == [decoded_rows(trace, index)[0] for index in range(3)]
    with pytest.raises(TraceError, match=r"--replay-routing: all 3 requests of .* are replayed; ask for fewer"):
        Course(trace, untaken)


def test_a_request_that_runs_out_of_the_trace_says_so(trace: Trace) -> None:
    course = Course(trace, iter(range(3)))
    for _ in range(sum(DECODED)):
        course.step()
    with pytest.raises(TraceError, match="shorter answers"):
        course.step()


@pytest.mark.parametrize(("layers", "experts", "active"), [(4, [8] * 4, 2), (3, [8, 8, 6], 2), (3, [8] * 3, 3)])
def test_a_trace_of_another_shape_is_refused(trace: Trace, layers: int, experts: list[int], active: int) -> None:
    with pytest.raises(ConfigError, match=r"--replay-routing: .* routes to 2 of 8 experts in 3 layers, model-x to"):
        check_fit(trace, "model-x", layers, experts, active)


def test_a_model_with_fewer_layers_takes_the_first_ones(trace: Trace) -> None:
    check_fit(trace, "model-x", 2, [8, 8], 2)


def test_a_trace_without_weights_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    header = make_header(())
    with TraceWriter(tmp_path / "ids", header) as writer:
        writer.add(make_request(header, np.random.default_rng(0)))
    with pytest.raises(TraceError, match=r"--replay-routing: .*neither weights nor probs"):
        open_routing(tmp_path / "ids")
    with pytest.raises(TraceError, match=r"--replay-routing: .*no such trace"):
        open_routing(tmp_path / "nowhere")
