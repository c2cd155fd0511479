"""The bounds: their view of the future, and that no policy does better."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.policy import POLICIES, CacheManager, Policy, compute_future, make_policy
from finemoe.policy.belady import NEVER, Belady, Oracle
from finemoe.types import ExpertId, Routed
from tests.policy.cache_driver import CacheDriver

LAYERS, EXPERTS = 2, 4
Events = list[list[int]]  # flat indices of one layer, ascending

layers_of_events = st.integers(0, LAYERS - 1)
events = st.lists(
    st.builds(
        lambda layer, needed: sorted(layer * EXPERTS + e for e in needed),
        layers_of_events,
        st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=2),
    ),
    min_size=1,
    max_size=12,
)


def accesses(trace: Events) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    ptr = np.cumsum([0] + [len(event) for event in trace]).astype(np.int64)
    return ptr, np.array([expert for event in trace for expert in event], np.int64)


def routed(event: list[int]) -> Routed:
    return Routed(event[0] // EXPERTS, tuple(expert % EXPERTS for expert in event))


@given(events)
def test_next_uses_match_the_trace(trace: Events) -> None:
    ptr, next_use, first_use = compute_future(LAYERS, EXPERTS, *accesses(trace))
    for expert in range(LAYERS * EXPERTS):
        when = [i for i, event in enumerate(trace) if expert in event]
        assert first_use.reshape(-1)[expert] == (when[0] if when else NEVER)
        for use, then in pairwise([*when, NEVER]):
            assert next_use[ptr[use] + trace[use].index(expert)] == then


def misses(policy: Policy, trace: Events, capacity: int) -> int:
    driver = CacheDriver(CacheManager(LAYERS, EXPERTS, capacity, policy))
    return sum(len(driver.event(routed(event))) for event in trace)


def fewest_misses(trace: Events, capacity: int) -> int:
    """By exhaustive search over all victims."""
    states = {frozenset[int](): 0}
    for event in trace:
        reached: dict[frozenset[int], int] = {}
        for held, cost in states.items():
            missing = [expert for expert in event if expert not in held]
            over = max(0, len(held) + len(missing) - capacity)
            for victims in combinations(sorted(held - set(event)), over):
                state = held - set(victims) | set(event)
                reached[state] = min(reached.get(state, 10**9), cost + len(missing))
        states = reached
    return min(states.values())


@given(events, st.integers(2, 5))
@settings(max_examples=50)
def test_belady_has_the_fewest_misses(trace: Events, capacity: int) -> None:
    least = misses(Belady(LAYERS, EXPERTS, compute_future(LAYERS, EXPERTS, *accesses(trace))), trace, capacity)
    assert least == fewest_misses(trace, capacity)
    for policy in POLICIES:
        assert misses(make_policy(policy, LAYERS, EXPERTS), trace, capacity) >= least


@given(events, st.integers(2, 6))
def test_oracle_prefetches_the_soonest_use_and_keeps_it(trace: Events, capacity: int) -> None:
    oracle = Oracle(LAYERS, EXPERTS, compute_future(LAYERS, EXPERTS, *accesses(trace)))
    driver = CacheDriver(CacheManager(LAYERS, EXPERTS, capacity, oracle))

    def next_use(expert: ExpertId, now: int) -> int:
        later = (i for i in range(now, len(trace)) if expert.layer * EXPERTS + expert.expert in trace[i])
        return next(later, NEVER)

    for now, event in enumerate(trace):
        while (fetch := driver.idle()) is not None:
            absent = [ExpertId(la, e) for la in range(LAYERS) for e in range(EXPERTS)]
            absent = [e for e in absent if e not in driver.resident and e not in driver.in_flight]
            assert next_use(fetch.expert, now) <= min(
                (next_use(e, now) for e in absent if e != fetch.victim), default=NEVER
            )
            if fetch.victim is not None:
                assert next_use(fetch.victim, now) > next_use(fetch.expert, now)
            driver.land(fetch.expert)
        assert not driver.event(routed(event)), "with an idle link, everything needed was prefetched"


def test_events_beyond_the_future_raise() -> None:
    belady = Belady(1, 2, compute_future(1, 2, np.array([0, 1]), np.array([0])))
    belady.routed(Routed(0, (0,)))
    with pytest.raises(IndexError):
        belady.routed(Routed(0, (1,)))
