"""scripts/agreement.py, which compares the simulator with the engine. On a tiny model, only counts are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chat_model import make_chat_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "agreement.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.slow
def test_engine_and_simulator_count_the_same_on_demand(tmp_path: Path) -> None:
    model, prompts, out = make_chat_model(tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("What is photosynthesis?\nName three colours.\nWho are you?\n", encoding="utf-8")
    chosen = ["--budgets", "50%", "--policies", "lru", "--new-tokens", "6", "--prompts-limit", "2", "--threads", "1"]
    done = run(str(out), "--prompts", str(prompts), "--model", str(model), *chosen)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    (row,) = document["rows"]
    engine, simulator = row["engine"], row["simulator"]
    assert row["as_recorded"]
    assert engine["accesses"] == simulator["accesses"] > 0
    assert engine["hit_rate"] == pytest.approx(simulator["hit_rate"], abs=1e-12)
    machine = simulator["machine"]
    assert (machine["link_ratio"], machine["gap"]) == (engine["link_ratio"], engine["gap"])
    assert engine["gap"] > 0 and 0 < machine["before_gate"] < 1
    assert row["simulated_token_s"] > 0
    assert [bound["policy"] for bound in document["bounds"]] == ["belady", "oracle"]
    assert document["summary"] == ["50%: the same order", "within two points: 1 of 1; most: +0.0 at 50% lru"]
    assert "| 50% lru | " in done.stdout


def test_bad_input_is_refused_before_anything_runs(tmp_path: Path) -> None:
    lacking = run(str(tmp_path / "o.json"), "--prompts", "p", "--policies", "promoe")
    assert lacking.returncode == 2
    assert "--policies: promoe needs --predictors" in lacking.stderr
