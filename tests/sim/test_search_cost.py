"""The script that times a policy's thoughts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.sim.traces import make_trace

SCRIPT = Path(__file__).parents[2] / "scripts" / "search_cost.py"


def test_every_policy_has_its_times_over_a_store_as_large_as_asked_for(tmp_path: Path) -> None:
    trace = str(make_trace(tmp_path).path)
    policies = ["finemoe/capacity=7", "expert-map"]
    command = [sys.executable, str(SCRIPT), trace, trace, "--requests", "1", "--policy", ",".join(policies)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    _, *lines = (line.split() for line in done.stdout.splitlines())
    assert [line[0] for line in lines] == policies
    assert lines[0][1] == "7"
    assert all(float(line[at]) > 0 for line in lines for at in (3, 5, 7))
