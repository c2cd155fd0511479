"""Prefaulting: memory is faulted in on background threads, and its content does not change."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

import finemoe
from finemoe.store import RamSlotPool, slot_pool
from finemoe.store.slot_pool import Prefault
from tests.tiny import Make

MIB = 1 << 20


def mapped(size_bytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)


def populates() -> bool:
    """Whether the kernel supports it."""
    if sys.platform == "linux":
        with suppress(OSError):
            mmap.mmap(-1, mmap.PAGESIZE).madvise(slot_pool._MADV_POPULATE_WRITE)
            return True
    return False


@pytest.mark.skipif(not populates(), reason="the kernel has no MADV_POPULATE_WRITE")
def test_a_pools_memory_is_resident_before_its_first_use() -> None:
    before = psutil.Process().memory_info().rss
    under_test = RamSlotPool(64, MIB)
    under_test.wait_prefaulted()
    assert psutil.Process().memory_info().rss - before > 60 * MIB
    under_test.close()
    assert psutil.Process().memory_info().rss - before < 30 * MIB


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="Windows")
def test_memory_written_meanwhile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_pool, "_CHUNK_BYTES", MIB)
    memory = mapped(33 * MIB + mmap.PAGESIZE)
    expected = np.arange(len(memory), dtype=np.uint8)
    under_test = Prefault(memory)
    memory[:] = expected
    under_test.wait()
    assert np.array_equal(memory, expected)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="Windows")
def test_every_chunk_is_faulted_in_once_until_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    begun, go_on = threading.Event(), threading.Event()

    def advise(address: object, length: object, _advice: int) -> int:
        asked.append((address.value, length.value))  # type: ignore[attr-defined]
        begun.set()
        go_on.wait(10)
        return 0

    monkeypatch.setattr(slot_pool, "_CHUNK_BYTES", MIB)
    monkeypatch.setattr(slot_pool, "_madvise", lambda: advise)
    memory = mapped(8 * MIB + 5)
    start = memory.ctypes.data
    go_on.set()
    Prefault(memory).wait()
    assert sorted(asked) == [(start + at * MIB, MIB if at < 8 else 5) for at in range(9)]
    asked.clear()
    begun.clear()
    go_on.clear()
    stopped = Prefault(memory)
    assert begun.wait(10)
    threading.Timer(0.1, go_on.set).start()
    stopped.stop()
    assert len(asked) <= 4  # what each thread had begun with


@pytest.mark.parametrize("found", [None, lambda *_: -1], ids=["no such call", "an older kernel"])
def test_pools_work_without_kernel_support(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    monkeypatch.setattr(slot_pool, "_madvise", lambda: found)
    under_test = RamSlotPool(4, MIB)
    under_test.wait_prefaulted()
    under_test.bytes_of(3)[:] = 7
    under_test.close()


def test_loading_a_model_waits_for_its_memory(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[float] = []

    def slow(*_: object) -> int:
        time.sleep(1.0)
        done.append(time.monotonic())
        return 0

    monkeypatch.setattr(slot_pool, "_madvise", lambda: slow)
    with finemoe.load(tiny(), policy="lru", map_store="none"):
        assert done
