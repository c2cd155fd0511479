"""A link's time and bytes: whose they are, by a clock that the test sets."""

from __future__ import annotations

import pytest

from finemoe.durations import NEVER, Durations
from finemoe.traffic import Traffic


def test_time_is_the_urgents_while_there_is_one_and_nobodys_on_an_idle_link() -> None:
    traffic = Traffic()
    prefetch = traffic.send(urgent=False, now_s=10, since_s=10)
    urgent = traffic.send(urgent=True, now_s=12, since_s=12)
    traffic.land(urgent, 15)
    traffic.land(prefetch, 16)
    totals = traffic.totals(20)
    assert (totals.urgent_s, totals.prefetch_s) == (3, 3)


def test_time_under_way_counts() -> None:
    traffic = Traffic()
    traffic.send(urgent=True, now_s=1, since_s=1)
    assert traffic.totals(4).urgent_s == 3
    traffic.clear(5)
    assert traffic.totals(9).urgent_s == 4


@pytest.mark.parametrize(("asked_s", "begins_s"), [(8.0, 8.0), (2.0, 6.0)])
def test_a_prefetch_begins_when_it_was_asked_for_but_not_before_the_link_was_idle(
    asked_s: float, begins_s: float
) -> None:
    traffic = Traffic()
    traffic.land(traffic.send(urgent=True, now_s=5, since_s=5), 6)
    traffic.land(traffic.send(urgent=False, now_s=9, since_s=asked_s), 10)
    assert traffic.totals(10).prefetch_s == 10 - begins_s


def test_what_a_read_moves_is_whose_its_time_was() -> None:
    traffic = Traffic()
    prefetch = traffic.send(urgent=False, now_s=0, since_s=0)
    mark = traffic.mark(0)
    traffic.hasten(prefetch, 3)
    traffic.move(100, mark, 4, wanted=True)
    totals = traffic.totals(4)
    assert (totals.prefetch_bytes, totals.urgent_bytes) == pytest.approx((75, 25))


def test_what_comes_of_a_prefetch_after_it_was_withdrawn_is_nobodys() -> None:
    traffic = Traffic()
    prefetch = traffic.send(urgent=False, now_s=0, since_s=0)
    mark = traffic.mark(0)
    traffic.drop(prefetch, 2)
    traffic.send(urgent=True, now_s=2, since_s=2)
    traffic.move(100, mark, 4, wanted=False)
    totals = traffic.totals(4)
    assert (totals.prefetch_bytes, totals.urgent_bytes) == pytest.approx((50, 0))


def test_prefetches_are_timed_that_nothing_else_disturbed() -> None:
    traffic = Traffic()
    first = traffic.send(urgent=False, now_s=0, since_s=0)
    second = traffic.send(urgent=False, now_s=1, since_s=1)
    traffic.land(first, 2)  # took 2
    traffic.land(second, 5)  # from 2 on: 3
    hastened = traffic.send(urgent=False, now_s=6, since_s=6)
    traffic.hasten(hastened, 7)
    traffic.send(urgent=True, now_s=7, since_s=7)
    traffic.land(hastened, 10)  # 4: what is urgent beside it comes after it
    totals = traffic.totals(10)
    assert totals.passages == sum(map(Durations.one, (2, 3, 4)), NEVER)


@pytest.mark.parametrize("hastened", [False, True])
def test_a_prefetch_that_something_urgent_disturbed_is_not_timed(*, hastened: bool) -> None:
    traffic = Traffic()
    prefetch = traffic.send(urgent=False, now_s=0, since_s=0)
    traffic.land(traffic.send(urgent=True, now_s=1, since_s=1), 2)
    if hastened:
        traffic.hasten(prefetch, 3)
    traffic.land(prefetch, 4)
    assert traffic.totals(4).passages == NEVER
