"""Timelines worked out by hand. A layer's compute is 1: half before its gate, half after; a transfer takes r."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from finemoe.policy import Policy, compute_future, make_policy
from finemoe.sim.hardware import Machine, Noise
from finemoe.sim.link_kernel import FETCHED, PREFETCHED, WITHDRAWN
from finemoe.sim.simulator import Outcome
from tests.sim.by_hand import NONE, Needs, Script, Wants, play, schedule

FREE, NO_ROW = -1, -2  # in the log, instead of a victim
NOTHING: Wants = {}


def lru(layers: int, experts: int) -> Policy:
    return make_policy("lru", layers, experts)


def counted(outcome: Outcome) -> tuple[int, int, int]:
    return outcome.hits, outcome.late, outcome.misses


def test_a_miss_takes_a_transfer() -> None:
    outcome = play(schedule([[[0]]], 2), lru(1, 2), 1, 3.0)
    assert (outcome.total, outcome.stall, outcome.moved) == (0.5 + 3 + 0.5, 3, 3)
    assert counted(outcome) == (0, 0, 1)


def test_a_hit_costs_nothing() -> None:
    outcome = play(schedule([[[0]], [[0]]], 2), lru(1, 2), 1, 3.0)
    assert outcome.iteration_times.tolist() == [4, 1]
    assert counted(outcome) == (1, 0, 1)


def test_misses_come_one_after_the_other_and_compute_as_they_come() -> None:
    # gate 0.5; the first lands at 3.5 and computes for 0.25; the second lands at 6.5: waited for from 3.75 on
    outcome = play(schedule([[[0, 1]]], 2), lru(1, 2), 2, 3.0)
    assert (outcome.total, outcome.stall) == (6.75, 3 + 2.75)


def test_without_ready_first_nothing_computes_before_all_have_come() -> None:
    outcome = play(schedule([[[0, 1]]], 2), lru(1, 2), 2, 3.0, ready_first=False)
    assert (outcome.total, outcome.stall) == (0.5 + 6 + 0.5, 6)


def test_residents_compute_while_the_missing_come() -> None:
    # the second token: expert 0 computes from 4.5 to 4.75 of its own 0.5, expert 1 lands 3 after the gate
    needs: Needs = [[[0]], [[0, 1]]]
    first = play(schedule(needs, 2), lru(1, 2), 2, 3.0)
    assert first.iteration_times.tolist() == [4, 0.5 + 3 + 0.25]
    waiting = play(schedule(needs, 2), lru(1, 2), 2, 3.0, ready_first=False)
    assert waiting.iteration_times.tolist() == [4, 0.5 + 3 + 0.5]


def test_a_layer_that_needs_more_than_the_pool_holds_runs_in_waves() -> None:
    # one slot: the second expert is sent for when the first was used, at 3.75, and lands at 6.75
    outcome = play(schedule([[[0, 1]]], 2), lru(1, 2), 1, 3.0)
    assert (outcome.total, outcome.stall) == (7.0, 6.0)
    assert outcome.log.tolist() == [[FETCHED, 0, FREE], [FETCHED, 1, 0]]


def test_waves_where_all_that_fit_are_waited_for() -> None:
    # two slots: both land by 6.5, one is used by 6.5 + 1/6, which frees the slot of the third: that lands at 9.667
    outcome = play(schedule([[[0, 1, 2]]], 3), lru(1, 3), 2, 3.0, ready_first=False)
    assert outcome.total == pytest.approx(6.5 + 1 / 6 + 3 + 2 / 6)


def test_two_devices_load_at_the_same_time() -> None:
    outcome = play(schedule([[[0, 1]]], 2), lru(1, 2), 2, 3.0, devices=2)
    assert (outcome.total, outcome.stall, outcome.moved) == (4.0, 3.0, 6.0)


def test_each_device_has_its_own_slots() -> None:
    # experts 0 and 2 live on device 0, which has one of the two slots
    outcome = play(schedule([[[0]], [[2]], [[0]]], 4), lru(1, 4), 2, 1.0, devices=2)
    assert counted(outcome) == (0, 0, 3)
    assert outcome.log.tolist() == [[FETCHED, 0, FREE], [FETCHED, 2, 0], [FETCHED, 0, 2]]


@pytest.mark.parametrize(("tokens", "compute"), [(1, 1.0), (64, 1.0), (65, 65 / 64), (128, 2.0)])
def test_a_long_prompt_computes_longer_and_moves_as_long(tokens: int, compute: float) -> None:
    outcome = play(schedule([[[0]]], 2, [tokens]), lru(1, 2), 1, 3.0)
    assert (outcome.total, outcome.stall) == pytest.approx((compute + 3, 3))


def test_tokens_per_unit_is_a_setting() -> None:
    assert play(schedule([[[0]]], 2, [8]), lru(1, 2), 1, 3.0, tokens_per_unit=2).total == 4 + 3


def test_an_infinitely_fast_link_never_stalls() -> None:
    outcome = play(schedule([[[0, 1], [2, 3]], [[2, 3], [0, 1]]], 4), lru(2, 4), 2, 0.0)
    assert (outcome.total, outcome.stall, outcome.moved, outcome.misses) == (4.0, 0.0, 0.0, 8)


def prefetching(
    needs: Needs, link_ratio: float, *, capacity: int = 4, chunks: int = 0, later: Wants = NOTHING
) -> Outcome:
    """Expert 1 of the last layer is wanted from the beginning."""
    layers = len(needs[0])
    wants = {-1: {(layers - 1, 1): 1.0}, **later}
    return play(schedule(needs, 2), Script(layers, 2, wants), capacity, link_ratio, chunks=chunks)


def test_a_prefetch_in_time_is_a_hit() -> None:
    outcome = prefetching([[NONE, NONE, [1]]], link_ratio=2.5)
    assert (outcome.total, outcome.stall) == (3.0, 0.0)
    assert counted(outcome) == (1, 0, 0)
    assert (outcome.prefetched, outcome.prefetched_used, outcome.wasted) == (1, 1, 0)


def test_a_late_hit_waits_only_for_the_remainder() -> None:
    # on the wire from 0 on; the gate of the second layer speaks at 1.5
    outcome = prefetching([[NONE, [1]]], link_ratio=3.0)
    assert (outcome.total, outcome.stall, outcome.moved) == (3.5, 1.5, 3.0)
    assert counted(outcome) == (0, 1, 0)
    assert (outcome.prefetched, outcome.prefetched_used) == (1, 1)


def test_a_prefetch_gives_way_at_the_end_of_its_chunk_and_goes_on_later() -> None:
    # r = 4 in chunks of 1. At the gate, 0.5, half a chunk is out: the miss is on the wire from 1 to 5. It computes
    # until 5.5, the next gate speaks at 6: of the prefetch 1 chunk came before 1, another after 5, so 2 are left
    outcome = prefetching([[[0], [1]]], link_ratio=4.0, chunks=4)
    assert (outcome.total, outcome.stall, outcome.moved) == (8.5, 4.5 + 2, 8.0)
    assert counted(outcome) == (0, 1, 1)


def test_without_chunks_a_prefetch_gives_way_at_once() -> None:
    # the miss is on the wire from 0.5 to 4.5; of the prefetch 0.5 came before, 1 until the gate at 5.5
    outcome = prefetching([[[0], [1]]], link_ratio=4.0)
    assert (outcome.total, outcome.stall, outcome.moved) == (8.5, 4 + 2.5, 8.0)


def test_what_is_not_urgent_moves_slower() -> None:
    # 0.5 of 1.5 moved by 1 in the time of 3; the rest is urgent from the gate at 1.5 on
    outcome = play(
        schedule([[NONE, [1]]], 2), Script(2, 2, {-1: {(1, 1): 1.0}}), 4, 1.5, chunks=0, prefetch_slowdown=3.0
    )
    assert (outcome.stall, outcome.total, outcome.moved) == (1.0, 3.0, 2.5)
    assert counted(outcome) == (0, 1, 0)


def test_a_chunk_that_is_not_urgent_is_slow_to_its_end() -> None:
    # r = 4 in chunks of 1 that take 2: at the gate, 0.5, a quarter of one is out. The miss is on the wire from 2 to 6
    outcome = play(
        schedule([[[0], [1]]], 2), Script(2, 2, {-1: {(1, 1): 1.0}}), 4, 4.0, chunks=4, prefetch_slowdown=2.0
    )
    # it computes until 6.5, the next gate speaks at 7: of the prefetch 1 + 0.5 came, 2.5 are left
    assert (outcome.stall, outcome.total) == (5.5 + 2.5, 2 + 8.0)


def test_one_chunk_is_never_cut() -> None:
    # the whole prefetch goes first, until 4; the miss lands at 8, and then the prefetch is a hit
    outcome = prefetching([[[0], [1]]], link_ratio=4.0, chunks=1)
    assert (outcome.total, outcome.stall) == (0.5 + 7.5 + 0.5 + 1, 7.5)
    assert counted(outcome) == (1, 0, 1)


def test_the_last_chunk_of_a_prefetch_lands_before_what_is_urgent() -> None:
    # at the gate of the fourth layer, 3.5, half of the last chunk is left: it lands at 4, the miss at 8
    outcome = prefetching([[NONE, NONE, NONE, [0], [1]]], link_ratio=4.0, chunks=4)
    assert (outcome.total, outcome.stall) == (9.5, 4.5)
    assert counted(outcome) == (1, 0, 1)


def test_a_prefetch_that_is_not_wanted_any_more_is_withdrawn() -> None:
    outcome = prefetching([[NONE, [1]]], link_ratio=3.0, later={0: {}})
    assert [row[:2] for row in outcome.log.tolist()] == [[PREFETCHED, 3], [WITHDRAWN, 3], [FETCHED, 3]]
    assert (outcome.total, outcome.stall) == (0.5 + 1 + 3 + 0.5, 3.0)
    assert (outcome.moved, outcome.wasted, outcome.prefetched_used) == (3.5, 1, 0)
    assert counted(outcome) == (0, 0, 1)


def test_a_prefetch_gives_its_slot_to_what_is_needed() -> None:
    # one slot, and the prefetch has it: it is withdrawn at the gate, 0.5
    outcome = prefetching([[[0], [1]]], capacity=1, link_ratio=3.0, later={0: {(1, 1): 1.0}, 1: {}})
    first, second, third, *_ = outcome.log.tolist()
    assert [first, second, third] == [[PREFETCHED, 3, FREE], [WITHDRAWN, 3, NO_ROW], [FETCHED, 0, FREE]]


def test_what_was_prefetched_and_evicted_unused_is_wasted() -> None:
    outcome = prefetching([[NONE, NONE], [[0], NONE]], capacity=1, link_ratio=0.5, later={0: {}})
    assert outcome.log.tolist() == [[PREFETCHED, 3, FREE], [FETCHED, 0, 3]]
    assert (outcome.prefetched, outcome.prefetched_used, outcome.wasted, outcome.evictions) == (1, 0, 1, 1)


def test_what_is_wanted_most_comes_first() -> None:
    wants = {-1: {(1, 0): 1.0, (1, 1): 3.0, (1, 2): 2.0}}
    outcome = play(schedule([[NONE, NONE]], 3), Script(2, 3, wants), 6, 0.6)
    assert [row[1] for row in outcome.log.tolist()] == [4, 5, 3]


def test_a_prefetch_under_way_is_dropped_for_one_that_is_wanted_far_more() -> None:
    class Fickle(Script):
        switch = 2.0

    def played(other: float) -> list[int]:
        wants = {-1: {(1, 0): 1.0}, 0: {(1, 0): 1.0, (1, 1): other}}
        return [row[0] for row in play(schedule([[NONE, NONE]], 2), Fickle(2, 2, wants), 4, 9.0).log.tolist()]

    assert played(1.9) == [PREFETCHED]
    assert played(2.1) == [PREFETCHED, WITHDRAWN, PREFETCHED]


@pytest.mark.parametrize(("margin", "fetched"), [(-inf, True), (0.0, True), (1.0, False)])
def test_a_prefetch_must_be_worth_its_victim(margin: float, fetched: bool) -> None:
    class Careful(Script):
        pass

    Careful.margin = margin
    # the one slot holds expert 0, of worth 0; the second layer is wanted at 1 once the first has run
    outcome = play(schedule([[[0], NONE]], 2), Careful(2, 2, {0: {(1, 1): 1.0}}), 1, 0.25)
    assert (PREFETCHED in outcome.log[:, 0]) == fetched


def test_nothing_is_prefetched_that_is_wanted_by_nobody() -> None:
    outcome = play(schedule([[NONE, NONE]], 2), Script(2, 2, NOTHING), 4, 0.25)
    assert outcome.log.tolist() == []


@pytest.mark.parametrize(
    ("gap", "counts", "second"),
    [(0.0, (0, 1, 1), 0.5 + 2 + 0.5), (1.5, (0, 1, 1), 0.5 + 0.5 + 0.5), (2.0, (1, 0, 1), 1)],
)
def test_links_go_on_in_the_gap_between_iterations(gap: float, counts: tuple[int, int, int], second: float) -> None:
    # the miss lands at 3.5 and computes until 4; the prefetch comes from 3.5 to 6.5, the second gate at 4.5 and the gap
    wants = {0: {(0, 1): 1.0}}
    outcome = play(schedule([[[0]], [[1]]], 2), Script(1, 2, wants), 2, 3.0, gap=gap)
    assert counted(outcome) == counts
    assert outcome.iteration_times.tolist() == [4, second]
    assert outcome.total == 4 + second + 2 * gap  # after the last one too


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_a_gap_changes_nothing_on_demand(policy: str) -> None:
    plan = schedule([[[0, 1]], [[1, 2]], [[0, 2]]], 3)
    future: dict[str, Any] = {"future": compute_future(1, 3, plan.ptr, plan.needs)} if policy == "belady" else {}
    without, with_gap = (play(plan, make_policy(policy, 1, 3, **future), 2, 3.0, gap=gap) for gap in (0.0, 5.0))
    assert with_gap.iteration_times.tolist() == without.iteration_times.tolist()
    assert (counted(with_gap), with_gap.stall) == (counted(without), without.stall)
    assert with_gap.total == without.total + 3 * 5


def test_the_bound_for_everything_prefetches_in_the_gap() -> None:
    plan = schedule([[[0]], [[1]]], 2)
    totals = []
    for gap in (0.0, 3.0):
        oracle = make_policy("oracle", 1, 2, future=compute_future(1, 2, plan.ptr, plan.needs))
        totals.append(play(plan, oracle, 1, 3.0, gap=gap).iteration_times.tolist())
    assert totals == [[3 + 0.5, 0.5 + 2.5 + 0.5], [3 + 0.5, 1]]


def test_what_is_before_the_gate_is_not_overlapped_by_a_miss() -> None:
    # the second token: expert 0 computes 0.4 of its own 0.8, expert 1 lands 3 after the gate
    outcome = play(schedule([[[0]], [[0, 1]]], 2), lru(1, 2), 2, 3.0, before_gate=0.2)
    assert outcome.iteration_times.tolist() == pytest.approx([4, 0.2 + 3 + 0.4])


def test_each_transfer_has_a_time_of_its_own() -> None:
    outcome = play(schedule([[[0], [1], [2]]], 3), lru(3, 3), 3, 2.0, link_spread=0.5)
    factors = Noise(Machine(3, 2.0, link_spread=0.5)).transfers[:3]
    assert outcome.stall == outcome.moved == pytest.approx(2 * factors.sum())
