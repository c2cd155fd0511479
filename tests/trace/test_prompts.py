"""Every layout of prompt files is read; errors name the file and the place in it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finemoe.errors import ConfigError
from finemoe.trace.prompts import read_prompts

LAYOUTS: list[dict[str, Any]] = [
    {"prompt": "hi", "text": "not this"},
    {"question": "hi", "answer": "no"},
    {"instruction": "hi", "instances": [{"input": "no"}]},
    {"text": "hi", "role": "prompter", "replies": [{"text": "no"}]},
    {"turns": ["hi", "no"]},
    {"messages": [{"role": "system", "content": "no"}, {"role": "user", "content": "hi"}]},
    {"conversations": [{"from": "gpt", "value": "no"}, {"from": "human", "value": "hi"}]},
]


@pytest.mark.parametrize("entry", LAYOUTS, ids=lambda entry: next(iter(entry)))
@pytest.mark.parametrize("layout", ["lines", "list", "gzip"])
def test_a_layout_is_read(tmp_path: Path, entry: dict[str, Any], layout: str) -> None:
    path = tmp_path / ("it.jsonl.gz" if layout == "gzip" else "it.json")
    content = json.dumps([entry, entry]) if layout == "list" else f"\n{json.dumps(entry)}\n\n{json.dumps(entry)}"
    path.write_bytes(gzip.compress(content.encode()) if layout == "gzip" else content.encode())
    assert read_prompts(path).texts == ("hi", "hi")


def test_plain_text_has_a_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "it.txt").write_text("  one\n\ntwo\n")
    assert read_prompts(tmp_path / "it.txt").texts == ("one", "two")


def test_strings_of_a_list_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text('["one", "two", "three"]')
    assert read_prompts(tmp_path / "it.json", limit=2).texts == ("one", "two")
    assert read_prompts(tmp_path / "it.json", limit=1, skip=1).texts == ("two",)
    with pytest.raises(ConfigError, match="beyond the 3 to skip"):
        read_prompts(tmp_path / "it.json", skip=3)


def test_a_named_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "it.jsonl").write_text('{"prompt": "not this", "goal": "this"}')
    assert read_prompts(tmp_path / "it.jsonl", field="goal").texts == ("this",)


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "it.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "\\ud83d"}')
    with pytest.raises(ConfigError, match=r"^--prompts: .*it.jsonl:2: is not valid UTF-8$"):
        read_prompts(tmp_path / "it.jsonl")


def test_entries_without_a_prompt_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = [{"conversations": [{"from": "gpt", "value": "no"}]}, {"prompt": " "}, {"prompt": "hi"}]
    (tmp_path / "it.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts(tmp_path / "it.jsonl")
    assert (prompts.texts, prompts.skipped) == (("hi",), 2)


@pytest.mark.parametrize(
    ("content", "field", "named"),
    [
        ('{"prompt": "hi"}\n{"goal": "hi"}', None, ":2 has none of the fields"),
        ('{"prompt": "hi"}', "goal", "no field 'goal'"),
        ('{"prompt": "hi"}\n{', None, ":2 is damaged"),
        ("[1]", None, "entry 0 is neither"),
        ("[", None, "damaged"),
        ('{"prompt": 3}', None, "neither text nor"),
        ("", None, "holds no prompt"),
    ],
)
def test_an_unreadable_entry_is_named(tmp_path: Path, content: str, field: str | None, named: str) -> None:
    (tmp_path / "it.jsonl").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_prompts(tmp_path / "it.jsonl", field)
    assert named in str(error.value)
    assert str(error.value).startswith("--prompts: ")


def test_missing_binary_and_damaged_gzip_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "it.gz").write_bytes(b"plain")
    for name in ("none", "binary", "it.gz"):
        with pytest.raises(ConfigError, match=r"--prompts: .*(can't be read|neither)"):
            read_prompts(tmp_path / name)
