"""The measurement of batching runs, and says what it should. What it measures here means nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving.fake_worker import FakeWorker
from tests.serving.serve import NAME, TEXT, live, make_app_state, say
from tests.tiny import Make

Scripts = Callable[[str], Any]
SIZES = ["--concurrent", "1", "3", "--jobs", "4", "--prompt-tokens", "5", "--new-tokens", "3"]


def run(scripts: Scripts, monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[dict[str, Any]]:
    """The rows that it writes."""
    monkeypatch.setattr(scripts("batching"), "end_as_by_ctrl_c", lambda: None)
    monkeypatch.setenv("FINEMOE_MAPS", "none")
    monkeypatch.setattr(sys, "argv", ["batching.py", *SIZES, *flags])
    scripts("batching").main()
    rows: list[dict[str, Any]] = json.loads(Path(flags[flags.index("--json") + 1]).read_text())["rows"]
    return rows


def test_the_script_measures_each_concurrency_against_generate(
    scripts: Scripts,
    tiny: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    subject = ["--model", str(tiny()), "--expert-memory", "60%", "--policy", "lru", "--json", str(tmp_path / "rows")]
    rows = run(scripts, monkeypatch, *subject)
    assert [(row["how"], row["concurrent"], row["batched"]) for row in rows] == [
        ("generate", 1, False),
        ("worker", 1, True),
        ("worker", 3, True),
    ]
    assert all(row["tok_s"] > 0 and row["bytes_read"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\nworker ") == 2


def test_the_script_measures_servers_that_batch_against_those_that_do_not(
    scripts: Scripts, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    @contextmanager
    def serve(flags: list[str]) -> Iterator[Any]:
        started.append(flags[flags.index("--max-running") + 1])
        worker = FakeWorker(say(TEXT))
        with live(make_app_state(worker)) as server:
            yield scripts("serve_process").ServerProcess(NAME, server.url, os.getpid(), 0.1)
        worker.close()

    monkeypatch.setattr(scripts("batching"), "serve_process", serve)
    rows = run(scripts, monkeypatch, "--http", "--model", str(tiny()), "--json", str(tmp_path / "rows"))
    assert started == ["1", "3"] * 2
    assert [(row["how"], row["concurrent"]) for row in rows] == [
        (how, clients) for clients in (1, 3) for how in ("one at a time", "server")
    ]
    assert [row["tokens"] for row in rows] == [4 * 3] * 4
    assert capsys.readouterr().out.count("\nserver ") == 2
