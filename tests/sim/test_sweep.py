"""A sweep: which policies run, what they learn from, rows, and processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from finemoe.errors import ConfigError, TraceError
from finemoe.policy import BOUNDS, FACTORIES, POLICIES, Policy
from finemoe.sim import sweep
from finemoe.sim.config import SimulateConfig
from finemoe.sim.hardware import TIMING, Machine
from finemoe.sim.report import markdown, table
from finemoe.sim.simulator import Outcome
from finemoe.sim.sweep import Cell, SweepRow, count_iterations, run_cell, run_cells, runnable, summarise
from finemoe.trace import open_trace, split
from finemoe.types import Recorded, Step
from tests.sim.by_hand import request, write_trace
from tests.sim.traces import EXPERTS, LAYERS, make_trace

REQUESTS = 10
ALL_POLICIES = FACTORIES | BOUNDS


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_trace(tmp_path_factory.mktemp("traces"), requests=REQUESTS).path)


@pytest.fixture(scope="module")
def ids_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    random = np.random.default_rng(0)
    made = [request(each) for each in random.random((12, 5, 3, EXPERTS)).argsort(-1)[..., :2]]
    return str(write_trace(tmp_path_factory.mktemp("traces") / "ids.trace", made).path)


def config(**settings: Any) -> SimulateConfig:
    return SimulateConfig(**{"workers": 1} | settings)


def rows(trace: str, settings: SimulateConfig, chosen: Sequence[Cell]) -> list[SweepRow]:
    found = {(row.policy, row.expert_memory): row for row in run_cells(trace, settings, chosen, lambda _: None)}
    return [found[cell.policy, cell.expert_memory] for cell in chosen]


def left_out(path: str, **settings: Any) -> dict[str, str]:
    chosen = config(policy="all", **settings)
    with open_trace(path) as trace:
        policies, reasons = runnable(chosen, trace.header)
    assert [name for name in chosen.policies if name not in reasons] == list(policies)
    return reasons


def test_a_full_trace_runs_every_policy_that_needs_no_training(trace: str) -> None:
    assert all("predictors" in FACTORIES[name].needs for name in left_out(trace))


def test_a_policy_without_its_inputs_is_left_out_with_a_reason(ids_only: str) -> None:
    reasons = left_out(ids_only)
    assert reasons["mixtral-offloading"] == "this trace has no lookahead (--gate-recall emulates it)"
    assert reasons["expert-map"] == "this trace has no gates"
    assert not {"lru", "lfu", "lfru", "deepspeed", "moe-infinity", *BOUNDS} & set(reasons)


def test_emulation_replaces_recorded_lookahead(ids_only: str) -> None:
    assert "mixtral-offloading" not in left_out(ids_only, gate_recall="0.8")


def test_rates_follow_from_counts() -> None:
    outcome = Outcome(
        iterations=2, layers=5, hits=6, late=1, misses=3, evictions=4, prefetched=4, prefetched_used=3, wasted=1,
        regretted=2, paused=1, moved=12.0, total=20.0, stall=10.0,
        iteration_times=np.array([5.0, 15.0]), log=np.zeros((0, 3), np.int64),
    )  # fmt: skip
    row = summarise(Cell("lru", 0.5, 2.0), Machine(20, 2.0, devices=2), outcome, None)
    assert (row.hit_rate, row.late_rate, row.miss_rate) == (0.6, 0.1, 0.3)
    assert (row.time_per_layer, row.stall_per_layer) == (2.0, 1.0)
    assert (row.time_per_layer_p50, row.time_per_layer_p99) == pytest.approx((2.0, 2.98))
    assert (row.transfers_per_layer, row.wasted_per_layer, row.precision) == (0.7, 0.1, 0.75)
    assert (row.regretted_per_layer, row.paused) == (0.2, 0.5)
    assert (row.capacity, row.iterations, row.link_busy) == (20, 2, 0.3)
    assert (row.before_gate, row.gap) == (0.5, 0.0)
    gaps = summarise(Cell("lru", 0.5, 2.0), Machine(20, 2.0, gap=2.5), replace(outcome, total=25.0), None)
    assert (gaps.time_per_layer, gaps.link_busy, gaps.gap) == (2.0, 12 / 25, 2.5)


@pytest.mark.parametrize("policy", [name for name, kind in ALL_POLICIES.items() if "predictors" not in kind.needs])
def test_a_row_has_finite_rates_and_is_ready_for_json(trace: str, policy: str) -> None:
    settings = config(gate_recall="0.8")
    row = run_cell(trace, settings, Cell(policy, 0.25, 1.0))
    assert json.loads(json.dumps(row.as_dict(), allow_nan=False)) == row.as_dict()
    assert row.hit_rate + row.late_rate + row.miss_rate == pytest.approx(1)
    assert row.capacity == LAYERS * EXPERTS // 4
    assert row.iterations == count_iterations(trace, settings)
    assert 0 < row.link_busy <= 1
    assert 1 <= row.time_per_layer_p50 <= row.time_per_layer_p95 <= row.time_per_layer_p99
    assert (row.precision is not None) == ALL_POLICIES[policy].prefetches
    assert row.precision is None or 0 <= row.precision <= 1
    looks_ahead = "lookahead" in ALL_POLICIES[policy].needs | ALL_POLICIES[policy].uses
    assert row.emulated == ("lookahead, recall 0.8" if looks_ahead else None)


@pytest.mark.parametrize("recall", [0.0, 1.0])
def test_emulated_lookahead_is_marked_at_any_recall(ids_only: str, recall: float) -> None:
    row = run_cell(ids_only, config(gate_recall=str(recall)), Cell("mixtral-offloading", 0.5, 1.0))
    assert row.emulated == f"lookahead, recall {recall}"
    for text in (table([row]), markdown([row])):
        assert "mixtral-offloading*" in text
    assert table([row]).splitlines()[-1] == f"* emulated, not recorded: lookahead, recall {recall}"


def test_better_lookahead_is_faster(ids_only: str) -> None:
    blind, half, seer = (
        run_cell(ids_only, config(gate_recall=str(recall)), Cell("mixtral-offloading", 0.25, 0.4)).time_per_layer
        for recall in (0.0, 0.5, 1.0)
    )
    assert seer < half < blind


class RecordingPolicy(Policy):
    """Records which requests it learned from and observed, by the token ids of `numbered`."""

    learned: ClassVar[list[int]] = []
    seen: ClassVar[list[int]] = []

    def learn(self, recorded: Recorded) -> None:
        self.learned.extend((recorded.token_ids // 100).tolist())

    def begin(self, steps: Sequence[Step]) -> None:
        self.seen.extend(int(step.token_ids[0]) // 100 for step in steps)


@pytest.fixture
def recording_policy(monkeypatch: pytest.MonkeyPatch) -> type[RecordingPolicy]:
    """Registers it as lru."""
    monkeypatch.setitem(FACTORIES, "lru", RecordingPolicy)
    RecordingPolicy.learned.clear()
    RecordingPolicy.seen.clear()
    return RecordingPolicy


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 requests of 5 tokens, whose ids identify the request; with weights, to learn from."""
    random = np.random.default_rng(0)
    ids = random.random((12, 5, 3, EXPERTS)).argsort(-1)[..., :2]
    weights = np.full((5, 3, 2), 0.5, np.float16)
    made = [request(each, first_token=100 * index, weights=weights) for index, each in enumerate(ids)]
    return str(write_trace(tmp_path_factory.mktemp("traces") / "numbered.trace", made).path)


@pytest.mark.parametrize(("share", "seed"), [(0.0, 0), (0.5, 0), (0.5, 1), (0.75, 0)])
def test_no_replayed_request_was_learned_from(
    numbered: str, recording_policy: type[RecordingPolicy], share: float, seed: int
) -> None:
    row = run_cell(numbered, config(store_split=share, seed=seed), Cell("lru", 0.5, 1.0))
    learned, seen = set(recording_policy.learned), set(recording_policy.seen)
    assert learned.isdisjoint(seen)
    assert learned | seen == set(range(12))
    assert len(learned) == 12 * share
    assert row.iterations == len(recording_policy.seen) == 5 * len(seen)
    stored, replayed = split(12, share, seed)
    assert list(dict.fromkeys(recording_policy.learned)) == stored.tolist()
    assert list(dict.fromkeys(recording_policy.seen)) == replayed.tolist()


def test_requests_limits_the_replay_to_the_first_ones(numbered: str, recording_policy: type[RecordingPolicy]) -> None:
    run_cell(numbered, config(store_split=0.5, requests=2), Cell("lru", 0.5, 1.0))
    assert list(dict.fromkeys(recording_policy.seen)) == split(12, 0.5, 0)[1][:2].tolist()
    assert len(set(recording_policy.learned)) == 6


def test_with_store_policies_learn_from_it_and_all_of_the_trace_is_replayed(
    numbered: str, recording_policy: type[RecordingPolicy], tmp_path: Path
) -> None:
    ids = np.arange(2 * 3 * 2).reshape(2, 3, 2) % EXPERTS
    weights = np.full((2, 3, 2), 0.5, np.float16)
    store = write_trace(tmp_path / "store.trace", [request(ids, first_token=5000, weights=weights)])
    run_cell(numbered, config(store=str(store.path)), Cell("lru", 0.5, 1.0))
    assert recording_policy.learned == [50, 50]
    assert set(recording_policy.seen) == set(range(12))


def test_a_store_of_another_shape_is_refused(trace: str, numbered: str) -> None:
    with pytest.raises(ConfigError, match=r"--store: .* has another number"):
        run_cell(trace, config(store=numbered), Cell("lru", 0.5, 1.0))


def test_a_missing_store_is_refused(trace: str) -> None:
    with pytest.raises(TraceError, match="no such trace"):
        run_cell(trace, config(store="/no/where"), Cell("lru", 0.5, 1.0))


def test_a_split_that_leaves_no_request_is_refused(trace: str) -> None:
    with pytest.raises(ConfigError, match="--store-split: none of the 10 requests"):
        rows(trace, config(store_split=0.99), [Cell("lru", 0.5, 1.0)])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_budget_below_a_slot_for_each_device_is_refused_before_anything_runs(trace: str, workers: int) -> None:
    reported: list[int] = []
    chosen = [Cell("lru", 0.5, 1.0), Cell("lru", 0.25, 1.0)]
    with pytest.raises(ConfigError, match=r"25% of 32 experts is less than one per device; 28.2% is"):
        list(run_cells(trace, config(workers=workers, devices=9), chosen, reported.append))
    assert not reported
    assert run_cell(trace, config(devices=9), Cell("lru", 0.282, 1.0)).capacity == 9


@pytest.mark.slow
def test_processes_give_the_same_rows_as_one(trace: str) -> None:
    chosen = [Cell(policy, share, 1.0) for policy in ("lru", "expert-map", "oracle") for share in (0.25, 0.5)]
    reported: list[int] = []
    alone = rows(trace, config(), chosen)
    together = {
        (row.policy, row.expert_memory): row for row in run_cells(trace, config(workers=2), chosen, reported.append)
    }
    assert [together[cell.policy, cell.expert_memory] for cell in chosen] == alone
    assert sum(reported) <= len(chosen) * count_iterations(trace, config())


def _refused(*_: Any) -> SweepRow:
    raise ConfigError("--policy: not today")


def _killed(*_: Any) -> SweepRow:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "message"), [(_refused, "^--policy: not today$"), (_killed, "^--workers: a process was killed")]
)
def test_a_failing_process_is_one_error_and_ends_the_others(
    trace: str, monkeypatch: pytest.MonkeyPatch, job: Any, message: str
) -> None:
    monkeypatch.setattr(sweep, "_run", job)
    chosen = [Cell("lru", 0.25, 1.0), Cell("lru", 0.5, 1.0)]
    with pytest.raises(ConfigError, match=message):
        list(run_cells(trace, config(workers=2), chosen, lambda _: None))
    assert not multiprocessing.active_children()


def test_a_table_has_a_line_for_each_row(trace: str) -> None:
    made = rows(trace, config(), [Cell("lru", 0.25, 1.0), Cell("oracle", 0.25, 1.0)])
    head, *lines = table(made).splitlines()
    assert head.split()[:2] == ["policy", "memory"]
    assert [line.split()[:3] for line in lines] == [["lru", "25%", "1"], ["oracle", "25%", "1"]]
    assert lines[0].split()[-1] == "-"
    assert len({len(line) for line in (head, *lines)}) == 1
    assert len(markdown(made).splitlines()) == 4
    assert table([replace(made[0], gap=7.5)]).splitlines()[-1] == "gap between iterations, not in time/layer: 7.5"


def test_rows_repeat_the_timing_settings(trace: str) -> None:
    times = {
        "before_gate": 0.25, "gap": 6, "lag": 0.5, "begin_lag": 2.5, "prefetch_slowdown": 1.5,
        "compute_spread": 0.1, "link_spread": 0.2, "lag_spread": 0.3,
    }  # fmt: skip
    row = run_cell(trace, config(**times), Cell("oracle", 0.25, 1.0))
    assert {name: getattr(row, name) for name in TIMING} == times
    reported = table([row])
    ends = "gate: 0.5", "iteration: 2.5", "link ratio: 1.5", "compute varies", "transfers vary", "the lag varies"
    assert [end for end in ends if end not in reported] == []
    assert "varies" not in table([run_cell(trace, config(), Cell("lru", 0.25, 1.0))])


def test_links_transfer_in_a_gap(trace: str) -> None:
    row = run_cell(trace, config(gap=6, before_gate=0.25), Cell("oracle", 0.25, 1.0))
    assert row.time_per_layer < run_cell(trace, config(), Cell("oracle", 0.25, 1.0)).time_per_layer


def test_all_means_every_policy_and_bound() -> None:
    assert config(policy="all").policies == (*POLICIES, *BOUNDS)


def test_lists_keep_their_order_and_lose_repeats() -> None:
    settings = config(policy="oracle, lru,oracle", expert_memory="50%,all, 25%", link_ratio="4,0,4.0")
    assert settings.policies == ("oracle", "lru")
    assert settings.shares == (0.5, 1.0, 0.25)
    assert settings.link_ratios == (4, 0)


def test_the_interval_is_over_requests(trace: str) -> None:
    row = run_cell(trace, config(), Cell("lru", 0.25, 1.0))
    assert row.time_per_layer_low is not None and row.time_per_layer_high is not None
    assert row.time_per_layer_low < row.time_per_layer < row.time_per_layer_high
    one = run_cell(trace, config(requests=1), Cell("lru", 0.25, 1.0))
    assert one.time_per_layer_low == one.time_per_layer_high == pytest.approx(one.time_per_layer)
    assert run_cell(trace, config(interleave=2), Cell("lru", 0.25, 1.0)).time_per_layer_low is None


def test_a_policy_with_settings_is_a_row_of_its_own(trace: str) -> None:
    names = ["finemoe", "finemoe/no-prefetch"]
    whole, alone = (run_cell(trace, config(policy=",".join(names)), Cell(name, 0.25, 1.0)) for name in names)
    assert whole.precision is not None and alone.precision is None
    assert alone.late_rate == 0
