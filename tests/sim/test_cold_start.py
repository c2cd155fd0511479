"""The script that shows how soon a policy pays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.sim.traces import make_trace

SCRIPT = Path(__file__).parents[2] / "scripts" / "cold_start.py"


def test_each_block_of_requests_has_a_hit_rate_and_a_time(tmp_path: Path) -> None:
    trace = make_trace(tmp_path).path
    command = [sys.executable, str(SCRIPT), str(trace), "--policy", "lru,finemoe", "--requests", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["policy", "1-1", "2-2", "3-3"]
    assert [line.split()[0] for line in lines] == ["lru", "finemoe"]
    assert all(float(time) >= 1 for line in lines for time in line.split()[2::2])
