"""The fused kernel for single-request decoding does the same as the general path."""

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
    """Never uses the fused kernel."""

    def _routed_single(self, event: Routed) -> bool:
        del event
        return False


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(PARTS), st.booleans(), st.booleans(), st.randoms())
def test_fused_kernel_equals_step_by_step(
    seed: int, capacity: int, without: frozenset[str], gated: bool, drop: bool, random: Random
) -> None:
    fused, reference = (
        kind(SHAPE.layers, SHAPE.experts, capacity, without=without) for kind in (FinemoePolicy, StepByStep)
    )
    for iteration in workload(seed, SHAPE, iterations=12, batch=1):
        for policy in (fused, reference):
            policy.lagging = False
            policy.begin(iteration.steps)
        for event in iteration.events:
            if drop and random.random() < 0.1:
                continue  # as if a policy could not keep up
            lagging = random.random() < 0.3
            for policy in (fused, reference):
                policy.lagging = lagging
                policy.routed(event if gated else event._replace(gates=None, lookahead=None))
            assert (fused.retention_priority == reference.retention_priority).all()
        for policy in (fused, reference):
            policy.end()
    known, expected = fused.state_dict(), reference.state_dict()
    assert known.keys() == expected.keys()
    assert all((known[name] == expected[name]).all() for name in known)


class Recording(FinemoePolicy):
    """Records whether the last event was handled by the fused kernel."""

    fused: bool = False

    def _routed_single(self, event: Routed) -> bool:
        self.fused = super()._routed_single(event)
        return self.fused


def test_fused_kernel_is_used_exactly_for_single_request_decoding() -> None:
    policy, seen = Recording(SHAPE.layers, SHAPE.experts), set()
    for iteration in workload(1, SHAPE, iterations=20):
        single = len(iteration.steps) == 1 and iteration.steps[0].phase == DECODE and policy.history is not None
        seen.add(single)
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.fused = False
            policy.routed(event)
            assert policy.fused == single
        policy.end()
    assert seen == {True, False}


@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_and_interpreted_agree(batch: int) -> None:
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
