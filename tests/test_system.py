"""The process and its machine: OpenMP threads, memory, output files. Programs run in a process of their own."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from finemoe import system
from finemoe.errors import ConfigError
from finemoe.system import available_bytes, peak_rss_bytes, refuse_unwritable, replace_file

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux's /proc and GNU's OpenMP")

UNMAP = """
import torch
from pathlib import Path
from finemoe.system import return_freed_memory, unmap_idle_code

def file_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

return_freed_memory()
x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
before, mapped = x @ x, file_kib()
unmapped = unmap_idle_code() >> 10
assert 0 < unmapped <= mapped, (unmapped, mapped)
assert file_kib() < mapped - unmapped // 2, (file_kib(), mapped, unmapped)
assert torch.equal(before, x @ x)
import json, decimal, email  # code that was not loaded yet
assert json.loads("[1]") == [1]
"""


END_THREADS = """
import os
import torch
from finemoe.system import end_openmp_threads

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
end_openmp_threads()
own = threads()
before = x @ x, (x * 2).sum()
assert threads() >= own
end_openmp_threads()
assert threads() == own, (threads(), own)
after = x @ x, (x * 2).sum()
assert all(map(torch.equal, before, after))
"""


@on_linux
def test_openmp_threads_end_and_are_started_again() -> None:
    done = subprocess.run([sys.executable, "-c", END_THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@on_linux
def test_unmapped_code_is_loaded_again_on_use() -> None:
    done = subprocess.run([sys.executable, "-c", UNMAP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SPIN_COUNT = """
import os, sys
from finemoe.system import limit_openmp_spin

assert "torch" not in sys.modules
limit_openmp_spin()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def run(program: str, **given: str) -> list[str]:
    """The words that a program prints, run without this environment's OpenMP variables."""
    own = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60, env=own | given
    ).stdout.split()


@pytest.mark.parametrize(
    ("given", "count"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_openmp_spin_is_limited_unless_the_user_has_set_it(given: dict[str, str], count: str) -> None:
    assert run(SPIN_COUNT, **given) == [count]


def test_the_command_line_limits_openmp_spin() -> None:
    program = "import os\nfrom finemoe.cli import main\nmain(['--version'])\nprint(os.environ['GOMP_SPINCOUNT'])"
    assert run(program)[-1] == "5000"


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    paths = tuple(str(tmp_path / name) for name in ("limit", "usage", "statistics"))
    monkeypatch.setattr(system, "_CGROUPS", (paths,))
    return tmp_path


def set_cgroup(cgroup: Path, limit: str, usage: int, cached: int) -> None:
    (cgroup / "limit").write_text(f"{limit}\n")
    (cgroup / "usage").write_text(f"{usage}\n")
    (cgroup / "statistics").write_text(f"anon {usage - cached}\ninactive_file {cached}\nactive_file 0\n")


def test_a_cgroup_limit_below_the_machines_memory_applies(cgroup: Path) -> None:
    set_cgroup(cgroup, "3000000", 1_000_000, 0)
    assert available_bytes() == 2_000_000


def test_a_cgroups_page_cache_counts_as_available(cgroup: Path) -> None:
    set_cgroup(cgroup, "3000000", 2_900_000, 1_900_000)
    assert available_bytes() == 2_000_000


def test_a_cgroup_over_its_limit_has_no_memory_available(cgroup: Path) -> None:
    set_cgroup(cgroup, "1000", 5000, 0)
    assert available_bytes() == 0


@pytest.mark.parametrize("limit", ["max", str(1 << 62)])
def test_without_a_limit_the_machines_memory_applies(cgroup: Path, limit: str) -> None:
    set_cgroup(cgroup, limit, 1000, 0)
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_without_a_cgroup_the_machines_memory_applies(cgroup: Path) -> None:
    assert not list(cgroup.iterdir())
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_peak_memory_is_the_processs_own_and_not_its_parents() -> None:
    ballast = bytearray(b"x") * (200 << 20)
    assert peak_rss_bytes() > 200 << 20
    code = f"import runpy; print(runpy.run_path({system.__file__!r})['peak_rss_bytes']())"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 1 << 20 < int(child.stdout) < 150 << 20
    del ballast


def test_a_file_is_replaced_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second, longer", b"3"):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"kept")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"lost")
    assert path.read_bytes() == b"kept"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="no such modes")
def test_a_replaced_file_has_the_mode_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    replace_file(tmp_path / "file", b"")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_unwritable_paths_are_refused_and_no_folder_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    refuse_unwritable("--out", tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    refuse_unwritable("--out", Path("new"))
    for path, reason in (
        (tmp_path / "no" / "file", "there is no folder .*no; make it"),
        (tmp_path / "file" / "below", "there is no folder .*file"),
        (tmp_path, "is a folder; give a file in it"),
    ):
        with pytest.raises(ConfigError, match=f"^--out: .*{reason}"):
            refuse_unwritable("--out", path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"^--out: .*new can't be written \(no permission in"):
        refuse_unwritable("--out", tmp_path / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
