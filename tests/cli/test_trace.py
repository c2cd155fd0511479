"""`finemoe trace` and `finemoe record`, as a user meets them."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemoe.cli import INTERRUPTED, main
from finemoe.trace import TraceWriter, open_trace
from finemoe.trace.recorder import Recorder
from tests.chat_model import make_chat_model
from tests.cli.test_commands import Capture, answered, refused
from tests.trace.make import make_header, make_request, make_trace
from tests.trace.test_importing import arrays, simllm, write_lines

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_chat_model(tmp_path_factory.mktemp("cli") / "tiny"))


@pytest.fixture
def trace(tmp_path: Path) -> str:
    make_trace(tmp_path / "it.trace", header=make_header(("weights", "probs", "lookahead")))
    return str(tmp_path / "it.trace")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    lines = [{"question": question} for question in ("Hi", "What is photosynthesis?", "Why?", "Name a colour.")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "prompts.jsonl")


def test_info_tells_what_is_there_and_what_is_missing(capsys: Capture, trace: str) -> None:
    table = answered(capsys, "trace", "info", trace, "--json")
    assert (table["model"], table["requests"], table["tokens"], table["layers"]) == ("a-model", 3, 18, 3)
    assert table["missing"] == ["batch", "embeddings"]
    assert main(["trace", "info", trace]) == 0
    output = capsys.readouterr().out
    assert "3 requests, 15 iterations, 18 tokens" in output
    assert "not recorded: batch, embeddings" in output


def test_head_shows_rows(capsys: Capture, trace: str) -> None:
    table = answered(capsys, "trace", "head", trace, "--rows", "2", "--request", "1", "--json")
    assert len(table["rows"]) == 2
    with open_trace(trace) as opened:
        ids = opened.request(1).expert_ids[1, 2]
    assert table["rows"][1]["expert_ids"][2] == [int(expert) for expert in ids if expert < 8]
    assert main(["trace", "head", trace]) == 0
    assert "iteration 0 (prefill), token" in capsys.readouterr().out


def test_stats_measure_and_draw(capsys: Capture, trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "it.png"
    table = answered(capsys, "trace", "stats", trace, "--plot", str(plot), "--json")
    assert set(table["popularity"]) == {"top_10%", "top_25%", "top_50%"}
    assert len(table["lookahead_recall"]) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["it.png", "it.trace"]
    assert main(["trace", "stats", trace]) == 0
    assert "recall of the lookahead" in capsys.readouterr().out


def test_a_plot_without_matplotlib_names_the_extra(
    capsys: Capture, trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importing = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    message = refused(capsys, "trace", "stats", trace, "--plot", str(tmp_path / "it.png"))
    assert "pip install 'finemoe[plots]'" in message


def test_arrays_are_imported(capsys: Capture, tmp_path: Path) -> None:
    source, target = arrays(tmp_path / "m"), tmp_path / "it.trace"
    assert main(["trace", "import", str(source), "--out", str(target), "--licence", "MIT"]) == 0
    output, errors = capsys.readouterr()
    assert "2 requests" in output
    assert "licence: MIT" in output
    assert "--experts" in errors
    assert "--force" in refused(capsys, "trace", "import", str(source), "--out", str(target))
    table = answered(capsys, "trace", "import", str(source), "--out", str(target), "--force", "--json")
    assert table["vocabulary_size"] == 3


def test_simllm_traces_are_imported(capsys: Capture, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "run.jsonl", simllm())
    table = answered(capsys, "trace", "import", str(source), "--out", str(tmp_path / "it.trace"), "--json")
    assert (table["requests"], table["decode_only"], table["model"]) == (2, False, "org/a-moe")


def record(model: str, prompts: str, out: Path, *flags: str) -> list[str]:
    chosen = ["--model", model, "--prompts", prompts, "--out", str(out), "--expert-memory", "50%"]
    return ["record", *chosen, "--max-new-tokens", "4", *flags]


def test_record_appends_and_replaces(capsys: Capture, model: str, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "it.trace"
    flags = record(model, prompts, out, "--limit", "3", "--batch-size", "2", "--lookahead", "1")
    table = answered(capsys, *flags, "--json")
    assert (table["recorded"], table["requests"]) == (3, 3)
    assert table["fields"] == ["batch", "weights", "probs", "embeddings", "lookahead"]
    assert "--append" in refused(capsys, *flags)
    assert answered(capsys, *flags, "--append", "--json")["requests"] == 6
    with open_trace(out) as trace:
        assert [request.batch for request in trace] == [0, 0, 2, 3, 3, 5]
        assert trace.header.settings["prompts"] == "prompts.jsonl"
        assert (trace.request(0).expert_ids == trace.request(3).expert_ids).all()
    assert answered(capsys, *flags, "--force", "--json")["requests"] == 3
    assert main([*flags[:-2], "--append"]) == 2
    assert "can't be appended to (lookahead: " in capsys.readouterr().err


def test_prompts_that_are_too_long_are_left_out_and_counted(
    capsys: Capture, model: str, prompts: str, tmp_path: Path
) -> None:
    flags = record(model, prompts, tmp_path / "it.trace", "--max-prompt-tokens", "30")
    assert main([*flags, "--json"]) == 0
    output, errors = capsys.readouterr()
    assert json.loads(output)["recorded"] == 2
    assert "longer than 30 tokens: 2" in errors
    assert "--prompts" in refused(capsys, *flags[:-1], "3", "--force")


def test_ctrl_c_keeps_the_finished_requests(
    capsys: Capture, model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = Recorder.record, [0]

    def interrupted(recorder: Recorder, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return whole(recorder, *arguments, **options)

    monkeypatch.setattr(Recorder, "record", interrupted)
    out = tmp_path / "it.trace"
    assert main(record(model, prompts, out)) == INTERRUPTED
    assert "holds the 2 finished requests" in capsys.readouterr().err
    with open_trace(out) as trace:
        assert len(trace) == 2
    assert not (tmp_path / "it.trace.partial").exists()


def test_a_trace_is_said_to_keep_requests_only_if_it_does(
    capsys: Capture, model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: TraceWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceWriter, "_assemble", full)
    assert main(record(model, prompts, tmp_path / "it.trace", "--limit", "2")) == 2
    errors = capsys.readouterr().err
    assert "the finished requests are in" in errors
    assert "holds the" not in errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trace"], "ACTION"),
        (["trace", "fly"], "fly"),
        (["trace", "info", "/no/where"], "no such trace"),
        (["trace", "head", "TRACE", "--rows", "0"], "--rows"),
        (["trace", "head", "TRACE", "--request", "3"], "--request"),
        (["trace", "stats", "TRACE", "--plot", "/no/where/it.png"], "--plot"),
        (["trace", "stats", "TRACE", "--plot", "it.nonsense"], "--plot"),
        (["trace", "stats", "TRACE", "--sort"], "--sort"),
        (["trace", "import", "/no/where", "--out", "it"], "no such file"),
        (["trace", "import", "/no/where"], "--out"),
        (["trace", "train", "TRACE", "--out", "no/it"], "--out: there is no folder"),
        (["record", "--prompts", "TRACE", "--out", ".", "--force"], "is a folder"),
        (["trace", "import", "TRACE", "--out", "it", "--experts", "0"], "--experts"),
        (["trace", "import", "TRACE", "--out", "it"], "known are"),
        (["record", "--out", "it"], "--prompts"),
        (["record", "--prompts", "/no/where", "--out", "/no/where"], "no folder"),
        (["record", "--prompts", "/no/where", "--out", "it"], "--prompts"),
        (["record", "--prompts", "TRACE", "--out", "TRACE"], "--force"),
        (["record", "--prompts", "TRACE", "--out", "it", "--batch-size", "0"], "--batch-size"),
        (["record", "--prompts", "TRACE", "--out", "it", "--append", "--force"], "--force"),
        (["record", "--prompts", "TRACE", "--out", "it", "--lookahead", "-1"], "--lookahead"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(
    capsys: Capture, trace: str, arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    given = [trace if argument == "TRACE" else argument for argument in arguments]
    assert named in refused(capsys, *given)
    assert [each.name for each in tmp_path.iterdir()] == ["it.trace"]


def test_importing_the_command_needs_no_torch(trace: str) -> None:
    command = f"main(['trace', 'info', {trace!r}])"
    check = f"import sys; from finemoe.cli import main; {command}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


def test_a_trace_that_a_killed_recording_has_not_written_yet_says_what_waits(capsys: Capture, tmp_path: Path) -> None:
    header, out = make_header(), tmp_path / "it.trace"
    writer = TraceWriter(out, header)
    for _ in range(2):
        writer.add(make_request(header, np.random.default_rng(0)))
    writer._spool.commit()
    writer._spool.close()  # and no more, as by a kill
    error = refused(capsys, "trace", "info", str(out))
    assert "there is no such trace, but 2 finished requests" in error
    assert f"finemoe record --append --out {out} resumes it" in error
    with TraceWriter(out, header, append=True) as again:
        assert len(again) == 2
    assert len(open_trace(out)) == 2
