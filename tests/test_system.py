"""Letting go of memory must change nothing but the memory: checked in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
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


THREADS = """
import os
import torch
from finemoe.system import release_threads

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
release_threads()
alone = threads()
before = x @ x, (x * 2).sum()
assert threads() >= alone
release_threads()
assert threads() == alone, (threads(), alone)
after = x @ x, (x * 2).sum()
assert all(map(torch.equal, before, after))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks GNU's OpenMP, as torch has it on Linux")
def test_threads_of_parallel_regions_end_and_come_back() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's tables of mappings")
def test_idle_code_is_unmapped_and_comes_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SPINNING = """
import os, sys
from finemoe.system import share_cores

assert "torch" not in sys.modules
share_cores()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def run(program: str, **given: str) -> list[str]:
    """The words that a program prints, without what this environment says of OpenMP."""
    own = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60, env=own | given
    ).stdout.split()


@pytest.mark.parametrize(
    ("given", "count"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_openmp_spins_briefly_unless_the_user_has_said_how(given: dict[str, str], count: str) -> None:
    assert run(SPINNING, **given) == [count]


def test_a_command_has_openmp_spin_briefly() -> None:
    program = "import os\nfrom finemoe.cli import main\nmain(['--version'])\nprint(os.environ['GOMP_SPINCOUNT'])"
    assert run(program)[-1] == "5000"
