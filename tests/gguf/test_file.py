"""GGUF headers: their contents, and one-line errors for damaged ones."""

from __future__ import annotations

import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from finemoe.errors import CheckpointError, UnsupportedModelError
from finemoe.gguf.file import open_gguf
from tests.gguf.conftest import MakeFile


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, tensors: bytes = b"", count: int = 0, pairs: bytes = b"", pair_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, pair_count) + pairs + tensors


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("some")


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def test_headers_agree_with_the_gguf_package(random_gguf: MakeFile) -> None:
    from gguf import GGUFReader

    path = random_gguf()
    file, reader = open_gguf(path), GGUFReader(path)
    assert {t.name: (int(t.data_offset), int(t.n_bytes), t.tensor_type.name) for t in reader.tensors} == {
        name: (info.offset_bytes, info.size_bytes, info.type) for name, info in file.tensors.items()
    }
    assert file.active_experts == 2 and file.context_tokens == 512
    assert {tensor.experts for tensor in file.expert_tensors} == {8}
    assert file.expert_bytes + file.dense_bytes == sum(int(t.n_bytes) for t in reader.tensors)


def test_parts_of_a_split_set_are_read_together(random_gguf: MakeFile) -> None:
    whole, split = open_gguf(random_gguf()), open_gguf(random_gguf(key="split", split_bytes=4_000_000))
    assert len(split.files) > 2
    assert split.tensors.keys() == whole.tensors.keys()
    assert {info.file for info in split.tensors.values()} == set(range(len(split.files)))


def test_a_missing_part_is_named(random_gguf: MakeFile, tmp_path: Path) -> None:
    parts = sorted(random_gguf(key="split", split_bytes=4_000_000).parent.glob("*.gguf"))
    for part in (*parts[:1], *parts[2:]):
        shutil.copy(part, tmp_path)
    with pytest.raises(CheckpointError, match=rf"{parts[1].name}: does not exist; it is a part of the model"):
        open_gguf(tmp_path / parts[0].name)


def test_a_later_part_points_to_the_first(random_gguf: MakeFile) -> None:
    parts = sorted(random_gguf(key="split", split_bytes=4_000_000).parent.glob("*.gguf"))
    with pytest.raises(CheckpointError, match=r"is not the first part; give .*00001-of"):
        open_gguf(parts[1])


def test_a_truncated_file_is_refused_wherever_it_ends(random_gguf: MakeFile, tmp_path: Path) -> None:
    data = random_gguf().read_bytes()
    end = max(info.offset_bytes + info.size_bytes for info in open_gguf(random_gguf()).tensors.values())
    path = tmp_path / "cut.gguf"
    for length in (3, 10, 30, 400, 2000, len(data) // 2, end - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: is (truncated|not a GGUF file)"):
            open_gguf(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"PK\x03\x04 something else", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
        (header(pairs=struct.pack("<Q", 1 << 40), pair_count=1), "truncated or corrupt"),
        (header(pairs=text("a") + struct.pack("<I", 77), pair_count=1), "a value of type 77"),
        (header(pairs=text("a") + struct.pack("<IIQ", 9, 9, 1), pair_count=1), "an array of arrays"),
        (header(), "names no architecture"),
        (header(tensors=entry("t", (32,), 0, 0), count=1), "truncated: t ends"),
        (header(tensors=entry("t", (32,), 12, 0) + bytes(4096), count=1), "t of shape"),
        (header(tensors=entry("t", (32,), 999, 0) + bytes(4096), count=1), "type 999, which is unknown"),
        (header(tensors=entry("t", (32,), 0, 7) + bytes(4096), count=1), "a wrong entry for t"),
        (header(tensors=entry("t", (), 0, 0) + bytes(4096), count=1), "0 dimensions"),
        (
            header(tensors=entry("t", (64,), 0, 0) + entry("u", (64,), 0, 32) + bytes(4096), count=2),
            "overlapping another",
        ),
    ],
)
def test_a_corrupt_header_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as error:
        open_gguf(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_random_damage_is_refused_or_harmless(random_gguf: MakeFile, tmp_path: Path) -> None:
    import random

    data = bytearray(random_gguf().read_bytes()[:8192])
    path, rng = tmp_path / "damaged.gguf", random.Random(1)
    size = random_gguf().stat().st_size
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        with path.open("r+b") as file:
            file.truncate(size)
        with suppress(CheckpointError):
            open_gguf(path)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dense.gguf"
    path.write_bytes(header(pairs=ARCHITECTURE, pair_count=1, tensors=entry("t", (32,), 0, 0), count=1) + bytes(4096))
    with pytest.raises(UnsupportedModelError, match="is a dense model"):
        open_gguf(path).refuse_dense()
