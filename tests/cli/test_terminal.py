"""Standard output that can't take what is written: characters that it has not, a full disk, a reader that went away."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finemoe.cli import main
from finemoe.cli.terminal import Output

FULL = Path("/dev/full")


@pytest.mark.usefixtures("own_process")
def test_a_character_that_the_output_has_not_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr("finemoe.__version__", "1.0\N{LATIN SMALL LETTER E WITH ACUTE}")
    assert main(["--version"]) == 0
    assert written.getvalue() == b"finemoe 1.0?\n"


@pytest.mark.skipif(not FULL.exists(), reason="has no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_a_full_disk_is_one_line_with_status_2(unbuffered: str, flag: str) -> None:
    if flag == "--help" and unbuffered:
        pytest.skip("argparse takes no notice")
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "finemoe", flag],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.stderr == "finemoe: error: standard output: No space left on device\n"
    assert done.returncode == 2


def test_a_reader_that_went_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "finemoe", "--version"], stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_output_that_works_is_as_before() -> None:
    held = io.StringIO()
    output = Output(held)
    assert output.write("fine") == 4
    output.flush()
    assert output.getvalue() == "fine"
