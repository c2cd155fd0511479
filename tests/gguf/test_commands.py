"""The command line with GGUF files."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from finemoe.cli import main
from finemoe.gguf.locate import choose_files, is_gguf
from tests.gguf.conftest import MakeFile

pytestmark = pytest.mark.usefixtures("own_process")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(random_gguf: MakeFile) -> Path:
    return random_gguf(key="tokenizer", tokenizer=True)


def answer(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("policy", ["lru", "finemoe", "moe-infinity", "expert-map"])
def test_generate_answers_under_every_policy_alike(model: Path, capsys: Capture, policy: str) -> None:
    options = ("--model", str(model), "--max-new-tokens", "12", "--threads", "1")
    got = answer(capsys, "generate", "Hello", *options, "--expert-memory", "50%", "--policy", policy, "--verify")
    whole = answer(capsys, "generate", "Hello", *options, "--expert-memory", "all", "--policy", "lru")
    assert got["token_ids"] == whole["token_ids"]
    assert got["text"] == whole["text"]
    assert got["experts"] == 32 and got["slots"] == 16
    assert got["expert_dtype"] == "Q8_0" and not got["lossy"]
    assert got["accesses"] == got["hits"] + got["late"] + got["misses"] > 0
    assert got["prompt_tokens"] == 1 + 5 + 1 + 1  # one token per byte, and three special tokens


def test_generate_explains_and_keeps_maps(model: Path, capsys: Capture, tmp_path: Path) -> None:
    store = tmp_path / "maps.safetensors"
    options = ("--model", str(model), "--max-new-tokens", "12", "--expert-memory", "50%", "--map-store", str(store))
    got = answer(capsys, "generate", "Hello", *options, "--explain")
    assert len(got["explained"]) > 0
    assert store.is_file()
    answer(capsys, "generate", "Hello", *options)


def test_chat_remembers_the_turns(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n/exit\n"))
    assert main(["chat", "--model", str(model), "--json", "--max-new-tokens", "6", "--expert-memory", "50%"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert second["prompt_tokens"] > first["prompt_tokens"] + len("And then?")


def test_inspect_and_plan_read_headers(model: Path, capsys: Capture) -> None:
    described = answer(capsys, "inspect", "--model", str(model))
    assert (described["layers"], described["experts"], described["experts_per_token"]) == (4, 32, 2)
    assert described["expert_dtype"] == "Q8_0"
    assert described["least_expert_memory_bytes"] == 2 * described["slot_bytes"]
    assert main(["inspect", "--model", str(model)]) == 0
    assert "Q8_0" in capsys.readouterr().out
    planned = answer(capsys, "plan", "--model", str(model), "--expert-memory", "50%")
    assert planned["rows"][0]["slots"] == 16


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", "Hi", "--dtype", "float16"], "--dtype: has no effect on a GGUF model"),
        (["generate", "Hi", "--expert-dtype", "int8"], "--expert-dtype: has no effect on a GGUF model"),
        (["generate", "Hi", "--prefill-chunk", "4"], "--prefill-chunk: for GGUF models it follows from"),
        (["generate", "Hi", "--replay-routing", "x"], "--replay-routing does not run GGUF models yet"),
        (["generate", "Hi", "--revision", "x"], "--revision: .* is a file on this machine"),
        (["record", "--prompts", "x", "--out", "y"], "record does not run GGUF models yet"),
        (["bench"], "bench does not run GGUF models yet"),
        (["serve"], "serve does not run GGUF models yet"),
        (["inspect", "--expert-dtype", "int4"], "--expert-dtype: has no effect on a GGUF model"),
    ],
)
def test_what_has_no_effect_is_refused_by_name(
    model: Path, capsys: Capture, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["Hi"]')
    given = [str(prompts) if value == "x" and arguments[0] == "record" else value for value in arguments]
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main([*given, "--model", str(model)]))
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert re.search(reason, errors), errors


def test_a_split_set_is_given_by_its_first_part(random_gguf: MakeFile, capsys: Capture) -> None:
    path = random_gguf(key="split tokenizer", tokenizer=True, split_bytes=4_000_000)
    got = answer(capsys, "generate", "Hi", "--model", str(path), "--max-new-tokens", "3", "--expert-memory", "50%")
    assert got["tokens"] == 3


def test_a_missing_file_is_named(capsys: Capture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main(["generate", "Hi", "--model", str(tmp_path / "no.gguf")]))
    assert stopped.value.code == 2
    assert "there is no file" in capsys.readouterr().err


def test_names_on_the_hub_are_told_from_folders(tmp_path: Path) -> None:
    assert is_gguf("x.gguf") and is_gguf("some/model-GGUF:Q4_K_M") and is_gguf("a/b:c/d.gguf")
    assert not is_gguf("some/model") and not is_gguf(str(tmp_path)) and not is_gguf(None)


FILES = [
    "README.md", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf",
    "mmproj-m-Q4_K_M.gguf", "BF16/m-BF16-00001-of-00003.gguf", "BF16/m-BF16-00002-of-00003.gguf",
    "BF16/m-BF16-00003-of-00003.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("q4_k_s", ["m-Q4_K_S.gguf"]),
        ("Q8_0", ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]),
        ("m-Q4_K_S.gguf", ["m-Q4_K_S.gguf"]),
        ("BF16", [f"BF16/m-BF16-0000{n}-of-00003.gguf" for n in (1, 2, 3)]),
    ],
)
def test_a_quantisation_chooses_the_files_of_one_model(wanted: str, chosen: list[str]) -> None:
    assert choose_files(FILES, wanted, "some/model") == chosen


@pytest.mark.parametrize(
    ("wanted", "reason"), [("Q4_K", "is not there in some/model; it has m-"), ("m", "names several models")]
)
def test_a_quantisation_that_does_not_name_one_model_is_refused(wanted: str, reason: str) -> None:
    from finemoe.errors import CheckpointError

    with pytest.raises(CheckpointError, match=reason):
        choose_files(FILES, wanted, "some/model")


def test_headers_of_a_copy_are_those_of_the_file(model: Path, tmp_path: Path) -> None:
    from finemoe.gguf.file import open_gguf
    from finemoe.model.gguf_loader import fingerprint

    copied = Path(shutil.copy(model, tmp_path / "other.gguf"))
    assert fingerprint(open_gguf(copied)) == fingerprint(open_gguf(model))
