"""The comparison's command line, and a run of the engines that need no environment of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.errors import ConfigError
from tests.chat_model import make_chat_model
from tests.peers.conftest import Script
from tests.tiny import eager

FLAGS = ["--envs", "e", "--work", "w"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--peers", "vllm"], "--peers: 'vllm' is not one of finemoe,"),
        (["--memory", "25%"], "--memory: can't read '25%'"),
        (["--memory", "much"], "--memory: can't read 'much'"),
        (["--new-tokens", "1"], "--new-tokens: 1 is not at least 2"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_flag(script: Script, flags: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        script("run").parse([*FLAGS, *flags])
    assert str(refused.value).startswith(named)


def test_memory_is_bytes_or_none(script: Script) -> None:
    run = script("run")
    assert run.parse([*FLAGS, "--memory", "1.5GiB"]).memory_bytes == 3 << 29
    assert run.parse([*FLAGS, "--memory", "none"]).memory_bytes is None


def test_unknown_flags_are_refused(script: Script) -> None:
    with pytest.raises(SystemExit):
        script("run").parse([*FLAGS, "--mem", "1GiB"])


def test_the_reason_of_a_failed_process_is_one_line(script: Script) -> None:
    last_line = script("run").last_line
    assert last_line("Traceback\nValueError: no\n\n", 2) == "ValueError: no"
    assert "killed" in last_line("x", -9)
    assert last_line("", 3) == "ended with exit status 3"


def test_prompts_are_read_and_missing_ones_named(script: Script, tmp_path: Path) -> None:
    run, folder = script("run"), make_chat_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"--prompts: .*prompts\.txt: can't be read"):
        run.read_prompts(folder, None, 4)
    (folder / "prompts.txt").write_text("Hello\n\nYou\nThey\n")
    assert [len(ids) for ids in run.read_prompts(folder, None, 2)] == [17 + 5, 17 + 3]
    (folder / "prompts.txt").write_text("\n")
    with pytest.raises(ConfigError, match="has no prompt"):
        run.read_prompts(folder, None, 2)


def test_a_peer_is_timed_token_by_token_and_fails_in_one_line(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = script("peer")

    def load(_: Any) -> Callable[[list[int]], Iterator[int]]:
        return lambda prompt: iter(range(len(prompt), 100))

    order, result = tmp_path / "order.json", tmp_path / "result.json"
    content = {"model": "m", "work": "w", "prompts": [[7], [7, 7]], "new_tokens": 3, "threads": 1}
    order.write_text(json.dumps(content))
    assert peer.main(peer.Peer("x", (), "pytest", load), ["run", str(order), str(result)]) == 0
    found = peer.Result.from_dict(json.loads(result.read_text()))
    assert [answer.tokens for answer in found.answers] == [[1, 2, 3], [2, 3, 4]]
    assert [len(answer.seconds) for answer in found.answers] == [3, 3]
    assert found.version == pytest.__version__
    assert found.peak_rss_bytes > 1 << 20

    def fail(_: Any) -> Any:
        raise RuntimeError("no such thing\nas this")

    assert peer.main(peer.Peer("x", (), "pytest", fail), ["run", str(order), str(result)]) == 2
    assert capsys.readouterr().err.strip() == "RuntimeError: no such thing"
    assert peer.main(peer.Peer("x", (), "pytest", fail), ["install", str(tmp_path)]) == 0


@pytest.mark.slow
def test_engines_of_the_same_environment_are_compared(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = script("run"), make_chat_model(tmp_path / "model")
    (folder / "prompts.txt").write_text("Hello\nYou\n")
    given = ["--model", str(folder), "--envs", str(tmp_path / "envs"), "--work", str(tmp_path / "work")]
    given += ["--memory", "none", "--peers", "finemoe,llama.cpp", "--new-tokens", "3", "--threads", "1"]
    assert run.main([*given, "--json", str(tmp_path / "out.json")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    whole, ours, absent = document["rows"]
    assert [row["tokens_equal"] for row in (whole, ours, absent)] == [True, True, None]
    assert "not installed; --install" in absent["error"]
    assert "llama.cpp: not installed" in capsys.readouterr().out
    ids = torch.tensor([document["order"]["prompts"][0]])
    wanted = eager(folder).generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert ours["measured"]["answers"][0]["tokens"] == wanted[0, ids.shape[1] :].tolist()


def test_a_missing_model_is_one_line(script: Script, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert script("run").main([*FLAGS, "--model", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("run.py: error: ")
    assert sys.executable
