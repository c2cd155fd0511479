"""Schedules, against a naive implementation with sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.sim.workload import Schedule, make_schedule, unions
from finemoe.trace import Trace, open_trace
from tests.policy.compile import compiled
from tests.sim.by_hand import request, write_trace
from tests.trace.make import make_header, make_trace

LENGTHS = (3, 1, 2)  # iterations of the requests


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Prompts of 1 to 5 tokens, some of which execute fewer than K experts."""
    path = tmp_path_factory.mktemp("traces") / "ragged.trace"
    make_trace(path, 5, make_header(), seed=4)
    return open_trace(path)


@pytest.fixture
def short(tmp_path: Path) -> Trace:
    """Decoding only; expert ids: the request, and 4 + the iteration."""
    ids = [[[[r, 4 + i]] for i in range(length)] for r, length in enumerate(LENGTHS)]
    return write_trace(tmp_path / "short.trace", map(request, ids))


# by iteration: the (request, iteration) steps, and the experts that each layer needs
Played = list[tuple[list[tuple[int, int]], list[set[int]]]]


def naive_schedule(trace: Trace, requests: list[int], interleave: int) -> Played:
    """The dumbest correct implementation."""
    waiting, played = list(requests), []
    running: list[tuple[int, int]] = []
    while waiting or running:
        while waiting and len(running) < interleave:
            running.append((waiting.pop(0), 0))
        needed: list[set[int]] = [set() for _ in range(trace.header.layers)]
        for index, iteration in running:
            recorded = trace.request(index)
            for row in recorded.expert_ids[recorded.rows[iteration] : recorded.rows[iteration + 1]]:
                for layer, executed in enumerate(row.tolist()):
                    needed[layer] |= {expert for expert in executed if expert < trace.header.experts}
        played.append((running, needed))
        running = [(index, i + 1) for index, i in running if i + 1 < len(trace.request(index))]
    return played


def read(schedule: Schedule) -> Played:
    """A schedule in the form of `naive_schedule`; checks that needs are ascending and distinct."""
    played = []
    for i in range(len(schedule)):
        members = range(schedule.steps[i], schedule.steps[i + 1])
        needed = []
        for layer in range(schedule.layers):
            event = i * schedule.layers + layer
            needs = schedule.needs[schedule.ptr[event] : schedule.ptr[event + 1]].tolist()
            assert needs == sorted(set(needs))
            needed.append({need - layer * schedule.experts for need in needs})
        played.append(([(int(schedule.request[m]), int(schedule.iteration[m])) for m in members], needed))
    return played


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True), st.integers(1, 4))
def test_a_schedule_equals_the_naive_one(ragged: Trace, requests: list[int], interleave: int) -> None:
    schedule = make_schedule(ragged, requests, interleave)
    assert read(schedule) == naive_schedule(ragged, requests, interleave)
    counts = np.diff(schedule.rows, axis=1)[:, 0]
    for i, tokens in enumerate(schedule.tokens):
        assert tokens == counts[schedule.steps[i] : schedule.steps[i + 1]].sum()


def test_a_prompt_needs_the_union_over_its_tokens(tmp_path: Path) -> None:
    prompt = request([[[0, 1]], [[1, 5]], [[7, 0]], [[2, 3]]], [3, 1])
    schedule = make_schedule(write_trace(tmp_path / "it.trace", [prompt]), [0])
    assert read(schedule) == [([(0, 0)], [{0, 1, 5, 7}]), ([(0, 1)], [{2, 3}])]
    assert schedule.phases.tolist() == [0, 1]
    assert schedule.tokens.tolist() == [3, 1]


def test_sentinels_stand_for_no_expert(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "it.trace", [request([[[0, 255], [255, 255]]])])
    assert read(make_schedule(trace, [0])) == [([(0, 0)], [{0}, set()])]


def test_requests_run_one_after_the_other_in_the_order_given(short: Trace) -> None:
    assert [members for members, _ in read(make_schedule(short, [2, 0]))] == [
        [(2, 0)], [(2, 1)], [(0, 0)], [(0, 1)], [(0, 2)],
    ]  # fmt: skip


def test_the_next_request_begins_when_one_has_ended(short: Trace) -> None:
    played = read(make_schedule(short, [0, 1, 2], interleave=2))
    assert [members for members, _ in played] == [
        [(0, 0), (1, 0)],
        [(0, 1), (2, 0)],  # the second request had one iteration
        [(0, 2), (2, 1)],
    ]
    assert [needed for _, needed in played] == [[{0, 1, 4}], [{0, 2, 4, 5}], [{0, 2, 5, 6}]]


def test_interleave_may_exceed_the_number_of_requests(short: Trace) -> None:
    schedule = make_schedule(short, [0, 1, 2], interleave=9)
    assert np.diff(schedule.steps).tolist() == [3, 2, 1]


@pytest.mark.parametrize("experts", [9, 300])
def test_compiled_and_interpreted_unions_agree(experts: int) -> None:
    random = np.random.default_rng(experts)
    kind = np.uint8 if experts < 255 else np.uint16
    ids = random.integers(0, experts + 2, (40, 3, 4)).astype(kind)  # the highest are sentinels
    ends = np.cumsum(random.integers(1, 4, 15))
    rows = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1).astype(np.int64)
    steps = np.array([0, 2, 3, 7, 15])
    for plain, fast in zip(unions(steps, rows, ids, experts), compiled(unions)(steps, rows, ids, experts), strict=True):
        np.testing.assert_array_equal(plain, fast)
