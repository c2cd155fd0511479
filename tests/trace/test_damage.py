"""Opening a damaged or foreign file raises a one-line error that names it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from finemoe.errors import TraceError
from finemoe.trace import open_trace
from finemoe.trace.format import OPTIONAL, columns
from finemoe.trace.reader import read_head
from tests.trace.make import make_header, make_request, make_trace


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("intact") / "it.trace"
    make_trace(path)
    return path.read_bytes()


def refused(path: Path) -> str:
    with pytest.raises(TraceError) as error:
        open_trace(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def edited(intact: bytes, path: Path, **metadata: str) -> Path:
    """A copy with other metadata."""
    length = int.from_bytes(intact[:8], "little")
    table: dict[str, Any] = json.loads(intact[8 : 8 + length])
    table["__metadata__"] |= metadata
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + intact[8 + length :])
    return path


@given(share=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_refused(intact: bytes, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.trace"
    path.write_bytes(intact[: int(share * len(intact))])
    refused(path)


@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_a_damaged_header_is_refused_or_harmless(intact: bytes, tmp_path: Path, place: int, value: int) -> None:
    path = tmp_path / "damaged.trace"
    end = 8 + int.from_bytes(intact[:8], "little")
    place %= end
    path.write_bytes(intact[:place] + bytes([value]) + intact[place + 1 :])
    try:
        with open_trace(path) as trace:
            assert len(trace) == 3  # a letter of the model's name
    except TraceError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either way is right


def test_a_file_with_extra_bytes_is_refused(intact: bytes, tmp_path: Path) -> None:
    (tmp_path / "it.trace").write_bytes(intact + b"\0")
    assert "damaged" in refused(tmp_path / "it.trace")


def test_a_file_truncated_in_its_data_is_reported_as_cut_off(intact: bytes, tmp_path: Path) -> None:
    (tmp_path / "it.trace").write_bytes(intact[:-1])
    assert "cut off" in refused(tmp_path / "it.trace")


def test_a_newer_version_says_to_update(intact: bytes, tmp_path: Path) -> None:
    assert "version 2" in refused(edited(intact, tmp_path / "it.trace", version="2"))


@pytest.mark.parametrize("version", ["", "one", "-1"])
def test_an_invalid_version_is_refused(intact: bytes, tmp_path: Path, version: str) -> None:
    assert "damaged" in refused(edited(intact, tmp_path / "it.trace", version=version))


def test_unknown_header_keys_are_ignored(intact: bytes, tmp_path: Path) -> None:
    with open_trace(edited(intact, tmp_path / "it.trace")) as trace:
        header = trace.header.as_dict() | {"invented_later": 1}
    with open_trace(edited(intact, tmp_path / "it.trace", header=json.dumps(header))) as trace:
        assert len(trace) == 3


def test_inconsistent_counts_are_refused(intact: bytes, tmp_path: Path) -> None:
    start = 8 + int.from_bytes(intact[:8], "little")
    path = tmp_path / "it.trace"
    path.write_bytes(intact[:start] + np.int64(99).tobytes() + intact[start + 8 :])
    assert "contradict" in refused(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "model.safetensors")
    assert "not a finemoe trace" in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 40, b'{"prompt": "hi"}\n' * 9, b"\2\0\0\0\0\0\0\0[]"])
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "it").write_bytes(content)
    assert "not a finemoe trace" in refused(tmp_path / "it")


def test_missing_and_unreadable_files_are_distinguished(tmp_path: Path) -> None:
    assert "no such trace" in refused(tmp_path / "none")
    assert "can't be read" in refused(tmp_path)


def with_value(path: Path, name: str, value: float, *, everywhere: bool = False) -> Path:
    """A trace with this value in a column's last row, or in all its rows."""
    make_trace(path, header=make_header(OPTIONAL))
    head = read_head(path)
    column = next(each for each in columns(head.header) if each.name == name)
    first = 0 if everywhere else head.counts[column.table] - 1
    content = bytearray(path.read_bytes())
    size = (head.counts[column.table] - first) * column.row_bytes
    begin = head.offsets_bytes[name] + first * column.row_bytes
    content[begin : begin + size] = np.full(size // column.dtype.itemsize, value, column.dtype).tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("column", "value"),
    [("expert_ids", 8), ("expert_ids", 254), ("expert_ids", 3), ("token_ids", -1), ("phases", 2),
     ("weights", np.nan), ("weights", np.inf), ("embeddings", np.nan)],
)  # fmt: skip
def test_invalid_values_are_refused_with_the_name_of_their_column(tmp_path: Path, column: str, value: float) -> None:
    assert f"column {column} " in refused(with_value(tmp_path / "it.trace", column, value))


def test_tokens_without_experts_are_valid(tmp_path: Path) -> None:
    path = with_value(tmp_path / "it.trace", "expert_ids", make_header().sentinel, everywhere=True)
    with open_trace(path) as trace:
        assert len(trace) == 3


@pytest.mark.parametrize("column", ["probs", "lookahead"])
def test_large_columns_are_checked_when_they_are_read(tmp_path: Path, column: str) -> None:
    with open_trace(with_value(tmp_path / "it.trace", column, np.nan)) as trace:
        assert trace.column("expert_ids") is not None
        trace.request(0)
        for read in (lambda: trace.column(column), lambda: trace.request(2)):
            with pytest.raises(TraceError, match=rf"it\.trace: damaged: its column {column} has values"):
                read()


@pytest.mark.parametrize(("column", "value"), [("weights", np.nan), ("expert_ids", 3), ("token_ids", -1)])
def test_invalid_values_are_never_written(tmp_path: Path, column: str, value: float) -> None:
    header = make_header()
    request = make_request(header, np.random.default_rng(0))
    wrong = replace(request, **{column: np.full_like(getattr(request, column), value)})
    with pytest.raises(TraceError, match=rf"a request's {column} have "):
        wrong.check(header)
