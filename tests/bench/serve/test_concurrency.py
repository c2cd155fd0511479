"""The concurrency benchmark runs and reports its rows. The figures of a fake server mean nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finemoe.bench.serve import concurrency
from finemoe.bench.serve.server import ServerProcess
from finemoe.cli import main
from tests.serving.fake_worker import FakeWorker
from tests.serving.serve import NAME, TEXT, live, make_app_state, say
from tests.tiny import Make


@pytest.mark.usefixtures("own_process")
def test_servers_that_batch_are_measured_against_those_that_do_not(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    @contextmanager
    def serve(flags: list[str]) -> Iterator[ServerProcess]:
        started.append(flags[flags.index("--max-running") + 1])
        worker = FakeWorker(say(TEXT))
        with live(make_app_state(worker)) as server:
            yield ServerProcess(NAME, server.url, os.getpid(), 0.1)
        worker.close()

    monkeypatch.setattr(concurrency, "serve_process", serve)
    sizes = ["--clients", "1,3", "--requests", "4", "--prompt-tokens", "5", "--new-tokens", "3"]
    out = tmp_path / "out.json"
    assert main(["bench", "serve", "concurrency", *sizes, "--model", str(tiny()), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert started == ["1", "3"] * 2
    assert [(row["how"], row["concurrent"]) for row in rows] == [
        (how, clients) for clients in (1, 3) for how in ("one at a time", "server")
    ]
    assert [row["tokens"] for row in rows] == [4 * 3] * 4
    assert capsys.readouterr().out.count("\nserver ") == 2
