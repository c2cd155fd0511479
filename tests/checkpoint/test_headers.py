"""Safetensors headers are validated before anything is loaded; a damaged file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from finemoe.checkpoint import TensorHeader, read_headers
from finemoe.errors import CheckpointError

GOOD: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, table: object, data: bytes = b"\0" * 24) -> Path:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_headers_give_the_place_of_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(5, dtype=torch.bfloat16), "z": torch.zeros(0, 4)}
    save_file(tensors, path, {"format": "pt"})
    headers = read_headers([path])
    raw = path.read_bytes()
    assert set(headers) == set(tensors)
    for name, tensor in tensors.items():
        header = headers[name]
        assert header.shape == tuple(tensor.shape)
        held = raw[header.offset_bytes : header.offset_bytes + header.length_bytes]
        assert held == tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else held == b""


def test_files_are_numbered_in_their_order(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.safetensors", {name: GOOD}) for name in "ab"]
    assert {name: header.file for name, header in read_headers(files).items()} == {"a": 0, "b": 1}


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.safetensors", {"same": GOOD}) for name in "ab"]
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor same is also in another shard"):
        read_headers(files)


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x": GOOD}, b"\0" * 23)
    size_bytes = path.stat().st_size
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: truncated: .*{size_bytes + 1} bytes.*{size_bytes};"):
        read_headers([path])


@pytest.mark.parametrize(
    "content",
    [b"", b"\1\2", (0).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}", b"version htt"],
    ids=["empty", "short prefix", "no header", "cut off", "absurd length", "git-lfs pointer"],
)
def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a safetensors file"):
        read_headers([path])


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name}: can't be read"):
            read_headers([path])


@pytest.mark.parametrize(
    "table",
    [
        b"{",
        b"\xff\xfe",
        [],
        "text",
        None,
        {"x": None},
        {"x": []},
        {"x": {}},
        {"x": GOOD | {"dtype": "F99"}},
        {"x": GOOD | {"dtype": ["F32"]}},
        {"x": GOOD | {"shape": None}},
        {"x": GOOD | {"shape": [2, "a"]}},
        {"x": GOOD | {"shape": [2, 4]}},
        {"x": GOOD | {"shape": [-2, -3]}},
        {"x": GOOD | {"shape": [2.0, 3.0]}},
        {"x": GOOD | {"data_offsets": [0]}},
        {"x": GOOD | {"data_offsets": [0, 24, 24]}},
        {"x": GOOD | {"data_offsets": [-24, 0]}},
        {"x": GOOD | {"data_offsets": [24, 0]}},
        {"x": GOOD | {"data_offsets": [0.0, 24.0]}},
        {"x": GOOD | {"data_offsets": ["0", "24"]}},
        {"x": GOOD | {"data_offsets": [0, float("inf")]}},
        {"x": GOOD | {"shape": [float("inf"), 1]}},
        pytest.param(b'{"a":' * 5000, id="nested without end"),
    ],
    ids=repr,
)
def test_a_corrupt_header_is_named(tmp_path: Path, table: object) -> None:
    path = write(tmp_path / "a.safetensors", table)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: its safetensors header is corrupt"):
        read_headers([path])


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-50, 50) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I64"]) | anything,
        "shape": st.lists(st.integers(-3, 9), max_size=3) | anything,
        "data_offsets": st.lists(st.integers(-3, 99), min_size=2, max_size=2) | anything,
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(anything | st.dictionaries(st.text(max_size=5), entries, max_size=3))
@example({"": {"data_offsets": [0, 0], "dtype": "BF16", "shape": [0, True]}})
def test_any_header_gives_valid_entries_or_is_refused(tmp_path: Path, table: object) -> None:
    path = write(tmp_path / "a.safetensors", table, b"\0" * 99)
    try:
        headers = read_headers([path])
    except CheckpointError:
        return
    for header in headers.values():
        assert isinstance(header, TensorHeader)
        assert 0 <= header.offset_bytes <= header.offset_bytes + header.length_bytes <= path.stat().st_size
        assert all(type(size) is int and size >= 0 for size in header.shape)
        assert type(header.offset_bytes) is int
        assert type(header.length_bytes) is int
