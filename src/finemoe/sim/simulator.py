"""Simulates a schedule under one policy and one modelled machine: a cell of a sweep."""

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
from finemoe.policy.lru_lfu import OnDemand
from finemoe.sim.hardware import Machine, Noise
from finemoe.sim.layer_kernel import advance_clock, replay_on_demand, run_layer
from finemoe.sim.link_kernel import DUE, HITS, LATE, MISSES, NOW, STALL, USED, Ints, SimState, make_link_state
from finemoe.sim.workload import Schedule, TraceView
from finemoe.types import Routed

Progress = Callable[[int], None]  # called with the number of iterations done since the last call
_STRIDE = 256  # iterations between two calls


@dataclass(frozen=True)
class Outcome:
    """Counts and times of a simulation, in units of one layer's compute for one token."""

    iterations: int
    layers: int
    hits: int
    late: int
    misses: int
    evictions: int
    prefetched: int
    prefetched_used: int
    wasted: int  # prefetched, and evicted or cancelled unused
    regretted: int  # misses of experts that were evicted for a prefetch
    paused: int  # iterations with prefetching throttled
    moved: float  # time in which links transferred, their sum
    total: float  # with gaps
    stall: float
    iteration_times: Scores  # [S], without gaps
    log: Ints  # [n, 3], see `LinkState.log`


class Simulation:
    """One simulation run.

    Args:
        schedule: the iterations to replay.
        view: what the policy may observe of their trace.
        policy: new, or trained; the run changes it.
        machine: the modelled machine.
        jit: compiles the kernels, or leaves them interpreted.
        log: number of actions to log.
        fast: run on-demand policies in compiled code only, with the same outcome.

    Raises:
        InvariantError: there are fewer slots than devices.
    """

    def __init__(
        self,
        schedule: Schedule,
        view: TraceView,
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
        self.schedule, self.view, self.policy, self.machine = schedule, view, policy, machine
        self._noise = Noise(machine)
        params = [
            policy.margin, policy.switch, machine.link_ratio, machine.chunks, float(machine.ready_first),
            machine.capacity, machine.prefetch_slowdown,
        ]  # fmt: skip
        begin_lag = machine.lag if machine.begin_lag is None else machine.begin_lag
        self._lags = (machine.lag, begin_lag) if policy.runs_async else (0.0, 0.0)
        self._delays_scores = max(self._lags) > 0
        self._search_done = 0.0  # when an asynchronous policy has processed all events so far
        retention_priority, prefetch_priority = (
            policy.retention_priority.reshape(-1),
            policy.prefetch_priority.reshape(-1) if policy.prefetches else np.empty(0),
        )
        self.state = SimState(
            cache=make_cache_state(schedule.layers, schedule.experts, machine.capacity, machine.devices),
            link=make_link_state(size, machine.devices, self._noise.transfers, log),
            retention_priority=retention_priority.copy() if self._delays_scores else retention_priority,
            prefetch_priority=prefetch_priority.copy() if self._delays_scores else prefetch_priority,
            pending_retention_priority=retention_priority,
            pending_prefetch_priority=prefetch_priority,
            params=np.array(params),
            clock=np.array([0.0, 0.0, np.inf]),
            counts=np.zeros(4, np.int64),
            waiting=np.zeros(schedule.experts, np.bool_),
        )
        self.scales = np.maximum(1.0, schedule.tokens / machine.tokens_per_unit)
        self.iteration_times = np.zeros(len(schedule))
        self._jit = jit
        self._fast = fast

    def run(self, progress: Progress = lambda _: None) -> Outcome:
        """Simulates all iterations.

        Raises:
            RuntimeError: the state has become inconsistent, see `layer_kernel.check_invariants`.
        """
        policy = self.policy
        if self._fast and isinstance(policy, OnDemand) and not (policy.prefetches or self.machine.compute_spread):
            self._run_on_demand(policy, progress)
        else:
            self._run(progress)
        cache, link, clock, counts = self.state.cache, self.state.link, self.state.clock, self.state.counts
        return Outcome(
            iterations=len(self.schedule), layers=self.schedule.layers, hits=int(counts[HITS]),
            late=int(counts[LATE]), misses=int(counts[MISSES]), evictions=int(cache.counters[EVICTED]),
            prefetched=int(cache.counters[PREFETCHED]), prefetched_used=int(cache.counters[PREFETCHED_USED]),
            wasted=int(cache.counters[WASTED]), regretted=int(cache.counters[REGRETTED]),
            paused=int(cache.counters[THROTTLED]), moved=float(link.totals[USED]), total=float(clock[NOW]),
            stall=float(clock[STALL]), iteration_times=self.iteration_times, log=link.log[: link.log_length[0]],
        )  # fmt: skip

    def _run(self, progress: Progress) -> None:
        schedule, policy, state = self.schedule, self.policy, self.state
        observed = policy.needs | policy.uses
        advance_clock_, run_layer_, throttle_ = (
            self._jit(advance_clock),
            self._jit(run_layer),
            self._jit(throttle_prefetch),
        )
        layers, active = schedule.layers, self.view.active
        bounds = schedule.ptr.tolist()
        offsets = [layer * schedule.experts for layer in range(layers)]
        for iteration in range(len(schedule)):
            begin, scale = float(state.clock[NOW]), float(self.scales[iteration])
            before = self.machine.before_gate * scale
            after = scale - before
            gates = self.view.gates(schedule, iteration) if "gates" in observed else None
            lookahead = self.view.lookahead(schedule, iteration) if "lookahead" in observed else None
            if policy.throttles_prefetch:
                throttle_(state.cache)
            policy.begin(self.view.steps(schedule, iteration))
            self._schedule_scores(self._lags[1])
            computes = self._noise.computes(layers) * np.array([[before], [after]])
            advance_clock_(state, computes[0, 0])
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
                self._schedule_scores(self._lags[0])
                run_layer_(state, needed, computes[1, layer], computes[0, layer + 1] if layer < layers - 1 else 0.0)
            self.iteration_times[iteration] = state.clock[NOW] - begin
            if self.machine.gap > 0:
                advance_clock_(state, self.machine.gap)  # a model's forward pass ends after its head
            policy.end()
            if (iteration + 1) % _STRIDE == 0:
                progress(_STRIDE)
        progress(len(schedule) % _STRIDE)

    def _schedule_scores(self, lag: float) -> None:
        """Schedules when the scores of the event just observed take effect; events are searched one at a time."""
        if self._delays_scores:
            self._search_done = max(self.state.clock[NOW], self._search_done) + lag * self._noise.lag()
            self.state.clock[DUE] = self._search_done

    def _run_on_demand(self, policy: OnDemand, progress: Progress) -> None:
        schedule, replay_ = self.schedule, self._jit(replay_on_demand)
        for first in range(0, len(schedule), 8 * _STRIDE):
            last = min(len(schedule), first + 8 * _STRIDE)
            replay_(
                self.state, policy.ranking, policy.kind, policy.decay, schedule.ptr, schedule.needs, policy.next_use,
                self.scales, self.iteration_times, self.machine.before_gate, self.machine.gap, np.array([first, last]),
            )  # fmt: skip
            progress(last - first)
