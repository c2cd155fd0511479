"""Measured rates, and forecasts from them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from finemoe.sim.speed_forecast import Forecast, Rates, Sizes, forecast, measure

fcntl = pytest.importorskip("fcntl")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is no direct I/O to be refused")
def test_a_disk_without_direct_reads_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    refused: list[int] = []

    def refuse_direct(descriptor: int, buffers: Sequence[bytearray], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse_direct)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rates = measure(sample_bytes=4 << 20)
    if not refused:
        pytest.skip("this folder's file system does not support direct reads at all")
    assert min(rates.disk_bytes_s, rates.memory_bytes_s, rates.available_bytes, rates.resident_bytes) > 0


def test_a_budget_fits_only_where_the_process_does_too() -> None:
    sizes = Sizes(
        layers=1, active=1, experts=4, least_slots=1, slot_bytes=1 << 20, expert_bytes=4 << 20, dense_bytes=1 << 20
    )

    def planned(available_bytes: int) -> Forecast:
        return forecast(sizes, Rates(1e9, 1e9, available_bytes, resident_bytes=300 << 20), 0.5)

    ample = planned(1 << 40)
    assert ample.total_bytes == sizes.dense_bytes + ample.expert_memory_bytes + ample.process_bytes
    assert ample.process_bytes > 300 << 20
    still_needed = ample.total_bytes - (300 << 20)
    assert planned(still_needed).fits
    assert not planned(still_needed - 1).fits
