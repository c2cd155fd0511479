"""A link whose time a test controls, and the engine on it: the plain twin of the simulator's compiled clock."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

from finemoe.engine.engine import Engine
from finemoe.policy import CacheManager, Policy
from finemoe.sim.hardware import Machine, Noise
from finemoe.sim.link_kernel import FETCHED, PREFETCHED, WITHDRAWN
from finemoe.sim.workload import Schedule, TraceView
from finemoe.store import RamSlotPool
from finemoe.types import Cancelled, ExpertId, Fetch, Landed, Plan, Routed, Step


@dataclass
class VirtualLink:
    """A `Transfer` of one expert at a time, each taking `transfer`, in `chunks` pieces; prefetches take longer."""

    transfer: float
    chunks: int
    slowdown: float = 1.0
    factors: Sequence[float] = (1.0,)  # of one transfer after another
    now: float = 0.0
    busy: float = 0.0
    when_idle: Callable[[], None] | None = None
    fill: Callable[[ExpertId, memoryview], None] = lambda _, slot: None
    queue: list[ExpertId] = field(default_factory=list)
    prefetch: ExpertId | None = None
    under_way: bool = False  # the prefetch is on the wire: it was not pre-empted
    takes: dict[ExpertId, float] = field(default_factory=dict)
    left: dict[ExpertId, float] = field(default_factory=dict)
    begun: int = 0
    landed: list[Landed] = field(default_factory=list)
    log: list[tuple[int, ExpertId]] = field(default_factory=list)
    alarm: tuple[float, Callable[[], None]] | None = None  # when, and what happens then
    moved_bytes: int = 0
    waited_bytes: float = 0.0

    def submit(self, expert: ExpertId, slot: memoryview, *, urgent: bool = True) -> None:
        self.takes[expert] = self.left[expert] = self.transfer * self.factors[self.begun % len(self.factors)]
        self.begun += 1
        self.fill(expert, slot)
        self.log.append((FETCHED if urgent else PREFETCHED, expert))
        if urgent:
            self.queue.append(expert)
        else:
            assert self.prefetch is None, "one prefetch at a time"
            self.prefetch, self.under_way = expert, True

    def promote(self, expert: ExpertId) -> None:
        assert expert == self.prefetch
        self.prefetch = None
        self.queue.append(expert)

    def cancel(self, expert: ExpertId) -> None:
        assert expert == self.prefetch
        self.prefetch = None
        self.log.append((WITHDRAWN, expert))
        self.landed.append(Landed(expert, Cancelled()))

    def wake(self) -> None:
        """Asks in `advance`, when it is idle and time passes."""

    def poll(self, which: Container[ExpertId] | None = None) -> list[Landed]:
        taken = [each for each in self.landed if which is None or each.expert in which]
        self.landed = [each for each in self.landed if each not in taken]
        return taken

    def wait(self) -> list[Landed]:
        self._preempt()
        assert self.landed or self.queue, "waits for ever"
        while not self.landed:
            self.advance(max(self.now, self.busy) + self.left[self.queue[0]])
        return self.poll()

    def cancel_all(self) -> None:
        self.queue.clear()
        self.prefetch = None

    def close(self) -> None:
        self.cancel_all()

    def advance(self, until: float) -> None:
        if self.alarm is not None and self.alarm[0] <= until:
            (due, ring), self.alarm = self.alarm, None
            self._advance(due)
            ring()
        self._advance(until)

    def _advance(self, until: float) -> None:
        self._preempt()
        while True:
            start, throttle = max(self.now, self.busy), 1.0
            if self.queue:
                expert = self.queue[0]
            elif start >= until:
                break
            else:
                if self.prefetch is None and self.when_idle is not None:
                    self.when_idle()
                if self.prefetch is None:
                    break
                expert, self.under_way, throttle = self.prefetch, True, self.slowdown
            done = start + self.left[expert] * throttle
            if done > until:
                if until > start:
                    self.left[expert] -= (until - start) / throttle
                break
            if self.queue:
                self.queue.pop(0)
            else:
                self.prefetch = None
            self.landed.append(Landed(expert))
            self.now = done
        self.now = until

    def _preempt(self) -> None:
        if not self.queue or self.prefetch is None or not self.under_way or not self.chunks:
            return
        self.under_way = False
        rest = self.left[self.prefetch] % (self.takes[self.prefetch] / self.chunks)
        if self.left[self.prefetch] - rest <= 1e-12:
            self.queue.insert(0, self.prefetch)
            self.prefetch = None
        else:
            self.left[self.prefetch] -= rest
            self.busy = self.now + rest * self.slowdown


class Lagging(Policy):
    """Stands for another policy, and says what it said `lag` later, by the link's clock; unless it has said more."""

    def __init__(self, policy: Policy, link: VirtualLink, machine: Machine, noise: Noise) -> None:
        super().__init__(policy.layers, policy.experts)
        self.inner, self._link, self._machine, self._noise = policy, link, machine, noise
        self._free = 0.0
        self.margin, self.switch = policy.margin, policy.switch
        self.prefetches, self.throttles_prefetch = policy.prefetches, policy.throttles_prefetch  # type: ignore[misc] # of its kind
        self._say()

    def begin(self, steps: Sequence[Step]) -> None:
        self.inner.begin(steps)
        self._think(self._machine.lag if self._machine.begin_lag is None else self._machine.begin_lag)

    def routed(self, event: Routed) -> None:
        self.inner.routed(event)
        self._think(self._machine.lag)

    def end(self) -> None:
        self.inner.end()

    def _think(self, lag: float) -> None:
        self._free = max(self._link.now, self._free) + lag * self._noise.lag()
        self._link.alarm = self._free, self._say

    def _say(self) -> None:
        self.retention_priority[:], self.prefetch_priority[:] = (
            self.inner.retention_priority,
            self.inner.prefetch_priority,
        )


class LoggedCacheManager(CacheManager):
    """Notes whose slot each fetch takes."""

    victims: list[Fetch]

    def __init__(self, layers: int, experts: int, capacity: int, policy: Policy) -> None:
        super().__init__(layers, experts, capacity, policy)
        self.victims = []

    def _plan_waiting(self) -> Plan:
        plan = super()._plan_waiting()
        self.victims += plan.fetches
        return plan

    def prefetch(self, device: int = 0) -> Fetch | None:
        fetch = super().prefetch(device)
        if fetch is not None:
            self.victims.append(fetch)
        return fetch


@dataclass
class EngineReplay:
    """The engine driven over a schedule. `times` of the iterations, in the units of the simulator."""

    engine: Engine
    link: VirtualLink
    noise: Noise = field(default_factory=lambda: Noise(Machine(1, 1.0)))

    @classmethod
    def make(cls, schedule: Schedule, policy: Policy, capacity: int, link: VirtualLink) -> EngineReplay:
        cache_manager = LoggedCacheManager(schedule.layers, schedule.experts, capacity, policy)
        return cls.make_with(RamSlotPool(capacity, 64), cache_manager, link)

    @classmethod
    def make_with(cls, pool: RamSlotPool, cache_manager: LoggedCacheManager, link: VirtualLink) -> EngineReplay:
        return cls(Engine(pool, cache_manager, link, clock=lambda: link.now), link)

    def run(
        self,
        schedule: Schedule,
        evidence: TraceView,
        tokens_per_unit: int = 64,
        before_gate: float = 0.5,
        gap: float = 0.0,
    ) -> list[float]:
        times = []
        for iteration in range(len(schedule)):
            begin, scale = self.link.now, max(1.0, float(schedule.tokens[iteration]) / tokens_per_unit)
            befores, afters = self.noise.computes(schedule.layers)
            before, after = before_gate * scale * befores, (scale - before_gate * scale) * afters
            gates, lookahead = evidence.gates(schedule, iteration), evidence.lookahead(schedule, iteration)
            self.engine.begin(evidence.steps(schedule, iteration))
            self.link.advance(self.link.now + before[0])
            for layer in range(schedule.layers):
                event = iteration * schedule.layers + layer
                needs = schedule.needs[schedule.ptr[event] : schedule.ptr[event + 1]] - layer * schedule.experts
                routed = Routed(
                    layer,
                    needs.tolist(),
                    None if gates is None else gates[:, layer],
                    None if lookahead is None else lookahead[:, layer],
                    evidence.active,
                )
                for _ in self.timed(self.engine.serve(routed), after[layer] / max(1, len(needs))):
                    pass
                if layer < schedule.layers - 1:
                    self.link.advance(self.link.now + before[layer + 1])
            times.append(self.link.now - begin)
            self.link.advance(self.link.now + gap)
            self.engine.end()
            self.engine.check_integrity()
        return times

    def timed(self, serving: Iterator[tuple[int, int]], share: float) -> Iterator[tuple[int, int]]:
        """Each expert computes for `share` before the engine hears that it was used."""
        for item in serving:
            yield item
            self.link.advance(self.link.now + share)

    def actions(self, experts: int) -> list[tuple[int, int, int]]:
        """In the form of the simulator's log."""
        cache_manager = self.engine.cache_manager
        assert isinstance(cache_manager, LoggedCacheManager)
        victims = iter(cache_manager.victims)
        found = []
        for kind, expert in self.link.log:
            victim = -2
            if kind != WITHDRAWN:
                fetch = next(victims)
                assert fetch.expert == expert
                victim = -1 if fetch.victim is None else fetch.victim.layer * experts + fetch.victim.expert
            found.append((kind, expert.layer * experts + expert.expert, victim))
        return found
