"""The script that times tokens beside neighbours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.chat_model import make_chat_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "shared_cores.py"


def test_every_number_of_spins_has_a_row_and_every_number_of_neighbours_a_column(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "tiny")
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path / "tiny"), "--expert-memory", "50%"]
    command += ["--spins", "5000,1000", "--neighbours", "0,1", "--repeats", "1", "--new-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines())
    assert header == ["spins", "0 neighbours, ms a token", "1 neighbours, ms a token"]
    assert [row[0] for row in rows] == ["5000", "1000"]
    assert all(float(cell.split()[0]) >= 0 for row in rows for cell in row[1:])
