"""`scripts/gpu_bench.py` end to end, at tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "gpu_bench.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_a_dry_run_measures_every_row_under_the_same_routing(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    out = tmp_path / "bench.json"
    flags = ["--dry-run", "--memory", "50%", "--policies", "lru,finemoe", "--experts-gib", "0.001"]
    done = run(str(out), *flags, "--folder", str(tmp_path / "models"))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["left_out"] == []
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "transformers grouped_mm", "finemoe all grouped_mm", "transformers eager", "finemoe all eager",
        "finemoe 50% lru", "finemoe 50% finemoe", "finemoe 50% lru host-compute", "transformers CPU offload",
    ]  # fmt: skip
    assert rows["finemoe all grouped_mm"]["hit_rate"] == 1
    assert rows["finemoe all eager"]["tokens"] == rows["transformers eager"]["tokens"]
    assert rows["finemoe 50% lru"]["tokens"] == rows["transformers grouped_mm"]["tokens"]
    assert 0 < rows["finemoe 50% lru"]["hit_rate"] < 1
    assert not (tmp_path / "models" / "tiny").exists()


def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    done = run(str(tmp_path / "bench.json"))
    assert done.returncode == 2
    assert "torch finds no CUDA device here; --dry-run tries the script without one" in done.stderr
