"""What a machine gives is measured whatever its file system can do."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from finemoe.forecast import measure

fcntl = pytest.importorskip("fcntl")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is no direct I/O to be refused")
def test_a_disk_that_refuses_direct_reads_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        pytest.skip("files of this folder can't even be opened for direct reads")
    assert min(rates.disk_bytes_s, rates.memory_bytes_s, rates.available_bytes) > 0
