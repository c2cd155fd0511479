"""What every policy promises, whatever it thinks of the experts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.errors import ConfigError, InvariantError
from finemoe.policy import POLICIES, Controller, make_controller
from finemoe.types import ExpertId, Routed
from tests.policy.drive import Drive

LAYERS, EXPERTS = 3, 6
Trace = list[tuple[int, list[int]]]

needs = st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS, unique=True).map(sorted)
traces = st.lists(st.tuples(st.integers(0, LAYERS - 1), needs), max_size=30)
capacities = st.integers(1, LAYERS * EXPERTS)
all_policies = pytest.mark.parametrize("policy", POLICIES)


def controller(policy: str, capacity: int) -> Controller:
    return make_controller(policy, LAYERS, EXPERTS, capacity)


@all_policies
@given(traces, capacities, st.randoms(use_true_random=False))
def test_every_need_is_served_and_no_promise_is_broken(
    policy: str, trace: Trace, capacity: int, random: object
) -> None:
    drive = Drive(controller(policy, capacity), random.randrange)  # type: ignore[attr-defined] # hypothesis' Random
    for layer, experts in trace:
        drive.layer(layer, experts)  # asserts in every step


@all_policies
@given(traces, capacities)
def test_equal_events_give_equal_plans(policy: str, trace: Trace, capacity: int) -> None:
    drives = [Drive(controller(policy, capacity)) for _ in range(2)]
    for layer, experts in trace:
        for drive in drives:
            drive.layer(layer, experts)
    assert drives[0].log == drives[1].log


@all_policies
@given(traces)
def test_nothing_is_fetched_twice_when_everything_fits(policy: str, trace: Trace) -> None:
    drive = Drive(controller(policy, LAYERS * EXPERTS))
    for layer, experts in trace:
        drive.layer(layer, experts)
    fetched = [fetch.expert for fetch in drive.log]
    assert len(fetched) == len(set(fetched))
    assert all(fetch.victim is None for fetch in drive.log)


@all_policies
@given(traces, capacities)
def test_residents_are_not_fetched(policy: str, trace: Trace, capacity: int) -> None:
    drive = Drive(controller(policy, capacity))
    for layer, experts in trace:
        before = set(drive.resident)
        fetched = drive.layer(layer, experts)
        if len(experts) <= capacity:
            assert {fetch.expert for fetch in fetched} == {ExpertId(layer, e) for e in experts} - before


@all_policies
@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_a_layer_that_needs_more_than_the_pool_holds_runs_in_waves(policy: str, capacity: int) -> None:
    drive = Drive(controller(policy, capacity))
    fetched = drive.layer(0, range(EXPERTS))
    assert [fetch.expert.expert for fetch in fetched] == list(range(EXPERTS))
    assert len(drive.resident) == capacity


@all_policies
@given(traces, traces, capacities)
def test_clear_forgets_what_was_resident_and_in_flight(policy: str, trace: Trace, later: Trace, capacity: int) -> None:
    under_test = controller(policy, capacity)
    drive = Drive(under_test)
    for layer, experts in trace:
        drive.layer(layer, experts)
    under_test.routed(Routed(0, (0, 1, 2)))  # left in the middle
    under_test.clear()
    under_test.check_integrity()
    assert not any(under_test.is_resident(ExpertId(la, e)) for la in range(LAYERS) for e in range(EXPERTS))
    again = Drive(under_test)
    for layer, experts in later:
        again.layer(layer, experts)


@all_policies
def test_a_failed_fetch_gives_its_slot_back(policy: str) -> None:
    under_test = controller(policy, 1)
    under_test.routed(Routed(0, (0,)))
    under_test.failed(ExpertId(0, 0))
    under_test.check_integrity()
    assert [fetch.victim for fetch in under_test.routed(Routed(0, (1,))).fetches] == [None]


@all_policies
def test_an_expert_in_flight_is_not_fetched_again(policy: str) -> None:
    under_test = controller(policy, 4)
    assert len(under_test.routed(Routed(0, (0, 1))).fetches) == 2
    assert under_test.is_in_flight(ExpertId(0, 0))
    assert [fetch.expert.expert for fetch in under_test.routed(Routed(0, (0, 1, 2))).fetches] == [2]


@all_policies
def test_layers_may_have_fewer_experts_than_the_largest(policy: str) -> None:
    drive = Drive(make_controller(policy, 2, 8, 3))
    for experts in ([0, 1], [1]):
        drive.layer(0, experts)
        drive.layer(1, [0, 7])


def test_an_unknown_policy_is_refused_with_the_known_ones_named() -> None:
    with pytest.raises(ConfigError, match=r"--policy: unknown policy 'lur'; choose one of lru, "):
        make_controller("lur", 1, 1, 1)


def test_a_pool_without_slots_is_refused() -> None:
    with pytest.raises(InvariantError, match="at least one slot"):
        make_controller("lru", 1, 1, 0)
