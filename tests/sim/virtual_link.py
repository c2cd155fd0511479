"""A link on a virtual clock, and the engine driven on it: the reference for the simulator's compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

from finemoe.engine.engine import Engine
from finemoe.policy import CacheManager, Policy
from finemoe.sim.hardware import Machine, Noise
from finemoe.sim.link_kernel import CANCELLED, FETCHED, PREFETCHED
from finemoe.sim.workload import Schedule, TraceView
from finemoe.store import RamSlotPool
from finemoe.types import Cancelled, ExpertId, Fetch, Landed, Plan, Routed, Step


@dataclass
class VirtualLink:
    """A `Transfer` of one expert at a time, in `chunks` pieces of `transfer / chunks`; prefetches take longer."""

    transfer: float
    chunks: int
    slowdown: float = 1.0
    factors: Sequence[float] = (1.0,)  # of transfers in order
    now: float = 0.0
    busy: float = 0.0
    when_idle: Callable[[], None] | None = None
    fill: Callable[[ExpertId, memoryview], None] = lambda _, slot: None
    queue: list[ExpertId] = field(default_factory=list)
    prefetch: ExpertId | None = None
    in_transfer: bool = False  # the prefetch is in transfer, not preempted
    duration: dict[ExpertId, float] = field(default_factory=dict)
    remaining: dict[ExpertId, float] = field(default_factory=dict)
    started: int = 0
    landed: list[Landed] = field(default_factory=list)
    log: list[tuple[int, ExpertId]] = field(default_factory=list)
    alarm: tuple[float, Callable[[], None]] | None = None  # due time and callback
    moved_bytes: int = 0
    waited_bytes: float = 0.0

    def submit(self, expert: ExpertId, slot: memoryview, *, urgent: bool = True) -> None:
        self.duration[expert] = self.remaining[expert] = self.transfer * self.factors[self.started % len(self.factors)]
        self.started += 1
        self.fill(expert, slot)
        self.log.append((FETCHED if urgent else PREFETCHED, expert))
        if urgent:
            self.queue.append(expert)
        else:
            assert self.prefetch is None, "one prefetch at a time"
            self.prefetch, self.in_transfer = expert, True

    def promote(self, expert: ExpertId) -> None:
        assert expert == self.prefetch
        self.prefetch = None
        self.queue.append(expert)

    def cancel(self, expert: ExpertId) -> None:
        assert expert == self.prefetch
        self.prefetch = None
        self.log.append((CANCELLED, expert))
        self.landed.append(Landed(expert, Cancelled()))

    def wake(self) -> None:
        """Nothing to do: an idle link asks for a prefetch in `advance`."""

    def poll(self, which: Container[ExpertId] | None = None) -> list[Landed]:
        taken = [each for each in self.landed if which is None or each.expert in which]
        self.landed = [each for each in self.landed if each not in taken]
        return taken

    def wait(self) -> list[Landed]:
        self._preempt()
        assert self.landed or self.queue, "waits forever"
        while not self.landed:
            self.advance(max(self.now, self.busy) + self.remaining[self.queue[0]])
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
            start, slowdown = max(self.now, self.busy), 1.0
            if self.queue:
                expert = self.queue[0]
            elif start >= until:
                break
            else:
                if self.prefetch is None and self.when_idle is not None:
                    self.when_idle()
                if self.prefetch is None:
                    break
                expert, self.in_transfer, slowdown = self.prefetch, True, self.slowdown
            done = start + self.remaining[expert] * slowdown
            if done > until:
                if until > start:
                    self.remaining[expert] -= (until - start) / slowdown
                break
            if self.queue:
                self.queue.pop(0)
            else:
                self.prefetch = None
            self.landed.append(Landed(expert))
            self.now = done
        self.now = until

    def _preempt(self) -> None:
        if not self.queue or self.prefetch is None or not self.in_transfer or not self.chunks:
            return
        self.in_transfer = False
        rest = self.remaining[self.prefetch] % (self.duration[self.prefetch] / self.chunks)
        if self.remaining[self.prefetch] - rest <= 1e-12:
            self.queue.insert(0, self.prefetch)
            self.prefetch = None
        else:
            self.remaining[self.prefetch] -= rest
            self.busy = self.now + rest * self.slowdown


class DelayedPolicy(Policy):
    """Publishes another policy's scores `lag` later, by the link's clock, unless a later event supersedes them."""

    def __init__(self, policy: Policy, link: VirtualLink, machine: Machine, noise: Noise) -> None:
        super().__init__(policy.layers, policy.experts)
        self.inner, self._link, self._machine, self._noise = policy, link, machine, noise
        self._search_done = 0.0
        self.margin, self.switch = policy.margin, policy.switch
        self.prefetches, self.throttles_prefetch = policy.prefetches, policy.throttles_prefetch  # type: ignore[misc] # class attributes
        self._publish()

    def begin(self, steps: Sequence[Step]) -> None:
        self.inner.begin(steps)
        self._schedule(self._machine.lag if self._machine.begin_lag is None else self._machine.begin_lag)

    def routed(self, event: Routed) -> None:
        self.inner.routed(event)
        self._schedule(self._machine.lag)

    def end(self) -> None:
        self.inner.end()

    def _schedule(self, lag: float) -> None:
        self._search_done = max(self._link.now, self._search_done) + lag * self._noise.lag()
        self._link.alarm = self._search_done, self._publish

    def _publish(self) -> None:
        self.retention_priority[:], self.prefetch_priority[:] = (
            self.inner.retention_priority,
            self.inner.prefetch_priority,
        )


class LoggedCacheManager(CacheManager):
    """Logs the victim of every fetch."""

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
class EngineDriver:
    """Drives the engine over a schedule; `run` returns the iterations' times in the simulator's unit."""

    engine: Engine
    link: VirtualLink
    noise: Noise = field(default_factory=lambda: Noise(Machine(1, 1.0)))

    @classmethod
    def make(cls, schedule: Schedule, policy: Policy, capacity: int, link: VirtualLink) -> EngineDriver:
        cache_manager = LoggedCacheManager(schedule.layers, schedule.experts, capacity, policy)
        return cls.make_with(RamSlotPool(capacity, 64), cache_manager, link)

    @classmethod
    def make_with(cls, pool: RamSlotPool, cache_manager: LoggedCacheManager, link: VirtualLink) -> EngineDriver:
        return cls(Engine(pool, cache_manager, link, clock=lambda: link.now), link)

    def run(
        self,
        schedule: Schedule,
        view: TraceView,
        tokens_per_unit: int = 64,
        before_gate: float = 0.5,
        gap: float = 0.0,
    ) -> list[float]:
        times = []
        for iteration in range(len(schedule)):
            begin, scale = self.link.now, max(1.0, float(schedule.tokens[iteration]) / tokens_per_unit)
            befores, afters = self.noise.computes(schedule.layers)
            before, after = before_gate * scale * befores, (scale - before_gate * scale) * afters
            gates, lookahead = view.gates(schedule, iteration), view.lookahead(schedule, iteration)
            self.engine.begin(view.steps(schedule, iteration))
            self.link.advance(self.link.now + before[0])
            for layer in range(schedule.layers):
                event = iteration * schedule.layers + layer
                needs = schedule.needs[schedule.ptr[event] : schedule.ptr[event + 1]] - layer * schedule.experts
                routed = Routed(
                    layer,
                    needs.tolist(),
                    None if gates is None else gates[:, layer],
                    None if lookahead is None else lookahead[:, layer],
                    view.active,
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
        """Each expert computes for `share` before the engine is notified of its use."""
        for item in serving:
            yield item
            self.link.advance(self.link.now + share)

    def actions(self, experts: int) -> list[tuple[int, int, int]]:
        """The actions, in the form of the simulator's log."""
        cache_manager = self.engine.cache_manager
        assert isinstance(cache_manager, LoggedCacheManager)
        victims = iter(cache_manager.victims)
        found = []
        for kind, expert in self.link.log:
            victim = -2
            if kind != CANCELLED:
                fetch = next(victims)
                assert fetch.expert == expert
                victim = -1 if fetch.victim is None else fetch.victim.layer * experts + fetch.victim.expert
            found.append((kind, expert.layer * experts + expert.expert, victim))
        return found
