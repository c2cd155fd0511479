"""Drives a controller through whole layers, checking its promises after every event: no engine, no pool, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finemoe.policy import Controller
from finemoe.types import ExpertId, Fetch, Plan, Routed

Choice = Callable[[int], int]  # of so many things, which comes first


def first(_: int) -> int:
    return 0


class Drive:
    """A controller, and all that a bystander can know about it."""

    def __init__(self, controller: Controller, choose: Choice = first) -> None:
        self.controller = controller
        self.choose = choose
        self.resident: set[ExpertId] = set()
        self.in_flight: list[ExpertId] = []
        self.needed: list[ExpertId] = []  # of the layer under way, not used yet
        self.log: list[Fetch] = []

    def layer(self, layer: int, experts: Sequence[int]) -> list[Fetch]:
        """Runs one layer to its end: lands and uses experts in any order. Returns its fetches."""
        begin = len(self.log)
        self.needed = [ExpertId(layer, expert) for expert in experts]
        self.follow(self.controller.routed(Routed(layer, tuple(experts))))
        while self.needed:
            usable = [expert for expert in self.needed if expert in self.resident]
            assert usable or self.in_flight, f"{self.needed} will never come"
            turn = self.choose(len(usable) + len(self.in_flight))
            if turn < len(usable):
                self.use(usable[turn])
            else:
                self.land(self.in_flight[turn - len(usable)])
        return self.log[begin:]

    def use(self, expert: ExpertId) -> None:
        self.needed.remove(expert)
        self.follow(self.controller.used(expert))

    def land(self, expert: ExpertId) -> None:
        self.in_flight.remove(expert)
        self.resident.add(expert)
        self.follow(self.controller.landed(expert))

    def follow(self, plan: Plan) -> None:
        """Books a plan, refusing whatever a pool would have to refuse."""
        for expert, victim, _ in plan.fetches:
            assert expert not in self.resident, f"{expert} is resident and fetched"
            assert expert not in self.in_flight, f"{expert} is fetched twice"
            if victim is None:
                assert len(self.resident) + len(self.in_flight) < self.controller.capacity, "no slot is free"
            else:
                assert victim in self.resident, f"{victim} is not resident and evicted"
                assert victim not in self.needed, f"{victim} is needed and evicted"
                self.resident.remove(victim)
            self.in_flight.append(expert)
        self.log += plan.fetches
        self.check()

    def check(self) -> None:
        self.controller.check_integrity()
        assert len(self.resident) + len(self.in_flight) <= self.controller.capacity
        assert all(self.controller.is_resident(expert) for expert in self.resident)
        assert all(self.controller.is_in_flight(expert) for expert in self.in_flight)
