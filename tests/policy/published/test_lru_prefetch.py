"""`deepspeed` and `mixtral-offloading` against simple reference implementations, and top-k helpers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.policy import CacheManager, make_policy
from finemoe.policy.base import Policy
from finemoe.policy.published.lru_prefetch import DeepSpeedPolicy, MixtralOffloadingPolicy
from finemoe.policy.top_k import TopKEstimator, top_k_union
from finemoe.types import ExpertId, Routed
from tests.policy.workload import Shape, workload

SHAPE = Shape(layers=4, experts=6, active=2)
Priorities = Callable[[Routed], dict[ExpertId, float]]


def whole_layer(event: Routed) -> dict[ExpertId, float]:
    after = (event.layer + 1) % SHAPE.layers
    return {ExpertId(after, expert): SHAPE.experts - expert for expert in range(SHAPE.experts)}


def next_gate(event: Routed) -> dict[ExpertId, float]:
    assert event.lookahead is not None
    if event.layer + 1 == SHAPE.layers:
        return {}
    missed: dict[ExpertId, float] = {}
    for gates in event.lookahead[:, 0].astype(float):
        for expert in sorted(range(SHAPE.experts), key=lambda e, g=gates: -g[e])[: SHAPE.active]:  # type: ignore[misc]
            here = ExpertId(event.layer + 1, expert)
            missed[here] = missed.get(here, 1.0) * (1 - gates[expert])
    return {expert: 1 - chance for expert, chance in missed.items()}


@pytest.mark.parametrize(
    ("make", "priorities"),
    [
        (lambda: DeepSpeedPolicy(SHAPE.layers, SHAPE.experts), whole_layer),
        (lambda: MixtralOffloadingPolicy(SHAPE.layers, SHAPE.experts, SHAPE.active), next_gate),
    ],
    ids=["deepspeed", "mixtral-offloading"],
)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_predicted_experts_are_protected_and_the_rest_ordered_by_last_use(
    make: Callable[[], Policy], priorities: Priorities, seed: int, batch: int
) -> None:
    policy = make()
    uses: list[ExpertId] = []  # most recent last
    everything = [ExpertId(layer, e) for layer in range(SHAPE.layers) for e in range(SHAPE.experts)]
    for iteration in workload(seed, SHAPE, iterations=5, batch=batch):
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.routed(event)
            needed = [ExpertId(event.layer, expert) for expert in event.experts]
            uses = [expert for expert in uses if expert not in needed] + needed
            prefetch_priority = priorities(event)
            for expert in everything:
                assert policy.prefetch_priority[expert] == pytest.approx(prefetch_priority.get(expert, 0.0))
            unused = [expert for expert in everything if expert not in uses and expert not in prefetch_priority]
            order = [e for e in uses if e not in prefetch_priority] + sorted(
                (e for e in prefetch_priority if prefetch_priority[e] > 0), key=lambda e: prefetch_priority[e]
            )
            assert all(policy.retention_priority[expert] < policy.retention_priority[order[0]] for expert in unused)
            retention_priority = [policy.retention_priority[expert] for expert in order]
            assert retention_priority == sorted(retention_priority)


def test_an_unused_prefetch_is_evicted_next() -> None:
    """As if it had been loaded into a separate buffer: the LRU cache loses only one slot."""
    policy = MixtralOffloadingPolicy(3, 4)
    cache_manager = CacheManager(3, 4, 3, policy)

    def run(layer: int, expert: int, guess: int) -> list[ExpertId | None]:
        ahead = np.zeros((1, 1, 4), np.float32)
        ahead[0, 0, guess] = 1
        fetches = cache_manager.routed(Routed(layer, (expert,), None, ahead)).fetches
        for fetch in fetches:
            cache_manager.landed(fetch.expert)
        cache_manager.used(ExpertId(layer, expert))
        prefetch = cache_manager.prefetch()
        if prefetch is not None:
            cache_manager.landed(prefetch.expert)
        return [fetch.victim for fetch in fetches]

    run(0, 0, guess=3)
    run(1, 1, guess=0)  # the pool is full: the wrong guess gives its slot to the next one
    assert cache_manager.is_resident(ExpertId(2, 0))
    assert not cache_manager.is_resident(ExpertId(1, 3))
    assert run(2, 2, guess=0) == [ExpertId(2, 0)]
    assert cache_manager.is_resident(ExpertId(0, 0))


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=3), st.integers(0, 5))
def test_top_k_union_keeps_the_top_k_of_each_request(p: list[list[float]], count: int) -> None:
    expected = np.ones(4)
    for row in p:
        for expert in sorted(range(4), key=lambda e, r=row: (-r[e], e))[:count]:  # type: ignore[misc]
            expected[expert] *= 1 - row[expert]
    np.testing.assert_allclose(top_k_union(np.array(p, np.float32), count), 1 - expected, atol=1e-12)


def test_k_is_as_given_or_the_fewest_experts_needed() -> None:
    estimated, fixed = TopKEstimator(), TopKEstimator(3)
    for needed in (0, 9, 4, 7, 0):
        estimated.observe_count(needed)
        fixed.observe_count(needed)
    assert (estimated.count, fixed.count) == (4, 3)


def test_mixtral_offloading_without_lookahead_is_lru() -> None:
    speculative, lru = (make_policy(name, SHAPE.layers, SHAPE.experts) for name in ("mixtral-offloading", "lru"))
    for iteration in workload(0, SHAPE):
        for event in iteration.events:
            no_lookahead: npt.NDArray[np.float32] | None = None
            for policy in (speculative, lru):
                policy.routed(event._replace(lookahead=no_lookahead))
            assert np.array_equal(speculative.retention_priority, lru.retention_priority)
            assert not speculative.prefetch_priority.any()
