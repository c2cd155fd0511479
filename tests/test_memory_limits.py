"""How much memory there is: the machine's, or the control group's where that is less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from finemoe import system as memory
from finemoe.system import available_bytes, peak_rss_bytes


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    paths = tuple(str(tmp_path / name) for name in ("limit", "usage", "statistics"))
    monkeypatch.setattr(memory, "_CGROUPS", (paths,))
    return tmp_path


def set_group(group: Path, limit: str, usage: int, cached: int) -> None:
    (group / "limit").write_text(f"{limit}\n")
    (group / "usage").write_text(f"{usage}\n")
    (group / "statistics").write_text(f"anon {usage - cached}\ninactive_file {cached}\nactive_file 0\n")


def test_a_control_groups_limit_counts_where_it_is_less(group: Path) -> None:
    set_group(group, "3000000", 1_000_000, 0)
    assert available_bytes() == 2_000_000


def test_page_cache_can_be_taken_back(group: Path) -> None:
    set_group(group, "3000000", 2_900_000, 1_900_000)
    assert available_bytes() == 2_000_000


def test_a_group_over_its_limit_has_nothing(group: Path) -> None:
    set_group(group, "1000", 5000, 0)
    assert available_bytes() == 0


@pytest.mark.parametrize("limit", ["max", str(1 << 62)])
def test_no_limit_leaves_the_machines_memory(group: Path, limit: str) -> None:
    set_group(group, limit, 1000, 0)
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_no_group_leaves_the_machines_memory(group: Path) -> None:
    assert not list(group.iterdir())
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_the_peak_is_this_processs_own_and_not_its_parents() -> None:
    ballast = bytearray(b"x") * (200 << 20)
    assert peak_rss_bytes() > 200 << 20
    code = f"import runpy; print(runpy.run_path({memory.__file__!r})['peak_rss_bytes']())"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 1 << 20 < int(child.stdout) < 150 << 20
    del ballast
