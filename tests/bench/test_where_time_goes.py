"""The profile of a decoded token: its parts add up to the whole, and none is counted twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.chat_model import make_chat_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "where_time_goes.py"
PARTS = {"arithmetic", "waiting", "listening", "routing", "rows", "handing out", "parameters"}


def test_the_parts_of_a_token_add_up(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("one two three\nfour five\n")
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path / "tiny"), "--expert-memory", "50%"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--new-tokens", "6", "--repeats", "2"]
    command += ["--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    rounds = json.loads((tmp_path / "out.json").read_text())["rounds"]
    assert len(rounds) == 2
    for each in rounds:
        assert set(each["parts_s"]) <= PARTS
        assert PARTS - {"waiting"} <= set(each["parts_s"])
        assert all(spent_s > 0 for spent_s in each["parts_s"].values())
        assert sum(each["parts_s"].values()) < each["total_s"]
    lines = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines() if line.endswith("%")]
    shares = {name: share for name, _, share in lines}
    assert shares["a token"] == "100.0%"
    assert 99 < sum(float(share[:-1]) for name, share in shares.items() if name != "a token") < 101
