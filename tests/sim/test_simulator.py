"""A simulation: compiled, interpreted and fast paths agree, invariants hold, and the bounds are bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemoe.errors import InvariantError
from finemoe.jit import Jit, interpreted
from finemoe.policy import BOUNDS, FACTORIES, Policy, compute_future, make_policy
from finemoe.policy.cache_state import LOADING, RESIDENT
from finemoe.policy.lru_lfu import OnDemand
from finemoe.sim.hardware import Machine
from finemoe.sim.layer_kernel import check_invariants
from finemoe.sim.link_kernel import ACCESSES, HITS, MOVED
from finemoe.sim.simulator import Outcome, Simulation
from finemoe.sim.workload import Schedule, TraceView, make_schedule
from finemoe.trace import Trace
from tests.policy.compile import compiled
from tests.sim.traces import EXPERTS, LAYERS, make_trace

TOTAL = LAYERS * EXPERTS
ALL_POLICIES = [name for name, kind in (FACTORIES | BOUNDS).items() if "predictors" not in kind.needs]
ON_DEMAND = [name for name, kind in (FACTORIES | BOUNDS).items() if issubclass(kind, OnDemand)]
MACHINES = [
    Machine(8, 1.0),
    Machine(5, 0.3, chunks=0, ready_first=False),
    Machine(
        7,
        1.4,
        prefetch_slowdown=1.3,
        compute_spread=0.2,
        link_spread=0.4,
        lag=0.3,
        begin_lag=0.8,
        lag_spread=0.5,
        seed=3,
    ),
    Machine(9, 2.7, devices=2, chunks=3, tokens_per_unit=2, before_gate=0.3, gap=1.3),
]
CONSTANT_TIMES = [machine for machine in MACHINES if not machine.compute_spread]
each_policy = pytest.mark.parametrize("policy", ALL_POLICIES)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Decoding after prompts of 3 tokens; with all optional columns."""
    return make_trace(tmp_path_factory.mktemp("traces"), seed=1, requests=6, iterations=25)


@pytest.fixture(scope="module")
def decoding(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return make_trace(tmp_path_factory.mktemp("traces"), seed=2, requests=6, iterations=60, prompt=0)


def made(policy: str, schedule: Schedule, jit: Jit[Any] = interpreted) -> Policy:
    options = {}
    if policy in BOUNDS:
        options["future"] = compute_future(schedule.layers, schedule.experts, schedule.ptr, schedule.needs)
    return make_policy(policy, schedule.layers, schedule.experts, jit=jit, **options)


def replayed(
    trace: Trace, policy: str, machine: Machine, jit: Jit[Any] = interpreted, interleave: int = 1, **options: Any
) -> Outcome:
    """The last four requests, after learning from the first two."""
    schedule, view = make_schedule(trace, range(2, 6), interleave, jit), TraceView(trace, jit=jit)
    chosen = made(policy, schedule, jit)
    for recorded in view.recorded([0, 1]):
        chosen.learn(recorded)
    return Simulation(schedule, view, chosen, machine, jit, log=100_000, **options).run()


def assert_alike(one: Outcome, other: Outcome) -> None:
    np.testing.assert_array_equal(one.log, other.log)
    np.testing.assert_allclose(one.iteration_times, other.iteration_times, rtol=1e-9)
    counts = "hits late misses evictions prefetched prefetched_used wasted regretted paused"
    for name in counts.split():
        assert getattr(one, name) == getattr(other, name), name
    for name in ("moved", "total", "stall"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9), name


@each_policy
@pytest.mark.parametrize("machine", MACHINES, ids=["plain", "study", "varying", "two-devices"])
def test_compiled_and_interpreted_agree(trace: Trace, policy: str, machine: Machine) -> None:
    for interleave in (1, 3):
        plain = replayed(trace, policy, machine, interleave=interleave, fast=False)
        assert len(plain.log) > 100
        assert_alike(replayed(trace, policy, machine, compiled, interleave), plain)


@pytest.mark.parametrize("policy", ON_DEMAND)
@pytest.mark.parametrize("machine", MACHINES, ids=["plain", "study", "varying", "two-devices"])
def test_the_fast_path_agrees_with_the_general_one(trace: Trace, policy: str, machine: Machine) -> None:
    for interleave in (1, 3):
        fast, general = (replayed(trace, policy, machine, interleave=interleave, fast=f) for f in (True, False))
        assert_alike(fast, general)


@each_policy
def test_equal_inputs_give_equal_outcomes(trace: Trace, policy: str) -> None:
    assert_alike(*(replayed(trace, policy, MACHINES[0], compiled) for _ in range(2)))


@each_policy
@pytest.mark.parametrize("machine", CONSTANT_TIMES, ids=["plain", "study", "two-devices"])
def test_counts_add_up(trace: Trace, policy: str, machine: Machine) -> None:
    outcome = replayed(trace, policy, machine, compiled)
    accesses = len(make_schedule(trace, range(2, 6)).needs)
    assert outcome.hits + outcome.late + outcome.misses == accesses
    assert outcome.prefetched_used + outcome.wasted <= outcome.prefetched
    gaps = machine.gap * outcome.iterations
    assert outcome.total == pytest.approx(outcome.iteration_times.sum() + gaps)
    assert 0 <= outcome.stall < outcome.total
    assert outcome.moved <= machine.link_ratio * (outcome.misses + outcome.prefetched) + 1e-9
    if machine.ready_first:  # the time is compute and stall
        tokens = make_schedule(trace, range(2, 6)).tokens
        compute = LAYERS * np.maximum(1, tokens / machine.tokens_per_unit).sum()
        assert outcome.total == pytest.approx(compute + outcome.stall + gaps)
    if policy in ON_DEMAND:
        assert (outcome.late, outcome.prefetched, outcome.wasted) == (0, 0, 0)
        assert outcome.moved == pytest.approx(machine.link_ratio * outcome.misses)


@each_policy
def test_an_infinitely_fast_link_never_stalls(trace: Trace, policy: str) -> None:
    outcome = replayed(trace, policy, Machine(8, 0.0), compiled)
    assert (outcome.stall, outcome.moved) == (0, 0)


@each_policy
def test_with_all_slots_each_expert_is_loaded_at_most_once(trace: Trace, policy: str) -> None:
    outcome = replayed(trace, policy, Machine(TOTAL, 1.0), compiled)
    touched = len(set(make_schedule(trace, range(2, 6)).needs.tolist()))
    assert outcome.evictions == 0
    assert outcome.misses + outcome.late <= touched
    if policy in ON_DEMAND:
        assert outcome.misses == touched


@pytest.mark.parametrize("capacity", [4, 8, 16, 24])
def test_belady_misses_least_of_all_on_demand_policies(decoding: Trace, capacity: int) -> None:
    misses = {name: replayed(decoding, name, Machine(capacity, 1.0), compiled).misses for name in ON_DEMAND}
    assert misses["belady"] == min(misses.values())
    assert misses["belady"] < misses["lru"]


@pytest.mark.parametrize("link_ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("capacity", [8, 16])
def test_the_oracle_is_the_fastest_of_all(decoding: Trace, capacity: int, link_ratio: float) -> None:
    totals = {name: replayed(decoding, name, Machine(capacity, link_ratio), compiled).total for name in ALL_POLICIES}
    slack = 1.02  # it is greedy: a strong reference, not a proven bound
    assert all(totals["oracle"] <= slack * total for total in totals.values())
    assert totals["oracle"] < totals["lru"]


def finished(trace: Trace) -> Simulation:
    """A simulation that has run, in a consistent state."""
    schedule = make_schedule(trace, [0])
    simulation = Simulation(schedule, TraceView(trace), made("expert-map", schedule), Machine(8, 1.0))
    simulation.run()
    check_invariants(simulation.state)
    return simulation


@pytest.mark.parametrize("jit", [interpreted, compiled], ids=["interpreted", "compiled"])
def test_a_broken_invariant_is_detected(trace: Trace, jit: Jit[Any]) -> None:
    def assert_detected(simulation: Simulation, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            jit(check_invariants)(simulation.state)

    simulation = finished(trace)
    simulation.state.cache.pinned[3] = True
    assert_detected(simulation, "pinned")
    simulation = finished(trace)
    simulation.state.cache.free_slots[0] += 1
    assert_detected(simulation, "slots")
    simulation = finished(trace)
    absent = int(
        np.flatnonzero((simulation.state.cache.status != RESIDENT) & (simulation.state.cache.status != LOADING))[0]
    )
    simulation.state.cache.status[absent] = RESIDENT
    assert_detected(simulation, "slots")
    for count in (HITS, ACCESSES):
        simulation = finished(trace)
        simulation.state.counts[count] += 1
        assert_detected(simulation, "accesses")
    simulation = finished(trace)
    simulation.state.link.totals[MOVED] += 0.5
    assert_detected(simulation, "transfer time")


def test_fewer_slots_than_devices_are_refused(trace: Trace) -> None:
    schedule = make_schedule(trace, [0])
    with pytest.raises(InvariantError, match="1 slots for 2 devices"):
        Simulation(schedule, TraceView(trace), made("lru", schedule), Machine(1, 1.0, devices=2))


def test_progress_adds_up_to_all_iterations(tmp_path: Path) -> None:
    long = make_trace(tmp_path, requests=2, iterations=300)
    schedule = make_schedule(long, [0, 1])
    for policy in ("lru", "deepspeed"):
        reported: list[int] = []
        Simulation(schedule, TraceView(long), made(policy, schedule), Machine(8, 1.0)).run(reported.append)
        assert sum(reported) == len(schedule) == 600
