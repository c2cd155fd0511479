"""Whatever is wrong with a file is said in one line that names it."""

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
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "it.trace"
    make_trace(path)
    return path.read_bytes()


def refused(path: Path) -> str:
    with pytest.raises(TraceError) as error:
        open_trace(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def edited(whole: bytes, path: Path, **metadata: str) -> Path:
    """A copy with other metadata."""
    length = int.from_bytes(whole[:8], "little")
    table: dict[str, Any] = json.loads(whole[8 : 8 + length])
    table["__metadata__"] |= metadata
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    return path


@given(share=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_off_anywhere_is_refused(whole: bytes, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.trace"
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)


@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_a_damaged_header_is_refused_or_harmless(whole: bytes, tmp_path: Path, place: int, value: int) -> None:
    path = tmp_path / "damaged.trace"
    end = 8 + int.from_bytes(whole[:8], "little")
    place %= end
    path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    try:
        with open_trace(path) as trace:
            assert len(trace) == 3  # a letter of the model's name
    except TraceError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either way is right


def test_a_file_that_has_grown_is_refused(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "it.trace").write_bytes(whole + b"\0")
    assert "damaged" in refused(tmp_path / "it.trace")


def test_a_file_cut_off_in_its_data_is_called_cut_off(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "it.trace").write_bytes(whole[:-1])
    assert "cut off" in refused(tmp_path / "it.trace")


def test_a_newer_version_says_to_update(whole: bytes, tmp_path: Path) -> None:
    assert "version 2" in refused(edited(whole, tmp_path / "it.trace", version="2"))


@pytest.mark.parametrize("version", ["", "one", "-1"])
def test_a_version_that_is_none_is_refused(whole: bytes, tmp_path: Path, version: str) -> None:
    assert "damaged" in refused(edited(whole, tmp_path / "it.trace", version=version))


def test_a_later_addition_to_the_header_is_passed_over(whole: bytes, tmp_path: Path) -> None:
    with open_trace(edited(whole, tmp_path / "it.trace")) as trace:
        header = trace.header.as_dict() | {"invented_later": 1}
    with open_trace(edited(whole, tmp_path / "it.trace", header=json.dumps(header))) as trace:
        assert len(trace) == 3


def test_counts_that_contradict_each_other_are_refused(whole: bytes, tmp_path: Path) -> None:
    start = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "it.trace"
    path.write_bytes(whole[:start] + np.int64(99).tobytes() + whole[start + 8 :])
    assert "contradict" in refused(path)


def test_another_safetensors_file_is_told_from_a_trace(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "model.safetensors")
    assert "not a finemoe trace" in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 40, b'{"prompt": "hi"}\n' * 9, b"\2\0\0\0\0\0\0\0[]"])
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "it").write_bytes(content)
    assert "not a finemoe trace" in refused(tmp_path / "it")


def test_no_file_and_no_permission_are_told_apart(tmp_path: Path) -> None:
    assert "no such trace" in refused(tmp_path / "none")
    assert "can't be read" in refused(tmp_path)


def spoiled(path: Path, column: str, value: float, *, everywhere: bool = False) -> Path:
    """A trace with this value in a column's last row, or in all of it."""
    make_trace(path, header=make_header(OPTIONAL))
    head = read_head(path)
    about = next(each for each in columns(head.header) if each.name == column)
    first = 0 if everywhere else head.counts[about.table] - 1
    content = bytearray(path.read_bytes())
    size = (head.counts[about.table] - first) * about.row_bytes
    begin = head.offsets_bytes[column] + first * about.row_bytes
    content[begin : begin + size] = np.full(size // about.dtype.itemsize, value, about.dtype).tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("column", "value"),
    [("expert_ids", 8), ("expert_ids", 254), ("expert_ids", 3), ("token_ids", -1), ("phases", 2),
     ("weights", np.nan), ("weights", np.inf), ("embeddings", np.nan)],
)  # fmt: skip
def test_values_that_can_not_be_are_refused_with_the_name_of_their_column(
    tmp_path: Path, column: str, value: float
) -> None:
    assert f"column {column} " in refused(spoiled(tmp_path / "it.trace", column, value))


def test_tokens_that_executed_nothing_are_no_damage(tmp_path: Path) -> None:
    path = spoiled(tmp_path / "it.trace", "expert_ids", make_header().sentinel, everywhere=True)
    with open_trace(path) as trace:
        assert len(trace) == 3


@pytest.mark.parametrize("column", ["probs", "lookahead"])
def test_large_columns_are_refused_when_they_are_read(tmp_path: Path, column: str) -> None:
    with open_trace(spoiled(tmp_path / "it.trace", column, np.nan)) as trace:
        assert trace.column("expert_ids") is not None
        trace.request(0)
        for read in (lambda: trace.column(column), lambda: trace.request(2)):
            with pytest.raises(TraceError, match=rf"it\.trace: damaged: its column {column} has values"):
                read()


@pytest.mark.parametrize(("column", "value"), [("weights", np.nan), ("expert_ids", 3), ("token_ids", -1)])
def test_values_that_can_not_be_are_never_written(tmp_path: Path, column: str, value: float) -> None:
    header = make_header()
    request = make_request(header, np.random.default_rng(0))
    wrong = replace(request, **{column: np.full_like(getattr(request, column), value)})
    with pytest.raises(TraceError, match=rf"a request's {column} have "):
        wrong.check(header)
