"""docs/simulator.md: its example runs, its commands run, and it explains every column and policy."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finemoe.cli import main
from finemoe.policy import BOUNDS, FACTORIES
from finemoe.sim.sweep import SweepRow
from tests.sim.traces import make_trace

PAGE = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of the page: `my.trace` and `machine.json`."""
    make_trace(tmp_path).path.rename(tmp_path / "my.trace")
    (tmp_path / "machine.json").write_text('{"link_ratio": 1.3, "gap": 0.5, "begin_lag": null}')
    return tmp_path


def test_the_example_of_a_policy_runs_and_prefetches(folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (lru, *before), (again, *after) = (line.split() for line in done.stdout.splitlines())
    assert (lru, again) == ("LRU", "Again")
    assert sum(map(int, before[:3])) == sum(map(int, after[:3]))
    assert int(after[1]) > 0 or int(after[2]) < int(before[2])


@pytest.mark.slow
@pytest.mark.parametrize("command", re.findall(r"^finemoe simulate .*", PAGE, flags=re.MULTILINE))
def test_a_command_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    assert main([*shlex.split(command)[1:], "--workers", "1"]) == 0


def test_every_column_and_every_policy_is_explained() -> None:
    for field in dataclasses.fields(SweepRow):
        if field.name != "policy":
            assert f"`{field.name.replace('time_per_layer_p9', '_p9')}`" in PAGE
    for name in FACTORIES | BOUNDS:
        assert f"`{name}`" in PAGE
