"""Replays a schedule under one policy, one budget and one link: a cell of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from finemoe.errors import InvariantError
from finemoe.jit import Jit, interpreted
from finemoe.policy import Policy
from finemoe.policy.cache_state import (
    EVICTED,
    PREFETCHED,
    PREFETCHED_USED,
    REGRETTED,
    THROTTLED,
    WASTED,
    Scores,
    make_cache_state,
    throttle_prefetch,
)
from finemoe.policy.eviction import OnDemand
from finemoe.sim.hardware import Machine, Noise
from finemoe.sim.layer_kernel import pass_time, replay_ranked, serve
from finemoe.sim.link_kernel import DUE, HITS, LATE, MISSES, NOW, STALL, USED, Ints, World, make_wire
from finemoe.sim.workload import Schedule, TraceView
from finemoe.types import Routed

Progress = Callable[[int], None]  # told of so many more iterations
_STRIDE = 256  # iterations between two reports


@dataclass(frozen=True)
class Outcome:
    """What a replay counted. Times in units of one layer's compute."""

    iterations: int
    layers: int
    hits: int
    late: int
    misses: int
    evictions: int
    prefetched: int
    prefetched_used: int
    wasted: int  # prefetched, and evicted or withdrawn without having been needed
    regretted: int  # misses of experts that had made room for a prefetch
    paused: int  # iterations without prefetches, as these did not pay
    moved: float  # link time used
    total: float  # gaps included
    stall: float
    iteration_times: Scores  # [S], without gaps
    log: Ints  # actions in order, where asked for


class Replay:
    """A cell under way.

    Args:
        schedule: what runs when.
        evidence: what a policy may see of it.
        policy: fresh, or with a filled store; it is changed.
        machine: the modelled machine.
        jit: compiles the kernels, or not.
        log: how many actions to keep.
        fast: replay on-demand policies without leaving compiled code; the same, sooner.
    """

    def __init__(
        self,
        schedule: Schedule,
        evidence: TraceView,
        policy: Policy,
        machine: Machine,
        jit: Jit[Any] = interpreted,
        log: int = 0,
        *,
        fast: bool = True,
    ) -> None:
        size = schedule.layers * schedule.experts
        if machine.capacity < machine.devices:
            raise InvariantError(f"{machine.capacity} slots for {machine.devices} devices")
        self.schedule, self.evidence, self.policy, self.machine = schedule, evidence, policy, machine
        self._noise = Noise(machine)
        rules = [
            policy.margin, policy.switch, machine.link_ratio, machine.chunks, float(machine.ready_first),
            machine.capacity, machine.prefetch_slowdown,
        ]  # fmt: skip
        begin_lag = machine.lag if machine.begin_lag is None else machine.begin_lag
        self._lags = (machine.lag, begin_lag) if policy.runs_async else (0.0, 0.0)
        self._lagging = max(self._lags) > 0
        self._free = 0.0  # when a policy that deliberates has thought all events through
        retention_priority, prefetch_priority = (
            policy.retention_priority.reshape(-1),
            policy.prefetch_priority.reshape(-1) if policy.prefetches else np.empty(0),
        )
        self.world = World(
            cache=make_cache_state(schedule.layers, schedule.experts, machine.capacity, machine.devices),
            wire=make_wire(size, machine.devices, self._noise.transfers, log),
            retention_priority=retention_priority.copy() if self._lagging else retention_priority,
            prefetch_priority=prefetch_priority.copy() if self._lagging else prefetch_priority,
            lagged_retention_priority=retention_priority,
            lagged_prefetch_priority=prefetch_priority,
            rules=np.array(rules),
            clock=np.array([0.0, 0.0, np.inf]),
            counts=np.zeros(4, np.int64),
            waiting=np.zeros(schedule.experts, np.bool_),
        )
        self.scales = np.maximum(1.0, schedule.tokens / machine.tokens_per_unit)
        self.iteration_times = np.zeros(len(schedule))
        self._jit = jit
        self._fast = fast

    def run(self, progress: Progress = lambda _: None) -> Outcome:
        """Replays everything."""
        policy = self.policy
        if self._fast and isinstance(policy, OnDemand) and not (policy.prefetches or self.machine.compute_spread):
            self._run_ranked(policy, progress)
        else:
            self._run(progress)
        cache, wire, clock, counts = self.world.cache, self.world.wire, self.world.clock, self.world.counts
        return Outcome(
            iterations=len(self.schedule), layers=self.schedule.layers, hits=int(counts[HITS]),
            late=int(counts[LATE]), misses=int(counts[MISSES]), evictions=int(cache.counters[EVICTED]),
            prefetched=int(cache.counters[PREFETCHED]), prefetched_used=int(cache.counters[PREFETCHED_USED]),
            wasted=int(cache.counters[WASTED]), regretted=int(cache.counters[REGRETTED]),
            paused=int(cache.counters[THROTTLED]), moved=float(wire.sums[USED]), total=float(clock[NOW]),
            stall=float(clock[STALL]), iteration_times=self.iteration_times, log=wire.log[: wire.logged[0]],
        )  # fmt: skip

    def _run(self, progress: Progress) -> None:
        schedule, policy, world = self.schedule, self.policy, self.world
        seen = policy.needs | policy.uses
        pass_time_, serve_, review_ = self._jit(pass_time), self._jit(serve), self._jit(throttle_prefetch)
        layers, active = schedule.layers, self.evidence.active
        bounds = schedule.ptr.tolist()
        offsets = [layer * schedule.experts for layer in range(layers)]
        for iteration in range(len(schedule)):
            begin, scale = float(world.clock[NOW]), float(self.scales[iteration])
            before = self.machine.before_gate * scale
            after = scale - before
            gates = self.evidence.gates(schedule, iteration) if "gates" in seen else None
            lookahead = self.evidence.lookahead(schedule, iteration) if "lookahead" in seen else None
            if policy.throttles_prefetch:
                review_(world.cache)
            policy.begin(self.evidence.steps(schedule, iteration))
            self._said(self._lags[1])
            computes = self._noise.computes(layers) * np.array([[before], [after]])
            pass_time_(world, computes[0, 0])
            for layer in range(layers):
                event = iteration * layers + layer
                needed = schedule.needs[bounds[event] : bounds[event + 1]]
                policy.routed(
                    Routed(
                        layer,
                        needed - offsets[layer],  # type: ignore[arg-type] # an array is a sequence of ints
                        None if gates is None else gates[:, layer],
                        None if lookahead is None else lookahead[:, layer],
                        active,
                    )
                )
                self._said(self._lags[0])
                serve_(world, needed, computes[1, layer], computes[0, layer + 1] if layer < layers - 1 else 0.0)
            self.iteration_times[iteration] = world.clock[NOW] - begin
            if self.machine.gap > 0:
                pass_time_(world, self.machine.gap)  # the head comes before a model's end
            policy.end()
            if (iteration + 1) % _STRIDE == 0:
                progress(_STRIDE)
        progress(len(schedule) % _STRIDE)

    def _said(self, lag: float) -> None:
        """The policy's scores are of an event that has just come. It thinks about one at a time."""
        if self._lagging:
            self._free = max(self.world.clock[NOW], self._free) + lag * self._noise.lag()
            self.world.clock[DUE] = self._free

    def _run_ranked(self, policy: OnDemand, progress: Progress) -> None:
        schedule, replay = self.schedule, self._jit(replay_ranked)
        for first in range(0, len(schedule), 8 * _STRIDE):
            last = min(len(schedule), first + 8 * _STRIDE)
            replay(
                self.world, policy.ranking, policy.kind, policy.decay, schedule.ptr, schedule.needs, policy.next_use,
                self.scales, self.iteration_times, self.machine.before_gate, self.machine.gap, np.array([first, last]),
            )  # fmt: skip
            progress(last - first)
