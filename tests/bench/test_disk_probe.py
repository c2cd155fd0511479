from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from finemoe.bench import disk_probe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * disk_probe.CHUNK_BYTES + 5))
    return path


def test_the_probe_measures_a_bandwidth(file: Path) -> None:
    assert disk_probe.probe([file], 4 * disk_probe.CHUNK_BYTES, seed=0).bandwidth_bytes_s > 0


def test_the_probe_reads_contiguous_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[int, int]] = []

    def record(descriptors: Sequence[int], given: Iterator[tuple[int, int]]) -> int:
        places.extend(given)
        return 1

    monkeypatch.setattr(disk_probe, "_read_all", record)
    disk_probe.probe([file], 4 * disk_probe.CHUNK_BYTES, seed=0, run_bytes=2 * disk_probe.CHUNK_BYTES)
    offsets = [offset for _, offset in places]
    assert len(offsets) == 4
    assert [b - a for a, b in zip(offsets[::2], offsets[1::2], strict=True)] == [disk_probe.CHUNK_BYTES] * 2


def test_the_probe_reads_files_smaller_than_a_chunk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x" * 5000)
    assert disk_probe.probe([small], 1, seed=0).bandwidth_bytes_s > 0


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        disk_probe.probe([tmp_path / "nowhere"], 1, seed=0)


def test_evicted_pages_are_not_cached(file: Path) -> None:
    file.read_bytes()
    before = disk_probe.cached_share([file])
    if before is None:
        pytest.skip("the kernel can't be asked here")
    assert before == 1.0
    disk_probe.evict([file])
    assert disk_probe.cached_share([file]) in {0.0, 1.0}  # some file systems are in memory
    assert disk_probe.cached_share([file]) in {0.0, 1.0}  # the check itself reads nothing
