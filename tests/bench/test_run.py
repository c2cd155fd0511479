"""A complete benchmark on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finemoe.bench import BenchConfig
from finemoe.bench.measurements import Variant, WorkerTask
from finemoe.bench.run import run_bench, run_worker
from finemoe.bench.table import render
from finemoe.cli import main
from finemoe.errors import BudgetError, CheckpointError, ConfigError
from finemoe.model.describe import describe
from tests.tiny import Make
from tests.trace.make import make_header, make_trace


def settings(folder: Path, **values: object) -> BenchConfig:
    small = {"prompt_tokens": 16, "context_tokens": 4, "new_tokens": 4, "offload_tokens": 2, "link_probe_mib": 1}
    return BenchConfig(model=str(folder), threads=1, **small | values)  # type: ignore[arg-type]


def invalid_map_file(folder: Path) -> str:
    """A file that rows of learning policies fail on, and other rows do not read."""
    (folder / "maps").write_text("no maps")
    return str(folder / "maps")


@pytest.mark.slow
def test_rows_agree_and_a_failing_one_does_not_stop_the_others(tiny: Make, tmp_path: Path) -> None:
    log: list[str] = []
    config = settings(
        tiny(dtype="bfloat16"),
        expert_memory="50%",
        policy="finemoe,lru",
        map_store=invalid_map_file(tmp_path),
        baselines="eager,disk-offload",
    )
    report = run_bench(config, log.append)
    refused, *rows = report.rows
    assert "--map-store" in (refused.error or "")
    assert report.failed
    assert [row.error for row in rows] == [None] * 3
    assert all(row.tokens_equal and row.logits_equal for row in rows), render(report)
    assert report.fastest_resident == "transformers eager"
    half = rows[0]
    assert half.figure("pool_bytes")
    assert half.figure("hit_rate") is not None
    assert (half.figure("peak_rss_bytes") or 0) > (half.figure("pool_bytes") or 0)
    assert len(report.link_bytes_s) == 8  # before and after each row
    assert any("TPOT" in line for line in log)
    assert json.loads(json.dumps(report.as_dict()))["rows"][1]["tpot_s"] > 0
    assert "transformers disk offload" in render(report)


@pytest.mark.usefixtures("in_process")
def test_disk_offload_needs_a_finemoe_row(tiny: Make, tmp_path: Path) -> None:
    report = run_bench(settings(tiny(), map_store=invalid_map_file(tmp_path), baselines="disk-offload"), lambda _: None)
    assert "no finemoe row" in (report.rows[-1].error or "")


@pytest.mark.parametrize("expert_dtype", ["stored", "int8"])
def test_an_impossible_budget_is_refused_before_any_row_runs(tiny: Make, expert_dtype: str) -> None:
    config = settings(tiny(dtype="bfloat16"), expert_memory="50%,1B", expert_dtype=expert_dtype, baselines="none")
    log: list[str] = []
    with pytest.raises(BudgetError, match=r"^--expert-memory: 1B .* at least"):
        run_bench(config, log.append)
    assert not log


@pytest.mark.usefixtures("in_process", "own_process")
def test_a_failed_row_is_reported_and_sets_the_exit_status(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--new-tokens", "2", "--link-probe-mib", "1", "--baselines", "none", "--expert-memory", "50%"]
    given = ["bench", "--model", str(tiny()), *small, "--json"]
    assert main([*given, "--policy", "lru,finemoe", "--map-store", invalid_map_file(tmp_path)]) == 1
    errors = [row["error"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert errors[0] is None
    assert "--map-store: " in errors[1]
    assert main([*given, "--policy", "lru"]) == 0


def test_a_row_is_stopped_at_the_timeout(tmp_path: Path) -> None:
    task = WorkerTask(Variant("finemoe", "all", "lfru"), {"model": str(tmp_path)}, (1,), (1,), 2, 1)
    assert run_worker(task, tmp_path, timeout_s=0.01) == "took longer than 0 s"


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run_bench(settings(tmp_path / "nowhere"), lambda _: None)


def test_an_unknown_policy_is_refused(tiny: Make) -> None:
    with pytest.raises(ConfigError, match="--policy"):
        run_bench(settings(tiny(), policy="lucky"), lambda _: None)


@pytest.mark.usefixtures("in_process")
def test_all_rows_replay_the_same_routing(tiny: Make, tmp_path: Path) -> None:
    folder, trace = tiny(dtype="bfloat16"), tmp_path / "trace"
    sizes = describe(str(folder))
    header = make_header(
        ("weights",), layers=sizes.layers, experts=sizes.expert_index.layouts[0].experts, active=sizes.active
    )
    make_trace(trace, 2, header)
    config = settings(folder, expert_memory="75%", baselines="eager,grouped_mm,disk-offload", replay_routing=str(trace))
    report = run_bench(config, lambda _: None)
    assert [row.error for row in report.rows] == [None] * 4
    assert [row.tokens_equal for row in report.rows] == [True] * 4
    assert f"routing  of all rows replayed from {trace}" in render(report)
    assert report.as_dict()["replayed_routing"] == str(trace)
    plain = run_bench(settings(folder, expert_memory="75%", baselines="none"), lambda _: None)
    assert "replayed" not in render(plain)
    ours = [report.rows[0].runs[0].measured, plain.rows[0].runs[0].measured]
    assert ours[0] is not None and ours[1] is not None
    assert ours[0].logits != ours[1].logits


def test_routing_of_another_shape_is_refused_before_any_row_runs(tiny: Make, tmp_path: Path) -> None:
    make_trace(tmp_path / "trace", 1, make_header(("weights",), layers=1, experts=3))
    with pytest.raises(ConfigError, match=r"--replay-routing: .* routes to 2 of 3"):
        run_bench(settings(tiny(), replay_routing=str(tmp_path / "trace")), lambda _: None)
