"""The commands: one JSON document or readable text on standard output; one line for bad input."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import runpy
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe import __version__
from finemoe.cli import COMMANDS, INTERRUPTED, main
from finemoe.config import GenerateConfig, LoadConfig
from finemoe.store import DiskStore
from tests.chat_model import make_chat_model
from tests.tiny import configured, edited
from tests.trace.make import make_header, make_trace

pytestmark = pytest.mark.usefixtures("own_process")
Capture = pytest.CaptureFixture[str]
MOST_FLAGS_SHOWN = 20  # by --help
CONTRACT = {
    "text", "tokens", "hit_rate", "late_rate", "miss_rate", "ttft_s", "tpot_s", "tok_s", "bytes_read", "stall_s",
    "expert_memory_bytes", "peak_rss_bytes", "policy", "model",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_chat_model(tmp_path_factory.mktemp("cli") / "tiny"))


@pytest.fixture(scope="module")
def short(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, with room for 40 tokens."""
    return str(configured(Path(model), tmp_path_factory.mktemp("cli") / "short", max_position_embeddings=40))


def refused(capsys: Capture, *arguments: str) -> str:
    """The one line on standard error with which a command ends with status 2."""
    capsys.readouterr()
    status: object
    try:
        status = main(arguments)
    except SystemExit as leaving:
        status = leaving.code
    output, errors = capsys.readouterr()
    assert status == 2
    assert output == ""
    last = errors.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("finemoe")
    assert ": error: " in last
    assert "Traceback" not in errors
    return last.partition(": error: ")[2]


def answered(capsys: Capture, *arguments: str) -> Any:
    """The one JSON document on standard output."""
    capsys.readouterr()
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"finemoe {__version__}\n"


def test_python_runs_the_package(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "argv", ["finemoe", "--version"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("finemoe", run_name="__main__")
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"finemoe {__version__}\n"


def test_help_names_every_command(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    output = capsys.readouterr().out
    assert all(name in output for name in COMMANDS)


def test_without_a_command_help_is_shown(capsys: Capture) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"usage: finemoe {command} " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_setting_is_a_flag_with_its_default(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help-all"])
    output = " ".join(capsys.readouterr().out.split())
    for field in [*fields(LoadConfig), *fields(GenerateConfig)]:
        assert "--" + field.name.replace("_", "-") in output
        if field.default not in (None, False):
            assert f"(default: {field.default})" in output


@pytest.mark.parametrize("command", ["generate", "chat", "record", "serve", "simulate", "bench"])
def test_help_shows_what_people_set_and_help_all_the_rest(capsys: Capture, command: str) -> None:
    flags = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as leaving:
            main([command, option])
        assert leaving.value.code == 0
        flags.append(set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)))
    shown, everything = flags
    assert shown < everything
    assert len(shown) <= MOST_FLAGS_SHOWN
    assert {"--model", "--expert-memory", "--policy"} & shown
    assert "--help-all" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fly"], "fly"),
        (["generate"], "PROMPT"),
        (["generate", "Hi", "--speed", "9"], "--speed"),
        (["generate", "Hi", "--expert-mem", "9GiB"], "--expert-mem"),
        (["generate", "Hi", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["generate", "Hi", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "Hi", "--temperature", "-1"], "--temperature"),
        (["generate", "Hi", "--top-p", "0.5"], "--top-p"),
        (["generate", "Hi", "--seed", "99999999999999999999999", "--temperature", "1"], "--seed"),
        (["chat", "--seed", "-1"], "--seed"),
        (["generate", "\udcff"], "PROMPT"),
        (["chat", "--system", "\udcff"], "--system"),
        (["generate", "Hi", "--prefill-chunk", "0"], "--prefill-chunk"),
        (["generate", "Hi", "--expert-memory", "0"], "--expert-memory"),
        (["generate", "Hi", "--expert-memory", "101%"], "--expert-memory"),
        (["generate", "Hi", "--reader-threads", "0"], "--reader-threads"),
        (["generate", "Hi", "--io", "fast"], "--io"),
        (["generate", "Hi", "--link-bandwidth", "fast"], "--link-bandwidth"),
        (["bench", "--link-bandwidth", "0"], "--link-bandwidth"),
        (["bench", "--prompts-limit", "3"], "--prompts-limit"),
        (["generate", "Hi", "--dtype", "int3"], "--dtype"),
        (["generate", "Hi", "--policy", "fifo", "--model", "/no/where"], "--policy"),
        (["generate", "Hi", "--model", "/no/where"], "--model"),
        (["generate", "Hi", "--model", ""], "--model: is empty"),
        (["inspect", "--model", ""], "--model: is empty"),
        (["plan", "--model", " "], "--model: is empty"),
        (["bench", "--model", ""], "--model: is empty"),
        (["chat", "--model", "/no/where"], "--model"),
        (["inspect", "--model", "/no/where"], "--model"),
        (["plan", "--model", "/no/where"], "--model"),
        (["plan", "--model", "/no/where", "--expert-memory", "25%,often"], "--expert-memory"),
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_in_one_line_that_names_it(capsys: Capture, arguments: list[str], named: str) -> None:
    assert named in refused(capsys, *arguments)


def test_a_budget_below_the_minimum_names_the_minimum(capsys: Capture, model: str) -> None:
    assert "at least 4 are needed" in refused(capsys, "generate", "Hi", "--model", model, "--expert-memory", "1%")


def test_json_is_the_only_thing_on_standard_output(capsys: Capture, model: str) -> None:
    flags = "--model", model, "--expert-memory", "50%", "--max-new-tokens", "6"
    table = answered(capsys, "generate", "Hi", *flags, "--json")
    assert set(table) >= CONTRACT
    assert table["model"] == model
    assert table["tokens"] == len(table["token_ids"]) <= 6
    assert table["hit_rate"] + table["late_rate"] + table["miss_rate"] == pytest.approx(1)
    assert main(["generate", "Hi", *flags]) == 0
    output, errors = capsys.readouterr()
    assert output == table["text"] + "\n"
    assert "hits" in errors


def test_a_link_that_is_held_back_is_marked(capsys: Capture, model: str) -> None:
    flags = "--model", model, "--max-new-tokens", "3", "--link-bandwidth", "64MiB"
    assert answered(capsys, "generate", "Hi", *flags, "--json")["link_bandwidth_bytes_s"] == 64 << 20
    assert main(["generate", "Hi", *flags]) == 0
    assert "link throttled to 64.0 MiB/s" in capsys.readouterr().err


def test_an_answer_can_be_explained(capsys: Capture, model: str) -> None:
    flags = "--model", model, "--max-new-tokens", "4", "--policy", "deepspeed", "--expert-memory", "50%"
    assert answered(capsys, "generate", "Hi", *flags, "--json")["explained"] is None
    table = answered(capsys, "generate", "Hi", *flags, "--json", "--explain")
    for name, total in (("hits", "hits"), ("late", "late"), ("misses", "misses"), ("predicted", "prefetched")):
        assert sum(row[name] for row in table["explained"]) == table[total]
    assert main(["generate", "Hi", *flags, "--explain"]) == 0
    output, errors = capsys.readouterr()
    assert "prefetched" not in output
    assert "experts from" in errors
    assert "layer 2" in errors


def test_the_budget_and_the_policy_do_not_change_the_answer(capsys: Capture, model: str) -> None:
    flags = "--model", model, "--max-new-tokens", "6", "--json"
    texts = {
        answered(capsys, "generate", "Hi", *flags, "--expert-memory", memory, "--policy", policy)["text"]
        for memory, policy in (("17%", "lru"), ("50%", "lfu"), ("all", "lfru"))
    }
    assert len(texts) == 1


def test_a_prompt_is_read_from_standard_input(capsys: Capture, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--model", model, "--max-new-tokens", "4", "--json"
    given = answered(capsys, "generate", "Hello there", *flags)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello there"))
    assert answered(capsys, "generate", "-", *flags)["token_ids"] == given["token_ids"]


def test_sampling_depends_on_the_seed_alone(capsys: Capture, model: str) -> None:
    flags = "--model", model, "--max-new-tokens", "8", "--temperature", "2", "--json", "--seed"
    ids = [answered(capsys, "generate", "Hi", *flags, seed)["token_ids"] for seed in ("1", "1", "2")]
    assert ids[0] == ids[1] != ids[2]


def test_raw_leaves_the_chat_template_out(capsys: Capture, model: str) -> None:
    flags = "--model", model, "--max-new-tokens", "2", "--json"
    assert answered(capsys, "generate", "Hi", *flags, "--raw")["prompt_tokens"] == 2
    assert answered(capsys, "generate", "Hi", *flags)["prompt_tokens"] > 2


def test_an_empty_prompt_is_refused(capsys: Capture, model: str) -> None:
    assert refused(capsys, "generate", "", "--raw", "--model", model).startswith("PROMPT: ")


def test_input_that_is_no_text_is_refused(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert refused(capsys, "generate", "-", "--model", "/no/where") == "PROMPT: is not valid UTF-8"


def test_a_turn_that_is_no_text_or_too_long_is_refused_and_the_conversation_goes_on(
    capsys: Capture, short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = b"\xff\n" + b"x" * 64 + b"\nHi\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    assert main(["chat", "--model", short, "--max-new-tokens", "2", "--json"]) == 0
    output, errors = capsys.readouterr()
    assert len(output.splitlines()) == 1
    assert "PROMPT: is not valid UTF-8; this turn is dropped" in errors
    assert "PROMPT: has 81 tokens, and the model's context holds 40" in errors


def test_a_prompt_that_fills_the_context_is_refused(capsys: Capture, short: str) -> None:
    line = refused(capsys, "generate", "x" * 40, "--raw", "--model", short)
    assert line.startswith("PROMPT: has 40 tokens, and the model's context holds 40, ")


def test_a_broken_chat_template_is_named(capsys: Capture, model: str, tmp_path: Path) -> None:
    folder = configured(Path(model), tmp_path / "broken")
    (folder / "chat_template.jinja").write_text("{% for turn in messages %}")
    assert refused(capsys, "generate", "Hi", "--model", str(folder)).startswith(f"{folder}: its chat template fails (")
    flags = "--model", str(folder), "--max-new-tokens", "1", "--json"
    assert answered(capsys, "generate", "Hi", "--raw", *flags)["tokens"] == 1
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    assert "its chat template fails (no such role)" in refused(capsys, "generate", "Hi", "--model", str(folder))


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_not_finite_end_an_answer(
    capsys: Capture, model: str, tmp_path: Path, temperature: str
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"].fill_(float("nan"))

    folder = str(edited(Path(model), tmp_path / "damaged", damage))
    line = refused(capsys, "generate", "Hi", "--model", folder, "--temperature", temperature)
    assert line.startswith(f"{folder}: the model's logits are not finite; ")
    assert "--dtype" in line


def test_a_recording_of_logits_that_are_not_finite_is_refused(capsys: Capture, model: str, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"].fill_(float("inf"))

    folder = str(edited(Path(model), tmp_path / "damaged", damage))
    (tmp_path / "prompts.txt").write_text("Hi\n")
    given = "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "trace"), "--model", folder
    assert "the model's logits are not finite" in refused(capsys, "record", *given)


def test_a_read_error_is_one_line_with_status_2(capsys: Capture, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, left = DiskStore.read, [200]

    def broken(store: DiskStore, run: Any, start_bytes: int, into: memoryview) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error", store.name(run.file))
        whole(store, run, start_bytes, into)

    monkeypatch.setattr(DiskStore, "read", broken)
    capsys.readouterr()
    flags = "--model", model, "--expert-memory", "17%", "--max-new-tokens", "50", "--json"
    assert "can't read expert" in refused(capsys, "generate", "Hi", *flags)


def test_ctrl_c_ends_a_command_with_status_130(capsys: Capture, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finemoe.model.load_config", interrupted)
    assert main(["generate", "Hi", "--model", model]) == INTERRUPTED
    assert capsys.readouterr().err.endswith("finemoe: interrupted\n")


@pytest.mark.parametrize("becomes", [None, ImportError])
def test_ctrl_c_while_a_command_is_imported_ends_with_status_130(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, becomes: type[Exception] | None
) -> None:
    def interrupted(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            if becomes is not None:
                raise becomes from None
            raise

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["generate", "Hi"]) == INTERRUPTED
    assert capsys.readouterr().err == "\nfinemoe: interrupted\n"


def test_inspect_tells_the_model_from_its_headers(capsys: Capture, model: str) -> None:
    table = answered(capsys, "inspect", "--model", model, "--json")
    assert (table["layers"], table["experts"], table["experts_per_token"]) == (3, 24, 3)
    assert table["expert_bytes"] == 24 * 3 * 64 * 96 * 2
    assert table["least_expert_memory_bytes"] == 4 * table["slot_bytes"]
    assert main(["inspect", "--model", model]) == 0
    assert "3 MoE layers, 24 routed experts, 3 active per token" in capsys.readouterr().out


def test_inspect_needs_no_weights(capsys: Capture, model: str, tmp_path: Path) -> None:
    copy = make_chat_model(tmp_path / "copy")
    weights = copy / "model.safetensors"
    held = weights.read_bytes()
    end = 8 + int.from_bytes(held[:8], "little")
    weights.write_bytes(held[:end] + b"\xff" * (len(held) - end))
    assert answered(capsys, "inspect", "--model", str(copy), "--json")["experts"] == 24


def test_plan_has_a_row_for_each_budget(capsys: Capture, model: str) -> None:
    table = answered(capsys, "plan", "--model", model, "--expert-memory", "10%,50%,all", "--json")
    rows = table["rows"]
    assert [row["slots"] for row in rows] == [4, 12, 24]  # the least that works, half, all
    assert all(row["fits"] for row in rows)
    assert all(row["total_bytes"] > row["process_bytes"] > table["rates"]["resident_bytes"] > 0 for row in rows)
    assert rows[1]["tok_s_local"] <= rows[2]["tok_s_local"]
    assert [row["raised"] for row in rows] == [True, False, False]
    assert main(["plan", "--model", model, "--expert-memory", "10%"]) == 0
    assert "* raised to the smallest budget that loads" in capsys.readouterr().out


def test_a_conversation_remembers_and_forgets(capsys: Capture, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nHi\n/reset\nHi\n/stats\n/fly\n/exit\nnever read\n"))
    assert main(["chat", "--model", model, "--max-new-tokens", "3", "--json"]) == 0
    output, errors = capsys.readouterr()
    replies = [json.loads(line) for line in output.splitlines()]
    assert len(replies) == 3
    assert replies[1]["prompt_tokens"] > replies[0]["prompt_tokens"] == replies[2]["prompt_tokens"]
    assert replies[0]["token_ids"] == replies[2]["token_ids"]
    assert "hits" in errors
    assert "no command /fly" in errors


def test_replayed_routing_is_marked_in_all_output(model: str, capsys: Capture, tmp_path: Path) -> None:
    trace = str(tmp_path / "trace")
    make_trace(Path(trace), 2, make_header(("weights", "probs"), active=3))
    given = ("generate", "Hello", "--model", model, "--max-new-tokens", "3", "--policy", "finemoe")
    assert answered(capsys, *given, "--json", "--replay-routing", trace)["replayed_routing"] == trace
    assert answered(capsys, *given, "--json")["replayed_routing"] is None
    assert main([*given, "--replay-routing", trace]) == 0
    assert f"routing replayed from {trace}" in capsys.readouterr().err
    named = refused(capsys, *given, "--replay-routing", trace, "--map-store", str(tmp_path / "maps"))
    assert named.startswith("--map-store: maps of replayed routing")
    assert "leave it out" in refused(capsys, *given, "--replay-routing", trace, "--prefill-chunk", "4")
    assert refused(capsys, *given, "--replay-routing", "nowhere") == "--replay-routing: nowhere: there is no such trace"
    assert "replay-routing" in refused(capsys, "chat", "--replay-routing", trace)
