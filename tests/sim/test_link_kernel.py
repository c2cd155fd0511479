"""Timelines computed by hand. A layer's compute is 1: half before its gate, half after; a transfer takes r."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from finemoe.policy import Policy, compute_future, make_policy
from finemoe.sim.hardware import Machine, Noise
from finemoe.sim.link_kernel import CANCELLED, FETCHED, PREFETCHED
from finemoe.sim.simulator import Outcome
from tests.sim.by_hand import NONE, Needs, Priorities, ScriptedPolicy, schedule, simulate

FREE, NO_ROW = -1, -2  # in the log, instead of a victim
NOTHING: Priorities = {}


def lru(layers: int, experts: int) -> Policy:
    return make_policy("lru", layers, experts)


def counted(outcome: Outcome) -> tuple[int, int, int]:
    return outcome.hits, outcome.late, outcome.misses


def test_a_miss_takes_a_transfer() -> None:
    outcome = simulate(schedule([[[0]]], 2), lru(1, 2), 1, 3.0)
    assert (outcome.total, outcome.stall, outcome.moved) == (0.5 + 3 + 0.5, 3, 3)
    assert counted(outcome) == (0, 0, 1)


def test_a_hit_costs_nothing() -> None:
    outcome = simulate(schedule([[[0]], [[0]]], 2), lru(1, 2), 1, 3.0)
    assert outcome.iteration_times.tolist() == [4, 1]
    assert counted(outcome) == (1, 0, 1)


def test_misses_load_in_turn_and_compute_as_they_arrive() -> None:
    # gate 0.5; the first lands at 3.5 and computes for 0.25; the second lands at 6.5: waited for from 3.75 on
    outcome = simulate(schedule([[[0, 1]]], 2), lru(1, 2), 2, 3.0)
    assert (outcome.total, outcome.stall) == (6.75, 3 + 2.75)


def test_without_ready_first_a_layer_waits_for_all_experts() -> None:
    outcome = simulate(schedule([[[0, 1]]], 2), lru(1, 2), 2, 3.0, ready_first=False)
    assert (outcome.total, outcome.stall) == (0.5 + 6 + 0.5, 6)


def test_resident_experts_compute_while_missing_ones_load() -> None:
    # second token: expert 0 computes from 4.5 to 4.75, expert 1 lands 3 after the gate
    needs: Needs = [[[0]], [[0, 1]]]
    first = simulate(schedule(needs, 2), lru(1, 2), 2, 3.0)
    assert first.iteration_times.tolist() == [4, 0.5 + 3 + 0.25]
    waiting = simulate(schedule(needs, 2), lru(1, 2), 2, 3.0, ready_first=False)
    assert waiting.iteration_times.tolist() == [4, 0.5 + 3 + 0.5]


def test_a_layer_that_needs_more_than_the_pool_holds_runs_in_waves() -> None:
    # one slot: the second expert is loaded when the first has computed, at 3.75, and lands at 6.75
    outcome = simulate(schedule([[[0, 1]]], 2), lru(1, 2), 1, 3.0)
    assert (outcome.total, outcome.stall) == (7.0, 6.0)
    assert outcome.log.tolist() == [[FETCHED, 0, FREE], [FETCHED, 1, 0]]


def test_waves_without_ready_first() -> None:
    # two slots: both land by 6.5, one has computed by 6.5 + 1/6, which frees a slot for the third: it lands at 9.667
    outcome = simulate(schedule([[[0, 1, 2]]], 3), lru(1, 3), 2, 3.0, ready_first=False)
    assert outcome.total == pytest.approx(6.5 + 1 / 6 + 3 + 2 / 6)


def test_two_devices_load_at_the_same_time() -> None:
    outcome = simulate(schedule([[[0, 1]]], 2), lru(1, 2), 2, 3.0, devices=2)
    assert (outcome.total, outcome.stall, outcome.moved) == (4.0, 3.0, 6.0)


def test_each_device_has_its_own_slots() -> None:
    # experts 0 and 2 live on device 0, which has one of the two slots
    outcome = simulate(schedule([[[0]], [[2]], [[0]]], 4), lru(1, 4), 2, 1.0, devices=2)
    assert counted(outcome) == (0, 0, 3)
    assert outcome.log.tolist() == [[FETCHED, 0, FREE], [FETCHED, 2, 0], [FETCHED, 0, 2]]


@pytest.mark.parametrize(("tokens", "compute"), [(1, 1.0), (64, 1.0), (65, 65 / 64), (128, 2.0)])
def test_a_long_prompt_computes_longer_and_transfers_as_long(tokens: int, compute: float) -> None:
    outcome = simulate(schedule([[[0]]], 2, [tokens]), lru(1, 2), 1, 3.0)
    assert (outcome.total, outcome.stall) == pytest.approx((compute + 3, 3))


def test_tokens_per_unit_is_a_setting() -> None:
    assert simulate(schedule([[[0]]], 2, [8]), lru(1, 2), 1, 3.0, tokens_per_unit=2).total == 4 + 3


def test_an_infinitely_fast_link_never_stalls() -> None:
    outcome = simulate(schedule([[[0, 1], [2, 3]], [[2, 3], [0, 1]]], 4), lru(2, 4), 2, 0.0)
    assert (outcome.total, outcome.stall, outcome.moved, outcome.misses) == (4.0, 0.0, 0.0, 8)


def prefetching(
    needs: Needs, link_ratio: float, *, capacity: int = 4, chunks: int = 0, later: Priorities = NOTHING
) -> Outcome:
    """Expert 1 of the last layer has a prefetch priority from the beginning."""
    layers = len(needs[0])
    priorities = {-1: {(layers - 1, 1): 1.0}, **later}
    return simulate(schedule(needs, 2), ScriptedPolicy(layers, 2, priorities), capacity, link_ratio, chunks=chunks)


def test_a_prefetch_in_time_is_a_hit() -> None:
    outcome = prefetching([[NONE, NONE, [1]]], link_ratio=2.5)
    assert (outcome.total, outcome.stall) == (3.0, 0.0)
    assert counted(outcome) == (1, 0, 0)
    assert (outcome.prefetched, outcome.prefetched_used, outcome.wasted) == (1, 1, 0)


def test_a_late_hit_waits_only_for_the_remainder() -> None:
    # in transfer from 0 on; the gate of the second layer is at 1.5
    outcome = prefetching([[NONE, [1]]], link_ratio=3.0)
    assert (outcome.total, outcome.stall, outcome.moved) == (3.5, 1.5, 3.0)
    assert counted(outcome) == (0, 1, 0)
    assert (outcome.prefetched, outcome.prefetched_used) == (1, 1)


def test_a_prefetch_is_preempted_at_the_end_of_its_chunk_and_resumes() -> None:
    # r = 4 in chunks of 1. At the gate, 0.5, half a chunk remains: the miss is in transfer from 1 to 5. It computes
    # until 5.5, the next gate is at 6: the prefetch moved 1 chunk before 1 and another after 5, so 2 remain
    outcome = prefetching([[[0], [1]]], link_ratio=4.0, chunks=4)
    assert (outcome.total, outcome.stall, outcome.moved) == (8.5, 4.5 + 2, 8.0)
    assert counted(outcome) == (0, 1, 1)


def test_without_chunks_a_prefetch_is_preempted_at_once() -> None:
    # the miss is in transfer from 0.5 to 4.5; the prefetch moved 0.5 before it, and 1 until the gate at 5.5
    outcome = prefetching([[[0], [1]]], link_ratio=4.0)
    assert (outcome.total, outcome.stall, outcome.moved) == (8.5, 4 + 2.5, 8.0)


def test_prefetches_are_slowed_down() -> None:
    # a third of the prefetch moves by the gate at 1.5; the rest is a demand load
    outcome = simulate(
        schedule([[NONE, [1]]], 2), ScriptedPolicy(2, 2, {-1: {(1, 1): 1.0}}), 4, 1.5, chunks=0, prefetch_slowdown=3.0
    )
    assert (outcome.stall, outcome.total, outcome.moved) == (1.0, 3.0, 2.5)
    assert counted(outcome) == (0, 1, 0)


def test_a_preempted_chunk_stays_slow_to_its_end() -> None:
    # r = 4 in chunks of 1 that take 2: at the gate, 0.5, a quarter of one has moved; the miss takes from 2 to 6
    outcome = simulate(
        schedule([[[0], [1]]], 2), ScriptedPolicy(2, 2, {-1: {(1, 1): 1.0}}), 4, 4.0, chunks=4, prefetch_slowdown=2.0
    )
    # it computes until 6.5, the next gate is at 7: the prefetch moved 1 + 0.5, so 2.5 remain
    assert (outcome.stall, outcome.total) == (5.5 + 2.5, 2 + 8.0)


def test_a_single_chunk_is_never_preempted() -> None:
    # the prefetch completes first, at 4; the miss lands at 8, and the prefetched expert is a hit
    outcome = prefetching([[[0], [1]]], link_ratio=4.0, chunks=1)
    assert (outcome.total, outcome.stall) == (0.5 + 7.5 + 0.5 + 1, 7.5)
    assert counted(outcome) == (1, 0, 1)


def test_the_last_chunk_of_a_prefetch_completes_before_demand_loads() -> None:
    # at the gate of the fourth layer, 3.5, half of the last chunk remains: it lands at 4, the miss at 8
    outcome = prefetching([[NONE, NONE, NONE, [0], [1]]], link_ratio=4.0, chunks=4)
    assert (outcome.total, outcome.stall) == (9.5, 4.5)
    assert counted(outcome) == (1, 0, 1)


def test_a_prefetch_without_priority_is_cancelled() -> None:
    outcome = prefetching([[NONE, [1]]], link_ratio=3.0, later={0: {}})
    assert [row[:2] for row in outcome.log.tolist()] == [[PREFETCHED, 3], [CANCELLED, 3], [FETCHED, 3]]
    assert (outcome.total, outcome.stall) == (0.5 + 1 + 3 + 0.5, 3.0)
    assert (outcome.moved, outcome.wasted, outcome.prefetched_used) == (3.5, 1, 0)
    assert counted(outcome) == (0, 0, 1)


def test_a_prefetch_is_cancelled_if_a_needed_expert_lacks_a_slot() -> None:
    # the prefetch has the only slot: it is cancelled at the gate, 0.5
    outcome = prefetching([[[0], [1]]], capacity=1, link_ratio=3.0, later={0: {(1, 1): 1.0}, 1: {}})
    first, second, third, *_ = outcome.log.tolist()
    assert [first, second, third] == [[PREFETCHED, 3, FREE], [CANCELLED, 3, NO_ROW], [FETCHED, 0, FREE]]


def test_a_prefetch_evicted_unused_is_wasted() -> None:
    outcome = prefetching([[NONE, NONE], [[0], NONE]], capacity=1, link_ratio=0.5, later={0: {}})
    assert outcome.log.tolist() == [[PREFETCHED, 3, FREE], [FETCHED, 0, 3]]
    assert (outcome.prefetched, outcome.prefetched_used, outcome.wasted, outcome.evictions) == (1, 0, 1, 1)


def test_the_highest_priority_is_prefetched_first() -> None:
    priorities = {-1: {(1, 0): 1.0, (1, 1): 3.0, (1, 2): 2.0}}
    outcome = simulate(schedule([[NONE, NONE]], 3), ScriptedPolicy(2, 3, priorities), 6, 0.6)
    assert [row[1] for row in outcome.log.tolist()] == [4, 5, 3]


def test_a_prefetch_is_cancelled_for_one_of_far_higher_priority() -> None:
    class Switching(ScriptedPolicy):
        switch = 2.0

    def simulated(other: float) -> list[int]:
        priorities = {-1: {(1, 0): 1.0}, 0: {(1, 0): 1.0, (1, 1): other}}
        return [
            row[0] for row in simulate(schedule([[NONE, NONE]], 2), Switching(2, 2, priorities), 4, 9.0).log.tolist()
        ]

    assert simulated(1.9) == [PREFETCHED]
    assert simulated(2.1) == [PREFETCHED, CANCELLED, PREFETCHED]


@pytest.mark.parametrize(("margin", "fetched"), [(-inf, True), (0.0, True), (1.0, False)])
def test_a_prefetch_must_exceed_its_victims_priority_by_the_margin(margin: float, fetched: bool) -> None:
    class WithMargin(ScriptedPolicy):
        pass

    WithMargin.margin = margin
    # the only slot holds expert 0, at retention priority 0; the second layer's prefetch priority is then 1
    outcome = simulate(schedule([[[0], NONE]], 2), WithMargin(2, 2, {0: {(1, 1): 1.0}}), 1, 0.25)
    assert (PREFETCHED in outcome.log[:, 0]) == fetched


def test_nothing_is_prefetched_at_priority_zero() -> None:
    outcome = simulate(schedule([[NONE, NONE]], 2), ScriptedPolicy(2, 2, NOTHING), 4, 0.25)
    assert outcome.log.tolist() == []


@pytest.mark.parametrize(
    ("gap", "counts", "second"),
    [(0.0, (0, 1, 1), 0.5 + 2 + 0.5), (1.5, (0, 1, 1), 0.5 + 0.5 + 0.5), (2.0, (1, 0, 1), 1)],
)
def test_links_transfer_in_the_gap_between_iterations(gap: float, counts: tuple[int, int, int], second: float) -> None:
    # the miss lands at 3.5 and computes until 4; the prefetch takes from 3.5 to 6.5, the second gate is at 4.5 + gap
    priorities = {0: {(0, 1): 1.0}}
    outcome = simulate(schedule([[[0]], [[1]]], 2), ScriptedPolicy(1, 2, priorities), 2, 3.0, gap=gap)
    assert counted(outcome) == counts
    assert outcome.iteration_times.tolist() == [4, second]
    assert outcome.total == 4 + second + 2 * gap  # a gap follows the last iteration too


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_a_gap_changes_nothing_on_demand(policy: str) -> None:
    plan = schedule([[[0, 1]], [[1, 2]], [[0, 2]]], 3)
    future: dict[str, Any] = {"future": compute_future(1, 3, plan.ptr, plan.needs)} if policy == "belady" else {}
    without, with_gap = (simulate(plan, make_policy(policy, 1, 3, **future), 2, 3.0, gap=gap) for gap in (0.0, 5.0))
    assert with_gap.iteration_times.tolist() == without.iteration_times.tolist()
    assert (counted(with_gap), with_gap.stall) == (counted(without), without.stall)
    assert with_gap.total == without.total + 3 * 5


def test_the_oracle_prefetches_in_the_gap() -> None:
    plan = schedule([[[0]], [[1]]], 2)
    totals = []
    for gap in (0.0, 3.0):
        oracle = make_policy("oracle", 1, 2, future=compute_future(1, 2, plan.ptr, plan.needs))
        totals.append(simulate(plan, oracle, 1, 3.0, gap=gap).iteration_times.tolist())
    assert totals == [[3 + 0.5, 0.5 + 2.5 + 0.5], [3 + 0.5, 1]]


def test_compute_before_the_gate_does_not_overlap_a_miss() -> None:
    # second token: expert 0 computes for 0.4 of 0.8, expert 1 lands 3 after the gate
    outcome = simulate(schedule([[[0]], [[0, 1]]], 2), lru(1, 2), 2, 3.0, before_gate=0.2)
    assert outcome.iteration_times.tolist() == pytest.approx([4, 0.2 + 3 + 0.4])


def test_each_transfer_has_its_own_random_time() -> None:
    outcome = simulate(schedule([[[0], [1], [2]]], 3), lru(3, 3), 3, 2.0, link_spread=0.5)
    factors = Noise(Machine(3, 2.0, link_spread=0.5)).transfers[:3]
    assert outcome.stall == outcome.moved == pytest.approx(2 * factors.sum())
