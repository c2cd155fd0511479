"""Recorded routing of gpt-oss-20b, decoding, against an independent study. Skipped without the recorded traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from finemoe.sim.config import SimulateConfig
from finemoe.sim.sweep import Cell, count_iterations, run_cell
from finemoe.trace.importing import import_trace

SOURCE = Path(__file__).parents[3] / "shared" / "data" / "routing" / "gpt-oss-20b"
CONFIG = SimulateConfig(requests=80, workers=1)  # the first of those that the split leaves to replay
# of an independent study, over all of them: 70:30 by request
STUDY = {
    ("lru", 0.25): 60.8, ("lfu", 0.25): 66.0, ("lfru", 0.25): 66.0, ("belady", 0.25): 82.1,
    ("lru", 0.5): 90.3, ("lfu", 0.5): 91.4, ("lfru", 0.5): 91.9, ("belady", 0.5): 96.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not (SOURCE / "routing.npz").is_file():
        pytest.skip("needs the recorded traces, which the repository does not hold")
    path = tmp_path_factory.mktemp("real") / "gpt-oss-20b.trace"
    assert sum(import_trace(SOURCE, path)) == 124_437
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "share"), STUDY)
def test_hit_rate_is_that_of_an_independent_study(trace: str, policy: str, share: float) -> None:
    row = run_cell(trace, CONFIG, Cell(policy, share, 1.0))
    assert row.iterations == count_iterations(trace, CONFIG) > 20_000
    assert 100 * row.hit_rate == pytest.approx(STUDY[policy, share], abs=1.0)


# the study's model: a layer waits for all its experts, and prefetches are preempted at any time; 25%, r = 1
@pytest.mark.slow
@pytest.mark.parametrize(("policy", "time"), [("lru", 2.556), ("lfu", 2.334), ("belady", 1.702), ("oracle", 1.006)])
def test_time_per_layer_is_that_of_the_study(trace: str, policy: str, time: float) -> None:
    config = replace(CONFIG, chunks=0, no_ready_first=True)
    assert run_cell(trace, config, Cell(policy, 0.25, 1.0)).time_per_layer == pytest.approx(time, rel=0.01)
