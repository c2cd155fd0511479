"""Who runs next: the function alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.serving.schedule import OVERTAKEN, Expected, Waiting, choose, overtaken


def using(*experts: int) -> Expected:
    """Of one layer of four."""
    made = np.zeros((1, 4))
    made[0, list(experts)] = 1.0
    return made


def expectations() -> st.SearchStrategy[Expected | None]:
    shares = st.lists(st.floats(0, 1), min_size=4, max_size=4)
    return st.none() | shares.map(lambda each: np.array(each).reshape(2, 2))


def test_who_needs_what_runs_anyway_goes_first() -> None:
    waiting = [Waiting(using(2, 3), 9), Waiting(using(0, 3), 9), Waiting(using(0, 1), 9)]
    assert choose(waiting, [using(0, 1)], 1) == [2]
    assert choose(waiting, [using(0, 1)], 2) == [2, 1]
    assert choose(waiting, [using(2, 3)], 1) == [0]
    assert choose(waiting, [None, using(0, 1)], 9) == [2, 1, 0]


def test_the_first_to_come_begins_and_the_others_are_chosen_to_fit_it() -> None:
    waiting = [Waiting(using(0), 9), Waiting(using(1), 9), Waiting(using(0, 1), 9), Waiting(using(0), 9)]
    assert choose(waiting, [], 2) == [0, 3]
    assert choose(waiting, [None], 3) == [0, 3, 2]


@pytest.mark.parametrize("running", [[], [None], [using(0)]])
def test_where_nothing_is_known_they_go_in_turn(running: list[Any]) -> None:
    assert choose([Waiting(None, 9)] * 4, running, 3) == [0, 1, 2]
    assert choose([Waiting(np.zeros((1, 4)), 9)] * 4, running, 3) == [0, 1, 2]


def test_who_may_not_be_overtaken_is_not() -> None:
    waiting = [Waiting(using(3), 1), Waiting(using(2), 0), Waiting(using(0), 9), Waiting(using(0), 9)]
    assert choose(waiting, [using(0)], 1) == [0]  # as they overlap alike
    assert choose([waiting[0], *waiting[2:]], [using(0)], 3) == [1, 0, 2]
    assert choose(waiting[1:], [using(0)], 3) == [0, 1, 2]


@given(
    waiting=st.lists(st.tuples(expectations(), st.integers(0, 3)), max_size=8),
    running=st.lists(expectations(), max_size=3),
    places=st.integers(0, 10),
)
def test_places_are_filled_and_no_bound_is_broken(
    waiting: list[tuple[Expected | None, int]], running: list[Expected | None], places: int
) -> None:
    chosen = choose([Waiting(*each) for each in waiting], running, places)
    assert len(chosen) == len(set(chosen)) == min(places, len(waiting))
    assert set(chosen) <= set(range(len(waiting)))
    for index, (_, overtakable) in enumerate(waiting):
        before = chosen[: chosen.index(index)] if index in chosen else chosen
        assert overtaken(index, before) <= overtakable


@settings(max_examples=30)
@given(data=st.data())
def test_nobody_starves_whoever_comes(data: st.DataObject) -> None:
    """However well the others fit: after `OVERTAKEN` of them it is one's turn."""
    arrivals = data.draw(st.lists(st.integers(0, 3), min_size=5, max_size=30))
    waiting: list[list[Any]] = []  # name, expected, times overtaken
    ran: list[int] = []
    came, running = 0, [using(0)]
    while came < len(arrivals) or waiting:
        for _ in range(data.draw(st.integers(0 if waiting else 1, 4))):
            if came < len(arrivals):
                waiting.append([came, using(arrivals[came]), 0])
                came += 1
        chosen = choose([Waiting(each[1], OVERTAKEN - each[2]) for each in waiting], running, 1)
        for index, each in enumerate(waiting):
            if index not in chosen:
                each[2] += overtaken(index, chosen)
        ran += [waiting.pop(index)[0] for index in chosen]
    assert sorted(ran) == list(range(len(arrivals)))
    for place, name in enumerate(ran):
        assert sum(other > name for other in ran[:place]) <= OVERTAKEN
