"""The baselines with an LRU cache, against the dumbest implementation of what they do."""

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
from finemoe.policy.top_k import TopKEstimator, likeliest
from finemoe.types import ExpertId, Routed
from tests.policy.workload import Shape, workload

SHAPE = Shape(layers=4, experts=6, active=2)
Wanted = Callable[[Routed], dict[ExpertId, float]]


def whole_layer(event: Routed) -> dict[ExpertId, float]:
    after = (event.layer + 1) % SHAPE.layers
    return {ExpertId(after, expert): SHAPE.experts - expert for expert in range(SHAPE.experts)}


def next_gate(event: Routed) -> dict[ExpertId, float]:
    assert event.lookahead is not None
    if event.layer + 1 == SHAPE.layers:
        return {}
    spared: dict[ExpertId, float] = {}
    for gates in event.lookahead[:, 0].astype(float):
        for expert in sorted(range(SHAPE.experts), key=lambda e, g=gates: -g[e])[: SHAPE.active]:  # type: ignore[misc]
            here = ExpertId(event.layer + 1, expert)
            spared[here] = spared.get(here, 1.0) * (1 - gates[expert])
    return {expert: 1 - chance for expert, chance in spared.items()}


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: DeepSpeedPolicy(SHAPE.layers, SHAPE.experts), whole_layer),
        (lambda: MixtralOffloadingPolicy(SHAPE.layers, SHAPE.experts, SHAPE.active), next_gate),
    ],
    ids=["deepspeed", "mixtral-offloading"],
)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_what_is_wanted_goes_last_and_the_rest_by_its_last_use(
    make: Callable[[], Policy], wanted: Wanted, seed: int, batch: int
) -> None:
    policy = make()
    uses: list[ExpertId] = []  # the last one last
    everything = [ExpertId(layer, e) for layer in range(SHAPE.layers) for e in range(SHAPE.experts)]
    for iteration in workload(seed, SHAPE, iterations=5, batch=batch):
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.routed(event)
            needed = [ExpertId(event.layer, expert) for expert in event.experts]
            uses = [expert for expert in uses if expert not in needed] + needed
            prefetch_priority = wanted(event)
            for expert in everything:
                assert policy.prefetch_priority[expert] == pytest.approx(prefetch_priority.get(expert, 0.0))
            unused = [expert for expert in everything if expert not in uses and expert not in prefetch_priority]
            order = [e for e in uses if e not in prefetch_priority] + sorted(
                (e for e in prefetch_priority if prefetch_priority[e] > 0), key=lambda e: prefetch_priority[e]
            )
            assert all(policy.retention_priority[expert] < policy.retention_priority[order[0]] for expert in unused)
            retention_priority = [policy.retention_priority[expert] for expert in order]
            assert retention_priority == sorted(retention_priority)


def test_a_useless_prefetch_is_the_next_to_go() -> None:
    """As if it had come into a buffer: the cache of what was used is hardly worse off."""
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
def test_likeliest_keeps_the_top_of_each_request(p: list[list[float]], count: int) -> None:
    expected = np.ones(4)
    for row in p:
        for expert in sorted(range(4), key=lambda e, r=row: (-r[e], e))[:count]:  # type: ignore[misc]
            expected[expert] *= 1 - row[expert]
    np.testing.assert_allclose(likeliest(np.array(p, np.float32), count), 1 - expected, atol=1e-12)


def test_k_is_the_fewest_experts_ever_needed_or_as_given() -> None:
    learned, given_ = TopKEstimator(), TopKEstimator(3)
    for needed in (0, 9, 4, 7, 0):
        learned.see(needed)
        given_.see(needed)
    assert (learned.count, given_.count) == (4, 3)


def test_without_recorded_lookahead_speculation_is_lru() -> None:
    speculative, lru = (make_policy(name, SHAPE.layers, SHAPE.experts) for name in ("mixtral-offloading", "lru"))
    for iteration in workload(0, SHAPE):
        for event in iteration.events:
            blind: npt.NDArray[np.float32] | None = None
            for policy in (speculative, lru):
                policy.routed(event._replace(lookahead=blind))
            assert np.array_equal(speculative.retention_priority, lru.retention_priority)
            assert not speculative.prefetch_priority.any()
