"""The measurement of load: what is sent when, what becomes of it, and what is said of that."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.fake_worker import FakeWorker
from tests.serving.serve import NAME, TEXT, TOKENIZER, live, make_app_state, say

Scripts = Callable[[str], Any]


@given(
    gaps_s=st.lists(st.floats(0.01, 50), min_size=2, max_size=40),
    rate=st.floats(0.05, 20),
    window_s=st.floats(0.5, 100),
)
def test_windows_follow_each_other_and_lose_no_arrival(
    scripts: Scripts, gaps_s: list[float], rate: float, window_s: float
) -> None:
    arrivals = scripts("arrivals")
    times_s = [sum(gaps_s[:n]) for n in range(len(gaps_s) + 1)]
    trace = [arrivals.Arrival(at_s, n, n) for n, at_s in enumerate(times_s)]
    length_s = len(gaps_s) / rate
    seen = []
    for number in range(math.ceil(length_s / window_s) + 1):
        found = arrivals.window(trace, rate, number * window_s, window_s)
        assert all(0 <= arrival.at_s < window_s for arrival in found)
        seen += [arrival.context_tokens for arrival in found]
    assert seen == list(range(len(trace)))


def test_lengths_are_scaled_and_bounded_and_prompts_taken_in_turn(scripts: Scripts) -> None:
    arrivals = scripts("arrivals")
    lengths = arrivals.Lengths(0.125, 0.25, 40, 32)
    trace = [arrivals.Arrival(1.0, 160, 100), arrivals.Arrival(2.0, 10_000, 1), arrivals.Arrival(3.0, 3, 999)]

    def encode(text: str) -> list[int]:
        return list(text.encode())

    asks = arrivals.fill(trace, ["a" * 15, "b" * 100], lengths, encode, lambda ids: bytes(ids).decode())
    assert [(ask.prompt_tokens, ask.max_tokens) for ask in asks] == [(20, 25), (40, 4), (8, 32)]
    assert [ask.prompt for ask in asks] == ["a" * 15 + "\n\nbbb", "a" * 15 + "\n\n" + "b" * 23, "a" * 8]


def test_a_file_that_is_no_trace_is_told(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "no.csv").write_text("TIME,TOKENS\n1,2\n")
    with pytest.raises(SystemExit, match=r"--arrivals: .* lacks TIMESTAMP"):
        scripts("arrivals").read_arrivals(tmp_path / "no.csv")
    with pytest.raises(SystemExit, match=r"--arrivals: .* can't be read"):
        scripts("arrivals").read_arrivals(tmp_path / "absent.csv")


def asked(scripts: Scripts, url: str, count: int, *, chat: bool = True) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    async def run() -> None:
        async with scripts("asking").Asker(url, NAME, chat=chat, timeout_s=20) as asker:
            asks = [scripts("arrivals").Ask(0.01 * n, "Hi", 2, 64) for n in range(count)]
            await scripts("asking").play(asker, asks, rows.append)

    asyncio.run(run())
    return sorted(rows, key=lambda row: row["number"])


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_timed_from_when_they_were_due(scripts: Scripts, chat: bool) -> None:
    worker = FakeWorker(say(TEXT))
    with live(make_app_state(worker)) as server:
        rows = asked(scripts, server.url, 3, chat=chat)
    worker.close()
    assert [row["status"] for row in rows] == ["finished"] * 3
    for row in rows:
        assert row["tokens"] == len(TOKENIZER(TEXT)["input_ids"]) + 1
        assert 0 <= row["late_s"] < row["ttft_s"] <= row["total_s"]
        assert row["tpot_s"] > 0


def test_every_request_has_an_end_and_it_is_told_which(scripts: Scripts) -> None:
    worker = FakeWorker(say(TEXT))
    worker.may_step.clear()
    with live(make_app_state(worker, max_running=1, max_waiting=0, request_timeout_s=0.3)) as server:
        rows = asked(scripts, server.url, 2)
        worker.may_step.set()
    worker.close()
    assert sorted(row["status"] for row in rows) == ["refused", "timeout"]


def test_a_stream_that_breaks_off_is_lost(scripts: Scripts) -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n"
        writer.write(head + b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n')
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def run() -> dict[str, Any]:
        server = await asyncio.start_server(break_off, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, scripts("asking").Asker(f"http://127.0.0.1:{port}", NAME, chat=True) as asker:
            row: dict[str, Any] = await asker.ask(scripts("arrivals").Ask(0.0, "Hi", 2, 64))
        return row

    row = asyncio.run(run())
    assert row["status"] == "lost"
    assert row["ttft_s"] > 0
    assert "tpot_s" not in row


def test_only_what_kept_the_promise_is_good(scripts: Scripts) -> None:
    requests = [
        {"status": "finished", "tokens": 10, "ttft_s": 1.0, "tpot_s": 0.1, "late_s": 0.0},
        {"status": "finished", "tokens": 10, "ttft_s": 3.0, "tpot_s": 0.1, "late_s": 0.0},
        {"status": "finished", "tokens": 10, "ttft_s": 1.0, "tpot_s": 0.3, "late_s": 0.0},
        {"status": "finished", "tokens": 1, "ttft_s": 1.0, "late_s": 0.0},
        {"status": "refused", "late_s": 0.0},
    ]
    cell = {"policy": "lru", "asked": 5, "requests": requests, "span_s": 10.0, "accesses": 100, "bytes_read": 31.0}
    rates = {"hit_rate": 0.5, "late_rate": 0.25, "miss_rate": 0.25, "stall_s": 2.0}
    row = scripts("load").figures([cell | rates], 2.0, 0.2)
    assert (row["goodput"], row["goodput_tok_s"], row["tok_s"]) == (0.4, 1.1, 3.1)
    assert (row["finished"], row["refused"], row["lost"]) == (4, 1, 0)
    assert (row["hit_rate"], row["stall_share"], row["bytes_per_token"]) == (0.5, 0.2, 1.0)


def test_policies_get_the_same_requests_and_all_is_written_down(
    scripts: Scripts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[list[str]] = []

    @contextmanager
    def serve(flags: list[str]) -> Iterator[Any]:
        started.append(flags)
        if "--map-store" in flags and flags[-1] != "none":
            Path(flags[-1]).touch()  # what it learned
        worker = FakeWorker(say(TEXT))
        with live(make_app_state(worker)) as server:
            yield scripts("serve_process").ServerProcess(NAME, server.url, os.getpid(), 0.1)
        worker.close()

    monkeypatch.setattr(scripts("load"), "serve_process", serve)
    monkeypatch.setattr(scripts("load"), "end_as_by_ctrl_c", lambda: None)
    monkeypatch.setenv("FINEMOE_MAPS", "none")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {n}\n" for n in range(10)))
    rows = [f"2023-11-16 18:15:{n:02d}.6805900,{40 * n},{20 * n}" for n in range(60)]
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    out = tmp_path / "out.json"
    flags = ["--arrivals", "trace.csv", "--prompts", "prompts.txt", "--model", "model", "--policy", "lru,finemoe"]
    sizes = ["--window-s", "0.2", "--repeats", "2", "--utilisation", "1", "--calibrate-requests", "4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["load.py", *flags, *sizes, "--warm-requests", "2", "--json", str(out)])
    scripts("load").main()
    assert [flags[flags.index("--policy") + 1] for flags in started] == [
        "lru", "finemoe", "lru", "finemoe", "finemoe", "lru",
    ]  # fmt: skip
    report = json.loads(out.read_text())
    cells = {(cell["policy"], cell["repeat"]): cell for cell in report["cells"]}
    for repeat in range(2):
        lru, finemoe = cells["lru", repeat], cells["finemoe", repeat]
        assert lru["asked"] == finemoe["asked"] == len(lru["requests"]) > 0
        sent = [sorted((row["at_s"], row["max_tokens"]) for row in cell["requests"]) for cell in (lru, finemoe)]
        assert sent[0] == sent[1]
    assert report["learned_from"] == "2 requests of other prompts"
    assert report["rate"] == report["calibration"]["requests_s"]
    table = capsys.readouterr().out
    assert table.count("\nlru ") == table.count("\nfinemoe ") == 1
    assert "Left out" not in table
