"""A cache under every policy, with layers, idle links, landings, failures and errors in any order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finemoe.policy import POLICIES, CacheManager
from finemoe.types import ExpertId
from tests.policy.drive import Drive
from tests.policy.test_contract import informed
from tests.policy.workload import Shape, workload

SHAPE = Shape(layers=3, experts=5, active=2)


class Cache(RuleBasedStateMachine):
    policy: str

    @initialize(seed=st.integers(0, 99), capacity=st.integers(1, 15))
    def start(self, seed: int, capacity: int) -> None:
        self.played = iter(workload(seed, SHAPE, iterations=60))
        self.drive = Drive(CacheManager(SHAPE.layers, SHAPE.experts, capacity, informed(self.policy, [], SHAPE)))
        self.begin()

    def begin(self) -> None:
        iteration = next(self.played)
        self.drive.cache_manager.begin(iteration.steps)
        self.events = list(iteration.events)

    @precondition(lambda self: not self.drive.needed)
    @rule()
    def route(self) -> None:
        event = self.events.pop(0)
        self.drive.needed = [ExpertId(event.layer, expert) for expert in event.experts]
        self.drive.follow(self.drive.cache_manager.routed(event))
        if not self.events:
            self.drive.cache_manager.end()
            self.begin()

    @precondition(lambda self: any(expert in self.drive.resident for expert in self.drive.needed))
    @rule(which=st.integers(0, 9))
    def use(self, which: int) -> None:
        usable = [expert for expert in self.drive.needed if expert in self.drive.resident]
        self.drive.use(usable[which % len(usable)])

    @precondition(lambda self: self.drive.in_flight)
    @rule(which=st.integers(0, 99))
    def land(self, which: int) -> None:
        self.drive.land(self.drive.in_flight[which % len(self.drive.in_flight)])

    @precondition(lambda self: self.drive.in_flight)
    @rule(which=st.integers(0, 99))
    def fail(self, which: int) -> None:
        self.drive.fail(self.drive.in_flight[which % len(self.drive.in_flight)])

    @rule()
    def idle(self) -> None:
        self.drive.idle()

    @rule()
    def cancel(self) -> None:
        self.drive.cancel()

    @rule()
    def error(self) -> None:
        self.drive.cache_manager.clear()
        self.drive.resident.clear()
        self.drive.in_flight.clear()
        self.drive.needed.clear()

    @invariant()
    def what_is_needed_will_come(self) -> None:
        if not hasattr(self, "drive"):
            return
        drive = self.drive
        drive.check()
        if drive.needed and not any(expert in drive.resident for expert in drive.needed):
            assert drive.in_flight or not drive.cache_manager.short_of_slots


@pytest.mark.parametrize("policy", POLICIES)
def test_the_cache_keeps_its_promises(policy: str) -> None:
    machine: Any = type("CacheUnder", (Cache,), {"policy": policy})
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=60, deadline=None)
    machine.TestCase("runTest").debug()
