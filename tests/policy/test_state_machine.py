"""The cache manager under every policy: layers, idle links, landings, failures and errors in any order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finemoe.policy import POLICIES, CacheManager
from finemoe.types import ExpertId
from tests.policy.cache_driver import CacheDriver
from tests.policy.test_contract import informed
from tests.policy.workload import Shape, workload

SHAPE = Shape(layers=3, experts=5, active=2)


class Cache(RuleBasedStateMachine):
    policy: str

    @initialize(seed=st.integers(0, 99), capacity=st.integers(1, 15))
    def start(self, seed: int, capacity: int) -> None:
        self.played = iter(workload(seed, SHAPE, iterations=60))
        self.driver = CacheDriver(CacheManager(SHAPE.layers, SHAPE.experts, capacity, informed(self.policy, [], SHAPE)))
        self.begin()

    def begin(self) -> None:
        iteration = next(self.played)
        self.driver.cache_manager.begin(iteration.steps)
        self.events = list(iteration.events)

    @precondition(lambda self: not self.driver.needed)
    @rule()
    def route(self) -> None:
        event = self.events.pop(0)
        self.driver.needed = [ExpertId(event.layer, expert) for expert in event.experts]
        self.driver.execute(self.driver.cache_manager.routed(event))
        if not self.events:
            self.driver.cache_manager.end()
            self.begin()

    @precondition(lambda self: any(expert in self.driver.resident for expert in self.driver.needed))
    @rule(which=st.integers(0, 9))
    def use(self, which: int) -> None:
        usable = [expert for expert in self.driver.needed if expert in self.driver.resident]
        self.driver.use(usable[which % len(usable)])

    @precondition(lambda self: self.driver.in_flight)
    @rule(which=st.integers(0, 99))
    def land(self, which: int) -> None:
        self.driver.land(self.driver.in_flight[which % len(self.driver.in_flight)])

    @precondition(lambda self: self.driver.in_flight)
    @rule(which=st.integers(0, 99))
    def fail(self, which: int) -> None:
        self.driver.fail(self.driver.in_flight[which % len(self.driver.in_flight)])

    @rule()
    def idle(self) -> None:
        self.driver.idle()

    @rule()
    def cancel(self) -> None:
        self.driver.cancel()

    @rule()
    def error(self) -> None:
        self.driver.cache_manager.clear()
        self.driver.resident.clear()
        self.driver.in_flight.clear()
        self.driver.needed.clear()

    @invariant()
    def needed_experts_are_loaded_eventually(self) -> None:
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        driver.check()
        if driver.needed and not any(expert in driver.resident for expert in driver.needed):
            assert driver.in_flight or not driver.cache_manager.short_of_slots


@pytest.mark.parametrize("policy", POLICIES)
def test_invariants_hold_in_any_order_of_events(policy: str) -> None:
    machine: Any = type("CacheUnder", (Cache,), {"policy": policy})
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=60, deadline=None)
    machine.TestCase("runTest").debug()
