"""Contract tests that every policy must pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.errors import ConfigError, InvariantError
from finemoe.jit import interpreted
from finemoe.policy import BOUNDS, FACTORIES, POLICIES, CacheManager, make_cache_manager, make_policy
from finemoe.policy.base import Policy
from finemoe.types import ExpertId, Routed
from tests.policy.cache_driver import CacheDriver
from tests.policy.compile import compiled
from tests.policy.workload import Iteration, Shape, future, recorded, untrained, workload

LAYERS, EXPERTS = 3, 6
Trace = list[tuple[int, list[int]]]

needs = st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS, unique=True).map(sorted)
traces = st.lists(st.tuples(st.integers(0, LAYERS - 1), needs), max_size=30)
capacities = st.integers(1, LAYERS * EXPERTS)
all_policies = pytest.mark.parametrize("policy", POLICIES)
every_policy = pytest.mark.parametrize("policy", [*POLICIES, *BOUNDS])


SHAPE = Shape(LAYERS, EXPERTS)
PLAYED = workload(1, SHAPE, iterations=20)


def cache_manager(policy: str, capacity: int) -> CacheManager:
    return make_cache_manager(policy, LAYERS, EXPERTS, capacity)


def informed(policy: str, played: list[Iteration], shape: Shape = SHAPE) -> Policy:
    """A policy with all of its inputs: future, predictors, recorded requests."""
    if policy in BOUNDS:
        return make_policy(policy, shape.layers, shape.experts, future=future(played, shape))
    made = make_policy(policy, shape.layers, shape.experts, **options(policy, shape))
    for seed in range(3):
        made.learn(recorded(seed, shape))
    return made


def options(policy: str, shape: Shape) -> dict[str, Any]:
    """Constructor arguments that a policy requires."""
    return {"predictors": untrained(shape)} if policy == "promoe" else {}


def scores(policy: Policy, played: list[Iteration]) -> list[tuple[bytes, bytes]]:
    """The scores after every event."""
    after = []
    for iteration in played:
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.routed(event)
            after.append((policy.retention_priority.tobytes(), policy.prefetch_priority.tobytes()))
        policy.end()
    return after


@all_policies
@given(traces, capacities, st.randoms(use_true_random=False))
def test_every_needed_expert_is_loaded_and_invariants_hold(
    policy: str, trace: Trace, capacity: int, random: object
) -> None:
    driver = CacheDriver(cache_manager(policy, capacity), random.randrange)  # type: ignore[attr-defined] # hypothesis' Random
    for layer, experts in trace:
        driver.layer(layer, experts)  # asserts in every step


@all_policies
@given(traces, capacities)
def test_equal_events_give_equal_plans(policy: str, trace: Trace, capacity: int) -> None:
    drivers = [CacheDriver(cache_manager(policy, capacity)) for _ in range(2)]
    for layer, experts in trace:
        for driver in drivers:
            driver.layer(layer, experts)
    assert drivers[0].log == drivers[1].log


@all_policies
@given(traces)
def test_nothing_is_fetched_twice_when_everything_fits(policy: str, trace: Trace) -> None:
    driver = CacheDriver(cache_manager(policy, LAYERS * EXPERTS))
    for layer, experts in trace:
        driver.layer(layer, experts)
    fetched = [fetch.expert for fetch in driver.log]
    assert len(fetched) == len(set(fetched))
    assert all(fetch.victim is None for fetch in driver.log)


@all_policies
@given(traces, capacities)
def test_resident_experts_are_not_fetched(policy: str, trace: Trace, capacity: int) -> None:
    driver = CacheDriver(cache_manager(policy, capacity))
    for layer, experts in trace:
        before = set(driver.resident)
        fetched = driver.layer(layer, experts)
        if len(experts) <= capacity:
            assert {fetch.expert for fetch in fetched} == {ExpertId(layer, e) for e in experts} - before


@all_policies
@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_a_layer_that_needs_more_than_the_pool_holds_runs_in_waves(policy: str, capacity: int) -> None:
    driver = CacheDriver(cache_manager(policy, capacity))
    fetched = driver.layer(0, range(EXPERTS))
    assert [fetch.expert.expert for fetch in fetched] == list(range(EXPERTS))
    assert len(driver.resident) == capacity


@all_policies
@given(traces, traces, capacities)
def test_clear_resets_residents_and_fetches_in_flight(policy: str, trace: Trace, later: Trace, capacity: int) -> None:
    under_test = cache_manager(policy, capacity)
    driver = CacheDriver(under_test)
    for layer, experts in trace:
        driver.layer(layer, experts)
    under_test.routed(Routed(0, (0, 1, 2)))  # not completed
    under_test.clear()
    under_test.check_integrity()
    assert not any(under_test.is_resident(ExpertId(la, e)) for la in range(LAYERS) for e in range(EXPERTS))
    again = CacheDriver(under_test)
    for layer, experts in later:
        again.layer(layer, experts)


@all_policies
def test_a_failed_fetch_frees_its_slot(policy: str) -> None:
    under_test = cache_manager(policy, 1)
    under_test.routed(Routed(0, (0,)))
    under_test.failed(ExpertId(0, 0))
    under_test.check_integrity()
    assert [fetch.victim for fetch in under_test.routed(Routed(0, (1,))).fetches] == [None]


@all_policies
def test_an_expert_in_flight_is_not_fetched_again(policy: str) -> None:
    under_test = cache_manager(policy, 4)
    assert len(under_test.routed(Routed(0, (0, 1))).fetches) == 2
    assert under_test.is_in_flight(ExpertId(0, 0))
    assert [fetch.expert.expert for fetch in under_test.routed(Routed(0, (0, 1, 2))).fetches] == [2]


@all_policies
def test_layers_may_have_fewer_experts_than_the_largest(policy: str) -> None:
    driver = CacheDriver(make_cache_manager(policy, 2, 8, 3))
    for experts in ([0, 1], [1]):
        driver.layer(0, experts)
        driver.layer(1, [0, 7])


@every_policy
@given(st.integers(0, 99), capacities, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_invariants_hold_with_prefetches(policy: str, seed: int, capacity: int, random: object) -> None:
    played = workload(seed, SHAPE, truncated=seed % 2 == 1, embeddings=seed % 3 > 0)
    driver = CacheDriver(
        CacheManager(LAYERS, EXPERTS, capacity, informed(policy, played)),
        random.randrange,  # type: ignore[attr-defined] # hypothesis' Random
        prefetch=True,
    )
    for iteration in played:
        driver.cache_manager.begin(iteration.steps)
        for event in iteration.events:
            driver.event(event)
        driver.cache_manager.end()
    if not driver.cache_manager.policy.prefetches:
        assert all(fetch.urgent for fetch in driver.log)


@every_policy
def test_prefetches_attribute_is_true(policy: str) -> None:
    made = informed(policy, PLAYED)
    scores(made, PLAYED)
    positive = False
    for iteration in workload(2, SHAPE) if policy not in BOUNDS else []:
        made.begin(iteration.steps)
        for event in iteration.events:
            positive = positive or bool((made.prefetch_priority > 0).any())
            made.routed(event)
        made.end()
    assert (positive or policy == "oracle") == made.prefetches


@every_policy
def test_score_arrays_are_updated_in_place(policy: str) -> None:
    made = informed(policy, PLAYED)
    retention_priority, prefetch_priority = made.retention_priority, made.prefetch_priority
    scores(made, PLAYED)
    assert made.retention_priority is retention_priority
    assert made.prefetch_priority is prefetch_priority
    assert retention_priority.dtype == prefetch_priority.dtype == np.float64
    assert retention_priority.shape == prefetch_priority.shape == (LAYERS, EXPERTS)
    assert retention_priority.flags.c_contiguous
    assert not np.isnan(retention_priority).any()
    assert not np.isnan(prefetch_priority).any()


@all_policies
def test_events_without_optional_inputs_are_enough(policy: str) -> None:
    made = make_policy(policy, LAYERS, EXPERTS)
    for iteration in PLAYED:
        made.begin([step._replace(embedding=None) for step in iteration.steps])
        for event in iteration.events:
            made.routed(Routed(event.layer, event.experts))
        made.end()
    assert not np.isnan(made.retention_priority).any()
    assert not made.needs or not (made.prefetch_priority > 0).any()


def with_another_future(played: list[Iteration], events: int) -> list[Iteration]:
    """The same first iterations, followed by those of other requests."""
    past = events // LAYERS
    return played[:past] + workload(7, SHAPE, iterations=len(played) - past)


@all_policies
@pytest.mark.parametrize("past", [LAYERS, 10 * LAYERS])
def test_decisions_do_not_depend_on_the_future(policy: str, past: int) -> None:
    other = with_another_future(PLAYED, past)
    assert scores(informed(policy, PLAYED), PLAYED)[:past] == scores(informed(policy, other), other)[:past]


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_depend_on_the_future(bound: str) -> None:
    other = with_another_future(PLAYED, 10 * LAYERS)
    assert BOUNDS[bound].clairvoyant
    assert scores(informed(bound, PLAYED), PLAYED)[:10] != scores(informed(bound, other), other)[:10]


@all_policies
def test_no_policy_is_clairvoyant(policy: str) -> None:
    assert not FACTORIES[policy].clairvoyant


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_are_refused_outside_the_simulator(bound: str) -> None:
    with pytest.raises(ConfigError, match=f"--policy: '{bound}' knows the future"):
        make_cache_manager(bound, 1, 1, 1)


@all_policies
def test_compiled_and_interpreted_policies_agree(policy: str) -> None:
    if not FACTORIES[policy].compiles:
        pytest.skip("it has no kernels")
    truncated = workload(3, SHAPE, truncated=True, batch=3)
    for played in (PLAYED, truncated):
        plain, fast = (
            make_policy(policy, LAYERS, EXPERTS, jit=jit, **options(policy, SHAPE)) for jit in (interpreted, compiled)
        )
        for iteration in [*played, *played]:
            for made in (plain, fast):
                made.begin(iteration.steps)
            for event in iteration.events:
                plain.routed(event)
                fast.routed(event)
                np.testing.assert_allclose(fast.retention_priority, plain.retention_priority, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(fast.prefetch_priority, plain.prefetch_priority, rtol=1e-5, atol=1e-6)
            for made in (plain, fast):
                made.end()


def test_unknown_policy_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"--policy: unknown policy 'lur'; choose one of lru, "):
        make_cache_manager("lur", 1, 1, 1)


def test_a_pool_without_slots_is_refused() -> None:
    with pytest.raises(InvariantError, match="at least one slot"):
        make_cache_manager("lru", 1, 1, 0)
