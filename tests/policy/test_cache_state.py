"""Throttling of prefetches that do not pay, and experts that a layer does not have."""

from __future__ import annotations

import numpy as np
import pytest

from finemoe.jit import compiler
from finemoe.policy import CacheManager, Policy
from finemoe.policy.cache_state import (
    ABSENT,
    LOST,
    NONE,
    REGRETTED,
    RESIDENT,
    THROTTLE_ITERATIONS,
    THROTTLED,
    WINDOW,
    access,
    begin_prefetch,
    make_cache_state,
    next_prefetch_candidate,
    throttle_prefetch,
)
from finemoe.types import ExpertId, Routed

LAYERS, EXPERTS = 1, 3


class PrefetchAll(Policy):
    """Prefetches whatever is absent; `right`: whether the layer then needs it."""

    prefetches = True
    throttles_prefetch = True
    margin = -1.0

    def __init__(self, *, right: bool) -> None:
        super().__init__(LAYERS, EXPERTS)
        self.prefetch_priority[:] = 1.0
        self.right = right


def run(policy: PrefetchAll, iterations: int) -> CacheManager:
    """One slot. Between iterations an expert is prefetched; the layer needs that one, or the one it evicted."""
    cache_manager = CacheManager(LAYERS, EXPERTS, 1, policy)
    needed = 0
    for _ in range(iterations):
        cache_manager.begin(())
        fetch = cache_manager.prefetch()
        if fetch is not None:
            cache_manager.landed(fetch.expert)
            if policy.right:
                needed = fetch.expert.expert
        for missing in cache_manager.routed(Routed(0, [needed])).fetches:
            cache_manager.landed(missing.expert)
        cache_manager.used(ExpertId(0, needed))
        cache_manager.end()
    return cache_manager


def test_prefetches_that_evict_needed_experts_are_throttled_and_tried_again() -> None:
    cache = run(PrefetchAll(right=False), WINDOW + 3 * THROTTLE_ITERATIONS + WINDOW).cache
    assert cache.counters[THROTTLED] == 2 * THROTTLE_ITERATIONS
    assert cache.counters[REGRETTED] >= 2 * WINDOW - 2


def test_useful_prefetches_are_not_throttled() -> None:
    cache = run(PrefetchAll(right=True), 4 * WINDOW).cache
    assert cache.counters[THROTTLED] == 0
    assert cache.prefetch_balance[LOST] == 0


def test_policies_can_opt_out_of_throttling() -> None:
    policy = PrefetchAll(right=False)
    policy.throttles_prefetch = False
    assert run(policy, 4 * WINDOW).cache.counters[THROTTLED] == 0


def test_an_evicted_expert_that_is_prefetched_again_is_not_regretted() -> None:
    cache = make_cache_state(LAYERS, EXPERTS, 1)
    retention_priority = np.zeros(EXPERTS)
    for expert in (0, 1, 0):
        begin_prefetch(cache, retention_priority, expert)
        cache.status[expert] = RESIDENT
    access(cache, 0)
    assert cache.counters[REGRETTED] == 0
    assert cache.status[1] == ABSENT
    access(cache, 1)
    assert cache.counters[REGRETTED] == 1
    access(cache, 1)
    assert cache.counters[REGRETTED] == 1


@pytest.mark.parametrize("compile_it", [False, True])
def test_no_candidate_while_throttled(compile_it: bool) -> None:
    jit = compiler() if compile_it else lambda kernel: kernel
    cache, prefetch_priority = make_cache_state(LAYERS, EXPERTS, 2), np.ones(EXPERTS)
    choose, step = jit(next_prefetch_candidate), jit(throttle_prefetch)
    assert choose(cache, prefetch_priority, prefetch_priority, 0.1, 0) == 0
    cache.prefetch_balance[:] = [WINDOW, 1, 1, 0]
    step(cache)
    assert choose(cache, prefetch_priority, prefetch_priority, 0.1, 0) == NONE
    for _ in range(THROTTLE_ITERATIONS):
        step(cache)
    assert choose(cache, prefetch_priority, prefetch_priority, 0.1, 0) == 0
    assert cache.counters[THROTTLED] == THROTTLE_ITERATIONS


def test_experts_that_a_layer_does_not_have_are_never_prefetched() -> None:
    policy = Policy(2, EXPERTS)
    policy.prefetch_priority[:] = 1.0
    cache_manager = CacheManager(2, EXPERTS, 6, policy, sizes=(1, 3))
    fetched = []
    while (fetch := cache_manager.prefetch()) is not None:
        fetched.append(fetch.expert)
        cache_manager.landed(fetch.expert)
    assert sorted(fetched) == [ExpertId(0, 0), ExpertId(1, 0), ExpertId(1, 1), ExpertId(1, 2)]
    cache_manager.check_integrity()
