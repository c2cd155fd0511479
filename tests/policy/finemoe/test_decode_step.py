"""A request that decodes alone is heard in one kernel: the same as step by step."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.policy import make_policy
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.types import DECODE, Routed
from tests.policy.compile import compiled
from tests.policy.workload import Shape, workload

SHAPE = Shape(layers=4, experts=6, active=2)
PARTS: list[frozenset[str]] = [frozenset(), frozenset({"lookahead"}), frozenset({"own"})]


class StepByStep(FinemoePolicy):
    """The twin."""

    def _routed_alone(self, event: Routed) -> bool:
        del event
        return False


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(PARTS), st.booleans(), st.booleans(), st.randoms())
def test_what_one_kernel_makes_of_a_layer_is_what_the_steps_make_of_it(
    seed: int, capacity: int, without: frozenset[str], gated: bool, left_out: bool, random: Random
) -> None:
    one, other = (kind(SHAPE.layers, SHAPE.experts, capacity, without=without) for kind in (FinemoePolicy, StepByStep))
    for iteration in workload(seed, SHAPE, iterations=12, batch=1):
        for policy in (one, other):
            policy.lagging = False
            policy.begin(iteration.steps)
        for event in iteration.events:
            if left_out and random.random() < 0.1:
                continue  # as where a policy could not keep up
            late = random.random() < 0.3
            for policy in (one, other):
                policy.lagging = late
                policy.routed(event if gated else event._replace(gates=None, lookahead=None))
            assert (one.retention_priority == other.retention_priority).all()
        for policy in (one, other):
            policy.end()
    known, expected = one.state_dict(), other.state_dict()
    assert known.keys() == expected.keys()
    assert all((known[name] == expected[name]).all() for name in known)


class Counting(FinemoePolicy):
    """Says which events it heard so."""

    heard: bool = False

    def _routed_alone(self, event: Routed) -> bool:
        self.heard = super()._routed_alone(event)
        return self.heard


def test_only_a_request_that_decodes_alone_is_heard_so() -> None:
    policy, seen = Counting(SHAPE.layers, SHAPE.experts), set()
    for iteration in workload(1, SHAPE, iterations=20):
        alone = len(iteration.steps) == 1 and iteration.steps[0].phase == DECODE and policy.history is not None
        seen.add(alone)
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.heard = False
            policy.routed(event)
            assert policy.heard == alone
        policy.end()
    assert seen == {True, False}


@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_it_says_the_same(batch: int) -> None:
    plain, fast = (
        make_policy("finemoe", SHAPE.layers, SHAPE.experts, capacity=20, **options)
        for options in ({}, {"jit": compiled})
    )
    for iteration in workload(3, SHAPE, iterations=12, batch=batch):
        for policy in (plain, fast):
            policy.begin(iteration.steps)
        for event in iteration.events:
            for policy in (plain, fast):
                policy.routed(event)
            np.testing.assert_allclose(fast.retention_priority, plain.retention_priority, rtol=1e-4, atol=1e-9)
        for policy in (plain, fast):
            policy.end()
