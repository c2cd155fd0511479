"""A cap is a memory cgroup of its own, and reports whether it was reached."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from finemoe.bench.disk_probe import cached_share, evict
from tests.peers.conftest import SCRIPTS, Script


@pytest.mark.parametrize(
    ("peak", "refusals", "reached"), [(100, 0, True), (95, 0, True), (94, 0, False), (10, 3, True), (10, 0, False)]
)
def test_a_cap_is_reached_at_its_limit_or_nearly(script: Script, peak: int, refusals: int, reached: bool) -> None:
    assert script("cap").CapUsage(100, peak, refusals).reached is reached


def test_the_memory_group_is_found_among_all(script: Script, tmp_path: Path) -> None:
    cap, cgroups = script("cap"), tmp_path / "cgroup"
    (tmp_path / "a" / "b").mkdir(parents=True)
    cgroups.write_text("5:devices:/\n4:cpu,memory:/a/b\n0::/\n")
    assert cap.own_group(tmp_path, cgroups) == tmp_path / "a" / "b"
    cgroups.write_text("4:memory:/the/hosts\n")
    assert cap.own_group(tmp_path, cgroups) == tmp_path
    cgroups.write_text("0::/user.slice\n")
    with pytest.raises(cap.CapError, match="no memory cgroups of version 1"):
        cap.own_group(tmp_path, cgroups)


def test_a_group_that_can_not_be_made_is_an_error(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = script("cap")
    monkeypatch.setattr(cap, "own_group", lambda _: tmp_path / "file")
    (tmp_path / "file").touch()
    with pytest.raises(cap.CapError, match="no memory cgroup can be made in"):
        cap.Cap(1 << 20, "x")


@pytest.fixture
def capped(script: Script) -> Any:
    """A cap of 64 MiB, where this machine has memory cgroups."""
    cap = script("cap")
    try:
        with cap.Cap(64 << 20, "finemoe-test") as made:
            yield made
    except cap.CapError as error:
        pytest.skip(str(error))


def test_pages_of_a_file_count(capped: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(96 << 20))
    evict([file])
    if cached_share([file]) != 0:
        pytest.skip("this file system lives in memory")
    subprocess.run(capped.command(["cat", str(file)]), check=True, stdout=subprocess.DEVNULL)
    assert capped.usage().reached


def test_what_takes_more_than_the_cap_is_killed_and_what_takes_less_is_not(capped: Any) -> None:
    take = "import sys; data = bytearray(int(sys.argv[1]) << 20); print(len(data))"
    fits = subprocess.run(capped.command([sys.executable, "-c", take, "10"]), check=False, capture_output=True)
    assert (fits.returncode, fits.stdout.strip()) == (0, str(10 << 20).encode())
    assert 10 << 20 < capped.usage().peak_bytes <= 64 << 20
    bursts = subprocess.run(capped.command([sys.executable, "-c", take, "100"]), check=False, capture_output=True)
    assert bursts.returncode in {-9, 137}
    assert capped.usage().reached  # by its peak: not every kernel counts refusals
    folder = capped.folder
    capped.__exit__(None, None, None)
    assert not folder.exists()


def test_a_cap_can_come_into_force_later(script: Script, capped: Any) -> None:
    """For an engine that needs more memory to load than to run."""
    order = script("peer").Order("m", "w", [], 2, 1, memory_bytes=48 << 20, limit_file=str(capped.limit_file))
    take = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import peer; data = bytearray(90 << 20); del data\n"
        "peer.hold(peer.Order(**json.loads(sys.argv[2]))); data = bytearray(int(sys.argv[3]) << 20)"
    )
    for mebibytes, status in ((5, {0}), (90, {-9, 137})):
        with suppress(OSError):
            capped.limit_file.with_name("memory.memsw.limit_in_bytes").write_text(str(256 << 20))
        capped.limit_file.write_text(str(256 << 20))
        command = [sys.executable, "-c", take, str(SCRIPTS), json.dumps(asdict(order)), str(mebibytes)]
        assert subprocess.run(capped.command(command), check=False).returncode in status
        assert capped.usage().peak_bytes <= 48 << 20
