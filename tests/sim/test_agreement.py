"""The simulator against the engine on a virtual link: the same plans, counts and times."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finemoe.engine.layer_timing import LayerTiming
from finemoe.policy import FACTORIES, Policy, make_policy
from finemoe.sim.hardware import Machine, Noise
from finemoe.sim.simulator import Simulation
from finemoe.sim.workload import TraceView, make_schedule
from finemoe.trace import open_trace
from tests.policy.workload import Shape, untrained
from tests.sim.traces import EXPERTS, LAYERS, make_trace
from tests.sim.virtual_link import DelayedPolicy, EngineDriver, VirtualLink


def made(policy: str) -> Policy:
    """A new policy; predictors have fixed random weights."""
    if "predictors" in FACTORIES[policy].needs:
        return make_policy(policy, LAYERS, EXPERTS, predictors=untrained(Shape(LAYERS, EXPERTS)))
    return make_policy(policy, LAYERS, EXPERTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.mark.parametrize("policy", FACTORIES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.integers(0, 5), st.integers(3, LAYERS * EXPERTS), st.sampled_from([0.07, 0.3, 1.0, 4.1]),
    st.sampled_from([0, 1, 5]), st.integers(1, 3), st.sampled_from([0, 3, 70]),
    st.sampled_from([(0.5, 0.0), (0.5, 2.6), (0.8, 0.4)]), st.sampled_from([0.0, 0.15, 0.9, 1.7]),
    st.sampled_from([1.0, 1.6, 0.8]), st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_engine_and_simulator_agree(
    folder: Path, policy: str, seed: int, capacity: int, link_ratio: float, chunks: int, interleave: int, prompt: int,
    split: tuple[float, float], lag: float, slowdown: float,
    spread: float,
) -> None:  # fmt: skip
    path = folder / f"walk-{seed}-4-12-{prompt}.safetensors"
    with make_trace(folder, seed, prompt=prompt) if not path.exists() else open_trace(path) as trace:
        schedule, view = make_schedule(trace, range(4), interleave), TraceView(trace)
        machine = Machine(
            capacity, link_ratio, chunks=chunks, before_gate=split[0], gap=split[1], lag=lag,
            begin_lag=[None, 2 * lag][seed % 2],
            prefetch_slowdown=slowdown, compute_spread=spread, link_spread=1.5 * spread, lag_spread=2 * spread,
            seed=seed,
        )  # fmt: skip
        noise = Noise(machine)
        simulated = Simulation(schedule, view, made(policy), machine, log=100_000, fast=False)
        outcome = simulated.run()
        link = VirtualLink(link_ratio, chunks, slowdown, noise.transfers.tolist())
        policy_ = made(policy)
        if lag and policy_.runs_async:
            policy_ = DelayedPolicy(policy_, link, machine, noise)
        driver = EngineDriver.make(schedule, policy_, capacity, link)
        driver.noise = noise
        times = driver.run(schedule, view, before_gate=split[0], gap=split[1])
    counters = driver.engine.counters
    assert driver.actions(EXPERTS) == [tuple(row) for row in outcome.log.tolist()]
    assert (counters.hits, counters.late, counters.misses) == (outcome.hits, outcome.late, outcome.misses)
    assert times == pytest.approx(outcome.iteration_times.tolist(), rel=1e-9)
    assert counters.stall_s == pytest.approx(outcome.stall, rel=1e-9)


@pytest.mark.parametrize(("before_gate", "gap"), [(0.5, 0.0), (0.25, 3.0)])
def test_layer_timing_measures_the_simulators_settings(tmp_path: Path, before_gate: float, gap: float) -> None:
    with make_trace(tmp_path, seed=9, prompt=0) as trace:
        schedule, view = make_schedule(trace, range(2)), TraceView(trace)
        driver = EngineDriver.make(schedule, made("deepspeed"), 9, VirtualLink(1.3, 13))
        layer_timing, passes = LayerTiming(LAYERS), len(schedule)
        driver.engine.layer_timing = layer_timing
        driver.run(schedule, view, before_gate=before_gate, gap=gap)
    assert driver.engine.counters.stall_s > 0  # excluded from all of these
    timed = (layer_timing.befores, layer_timing.afters, layer_timing.arounds)
    assert [each.count for each in timed] == [passes * (LAYERS - 1), passes * LAYERS, passes - 1]
    assert [each.mean_s for each in timed] == pytest.approx([before_gate, 1 - before_gate, gap + before_gate])
