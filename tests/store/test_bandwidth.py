"""A link's time and bytes: whose they are, by a clock that the test sets."""

from __future__ import annotations

import pytest

from finemoe.metrics import NEVER, Durations
from finemoe.store.bandwidth import LinkAccounting


def test_time_is_the_urgents_while_there_is_one_and_nobodys_on_an_idle_link() -> None:
    link_accounting = LinkAccounting()
    prefetch = link_accounting.send(urgent=False, now_s=10, since_s=10)
    urgent = link_accounting.send(urgent=True, now_s=12, since_s=12)
    link_accounting.land(urgent, 15)
    link_accounting.land(prefetch, 16)
    totals = link_accounting.totals(20)
    assert (totals.urgent_s, totals.prefetch_s) == (3, 3)


def test_time_under_way_counts() -> None:
    link_accounting = LinkAccounting()
    link_accounting.send(urgent=True, now_s=1, since_s=1)
    assert link_accounting.totals(4).urgent_s == 3
    link_accounting.clear(5)
    assert link_accounting.totals(9).urgent_s == 4


@pytest.mark.parametrize(("asked_s", "begins_s"), [(8.0, 8.0), (2.0, 6.0)])
def test_a_prefetch_begins_when_it_was_asked_for_but_not_before_the_link_was_idle(
    asked_s: float, begins_s: float
) -> None:
    link_accounting = LinkAccounting()
    link_accounting.land(link_accounting.send(urgent=True, now_s=5, since_s=5), 6)
    link_accounting.land(link_accounting.send(urgent=False, now_s=9, since_s=asked_s), 10)
    assert link_accounting.totals(10).prefetch_s == 10 - begins_s


def test_what_a_read_moves_is_whose_its_time_was() -> None:
    link_accounting = LinkAccounting()
    prefetch = link_accounting.send(urgent=False, now_s=0, since_s=0)
    mark = link_accounting.mark(0)
    link_accounting.promote(prefetch, 3)
    link_accounting.move(100, mark, 4, wanted=True)
    totals = link_accounting.totals(4)
    assert (totals.prefetch_bytes, totals.urgent_bytes) == pytest.approx((75, 25))


def test_what_comes_of_a_prefetch_after_it_was_withdrawn_is_nobodys() -> None:
    link_accounting = LinkAccounting()
    prefetch = link_accounting.send(urgent=False, now_s=0, since_s=0)
    mark = link_accounting.mark(0)
    link_accounting.drop(prefetch, 2)
    link_accounting.send(urgent=True, now_s=2, since_s=2)
    link_accounting.move(100, mark, 4, wanted=False)
    totals = link_accounting.totals(4)
    assert (totals.prefetch_bytes, totals.urgent_bytes) == pytest.approx((50, 0))


def test_prefetches_are_timed_that_nothing_else_disturbed() -> None:
    link_accounting = LinkAccounting()
    first = link_accounting.send(urgent=False, now_s=0, since_s=0)
    second = link_accounting.send(urgent=False, now_s=1, since_s=1)
    link_accounting.land(first, 2)  # took 2
    link_accounting.land(second, 5)  # from 2 on: 3
    hastened = link_accounting.send(urgent=False, now_s=6, since_s=6)
    link_accounting.promote(hastened, 7)
    link_accounting.send(urgent=True, now_s=7, since_s=7)
    link_accounting.land(hastened, 10)  # 4: what is urgent beside it comes after it
    totals = link_accounting.totals(10)
    assert totals.passages == sum(map(Durations.one, (2, 3, 4)), NEVER)


@pytest.mark.parametrize("hastened", [False, True])
def test_a_prefetch_that_something_urgent_disturbed_is_not_timed(*, hastened: bool) -> None:
    link_accounting = LinkAccounting()
    prefetch = link_accounting.send(urgent=False, now_s=0, since_s=0)
    link_accounting.land(link_accounting.send(urgent=True, now_s=1, since_s=1), 2)
    if hastened:
        link_accounting.promote(prefetch, 3)
    link_accounting.land(prefetch, 4)
    assert link_accounting.totals(4).passages == NEVER
