"""Letting go of memory must change nothing but the memory: checked in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from pathlib import Path
from finemoe.process import return_freed_memory, unmap_idle_code

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
from finemoe.process import release_threads

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
