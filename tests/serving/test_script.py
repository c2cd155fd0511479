"""The measurement of batching runs, and says what it should. What it measures here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.tiny import Make

SCRIPT = Path(__file__).parents[2] / "scripts" / "batching.py"


def test_the_script_measures_each_concurrency_against_generate(tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--concurrent", "1", "3", "--jobs", "4", "--prompt-tokens", "5", "--new-tokens", "3"]
    subject = ["--model", str(tiny()), "--expert-memory", "60%", "--policy", "lru", "--json", str(out)]
    command = [sys.executable, str(SCRIPT), *subject]
    subprocess.run([*command, *options], check=True, timeout=120)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["how"], row["concurrent"], row["batched"]) for row in rows] == [
        ("generate", 1, False),
        ("worker", 1, True),
        ("worker", 3, True),
    ]
    assert all(row["tok_s"] > 0 and row["bytes_read"] > 0 for row in rows)
