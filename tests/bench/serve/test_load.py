"""The load benchmark: when requests are sent, how they end, and what is computed from that."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finemoe.bench.serve import load
from finemoe.bench.serve.arrivals import LengthScale, TraceArrival, make_requests, read_arrivals, window
from finemoe.bench.serve.client import Client, RequestOutcome, TimedRequest, open_loop
from finemoe.bench.serve.server import ServerProcess
from finemoe.cli import main
from finemoe.errors import ConfigError
from tests.serving.fake_worker import FakeWorker
from tests.serving.serve import NAME, TEXT, TOKENIZER, live, make_app_state, say


@given(
    gaps_s=st.lists(st.floats(0.01, 50), min_size=2, max_size=40),
    rate=st.floats(0.05, 20),
    window_s=st.floats(0.5, 100),
)
@example(gaps_s=[1.0, 1.0, 1.0, 1.0, 2.0], rate=1 / 3, window_s=0.5000000000000001)  # an arrival at a window's edge
def test_consecutive_windows_lose_no_arrival(gaps_s: list[float], rate: float, window_s: float) -> None:
    times_s = [sum(gaps_s[:n]) for n in range(len(gaps_s) + 1)]
    trace = [TraceArrival(at_s, n, n) for n, at_s in enumerate(times_s)]
    length_s = len(gaps_s) / rate
    seen = []
    for number in range(math.ceil(length_s / window_s) + 1):
        found = window(trace, rate, number * window_s, (number + 1) * window_s)
        assert all(0 <= arrival.at_s <= window_s * (1 + 1e-9) for arrival in found)  # rounded
        seen += [arrival.context_tokens for arrival in found]
    assert seen == list(range(len(trace)))


def test_lengths_are_scaled_and_clipped_and_prompts_taken_in_turn() -> None:
    lengths = LengthScale(0.125, 0.25, 40, 32)
    trace = [TraceArrival(1.0, 160, 100), TraceArrival(2.0, 10_000, 1), TraceArrival(3.0, 3, 999)]

    def encode(text: str) -> list[int]:
        return list(text.encode())

    requests = make_requests(trace, ["a" * 15, "b" * 100], lengths, encode, lambda ids: bytes(ids).decode())
    assert [(request.at_s, len(request.prompt), request.max_tokens) for request in requests] == [
        (1.0, 20, 25),
        (2.0, 40, 4),
        (3.0, 8, 32),
    ]
    assert [request.prompt for request in requests] == ["a" * 15 + "\n\nbbb", "a" * 15 + "\n\n" + "b" * 23, "a" * 8]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ("TIME,TOKENS\n1,2\n", "lacks TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,1\n", "has no two requests"),
        (None, "can't be read"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(rows: str | None, named: str, tmp_path: Path) -> None:
    if rows is not None:
        (tmp_path / "trace.csv").write_text(rows)
    with pytest.raises(ConfigError, match=rf"^--arrivals: .* {named}"):
        read_arrivals(tmp_path / "trace.csv")


def sent(url: str, count: int, *, chat: bool = True) -> list[RequestOutcome]:
    outcomes: list[RequestOutcome] = []

    async def run() -> None:
        async with Client(url, NAME, chat=chat, timeout_s=20) as client:
            await open_loop(client, [TimedRequest("Hi", 64, 0.01 * n) for n in range(count)], outcomes.append)

    asyncio.run(run())
    return sorted(outcomes, key=lambda outcome: outcome.number)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_timed_from_when_they_were_due(chat: bool) -> None:
    worker = FakeWorker(say(TEXT))
    with live(make_app_state(worker)) as server:
        outcomes = sent(server.url, 3, chat=chat)
    worker.close()
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    for outcome in outcomes:
        assert outcome.tokens == len(TOKENIZER(TEXT)["input_ids"]) + 1
        assert outcome.ttft_s is not None and outcome.tpot_s is not None
        assert 0 <= outcome.late_s < outcome.ttft_s <= outcome.total_s
        assert outcome.tpot_s > 0


def test_refused_requests_and_timeouts_are_told_apart() -> None:
    worker = FakeWorker(say(TEXT))
    worker.may_step.clear()
    with live(make_app_state(worker, max_running=1, max_waiting=0, request_timeout_s=0.3)) as server:
        outcomes = sent(server.url, 2)
        worker.may_step.set()
    worker.close()
    assert sorted(outcome.status for outcome in outcomes) == ["refused", "timeout"]


def test_a_stream_that_breaks_off_is_lost() -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n"
        writer.write(head + b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n')
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def run() -> RequestOutcome:
        server = await asyncio.start_server(break_off, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Client(f"http://127.0.0.1:{port}", NAME, chat=True) as client:
            return await client.send(TimedRequest("Hi", 64))

    outcome = asyncio.run(run())
    assert outcome.status == "lost"
    assert outcome.ttft_s is not None and outcome.ttft_s > 0
    assert outcome.tpot_s is None


def test_goodput_counts_requests_within_both_limits() -> None:
    requests = [
        {"status": "finished", "tokens": 10, "ttft_s": 1.0, "tpot_s": 0.1},
        {"status": "finished", "tokens": 10, "ttft_s": 3.0, "tpot_s": 0.1},
        {"status": "finished", "tokens": 10, "ttft_s": 1.0, "tpot_s": 0.3},
        {"status": "finished", "tokens": 1, "ttft_s": 1.0, "tpot_s": None},
        {"status": "refused", "ttft_s": None, "tpot_s": None},
    ]
    cell = {"policy": "lru", "asked": 5, "requests": requests, "span_s": 10.0, "accesses": 100, "bytes_read": 31.0}
    rates = {"hit_rate": 0.5, "late_rate": 0.25, "miss_rate": 0.25, "stall_s": 2.0}
    row = load.summarise([cell | rates], 2.0, 0.2)
    assert (row["goodput"], row["goodput_tok_s"], row["tok_s"]) == (0.4, 1.1, 3.1)
    assert (row["finished"], row["refused"], row["lost"]) == (4, 1, 0)
    assert (row["hit_rate"], row["stall_share"], row["bytes_per_token"]) == (0.5, 0.2, 1.0)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags that name a tokenizer, prompts and arrivals in the current folder."""
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {n}\n" for n in range(10)))
    rows = [f"2023-11-16 18:15:{n:02d}.6805900,{40 * n},{20 * n}" for n in range(60)]
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    return ["--arrivals", "trace.csv", "--prompts", "prompts.txt", "--model", "model"]


def serve_fakes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces server processes by fake ones. Returns the flags of those started, in order."""
    started: list[list[str]] = []

    @contextmanager
    def serve(flags: list[str]) -> Iterator[ServerProcess]:
        started.append(flags)
        if flags[-1] != "none":
            Path(flags[-1]).touch()  # the maps that it saves
        worker = FakeWorker(say(TEXT))
        with live(make_app_state(worker)) as server:
            yield ServerProcess(NAME, server.url, os.getpid(), 0.1)
        worker.close()

    monkeypatch.setattr(load, "serve_process", serve)
    return started


@pytest.mark.usefixtures("own_process")
def test_policies_get_the_same_requests_and_all_is_written_down(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = serve_fakes(monkeypatch)
    sizes = ["--window-s", "0.2", "--repeats", "2", "--utilisation", "1", "--calibrate-requests", "4"]
    chosen = ["--policy", "lru,finemoe", "--warm-requests", "2", "--json", "out.json"]
    assert main(["bench", "serve", "load", *files, *sizes, *chosen]) == 0
    assert [flags[flags.index("--policy") + 1] for flags in started] == [
        "lru", "finemoe", "lru", "finemoe", "finemoe", "lru",
    ]  # fmt: skip
    document = json.loads(Path("out.json").read_text())
    cells = {(cell["policy"], cell["repeat"]): cell for cell in document["cells"]}
    for repeat in range(2):
        lru, finemoe = cells["lru", repeat], cells["finemoe", repeat]
        assert lru["asked"] == finemoe["asked"] == len(lru["requests"]) > 0
        requests = [sorted((row["at_s"], row["max_tokens"]) for row in cell["requests"]) for cell in (lru, finemoe)]
        assert requests[0] == requests[1]
    assert document["learned_from"] == "2 requests of other prompts"
    assert document["rate"] == document["calibration"]["requests_s"]
    table = capsys.readouterr().out
    assert table.count("\nlru ") == table.count("\nfinemoe ") == 1
    assert "Left out" not in table


@pytest.mark.usefixtures("own_process")
def test_an_interrupted_run_shows_what_it_has(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_fakes(monkeypatch)
    measure = load.LoadTest._measure

    def interrupted(self: Any, policy: str, *given: Any) -> None:
        if policy == "lfu":
            raise KeyboardInterrupt
        measure(self, policy, *given)

    monkeypatch.setattr(load.LoadTest, "_measure", interrupted)
    limits = ["--rate", "20", "--slo-ttft-s", "9", "--slo-tpot-s", "9", "--window-s", "0.2"]
    assert main(["bench", "serve", "load", *files, *limits, "--policy", "lru,lfu", "--json"]) == 130
    document = json.loads(capsys.readouterr().out)
    assert [cell["policy"] for cell in document["cells"]] == ["lru"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["load", "--prompts", "p"], "--arrivals: is needed"),
        (["load", "--arrivals", "a", "--prompts", "p", "--policy", ","], "--policy"),
        (["load", "--arrivals", "a", "--prompts", "p", "--policy", "lru,belady"], "belady"),
        (["load", "--arrivals", "a", "--prompts", "p", "--rate", "nan"], "--rate: nan is not above 0"),
        (["concurrency", "--clients", "1,many"], "--clients: '1,many' is not a list"),
        (["concurrency", "--policy", ""], "policy"),
        (["soak"], "--prompts: is needed"),
        (["overhead", "--new-tokens", "1"], "--new-tokens: 1 is not at least 2"),
        (["overhead", "--json", "nowhere/out.json"], "--json: there is no folder"),
    ],
)
@pytest.mark.usefixtures("own_process")
def test_bad_input_is_refused_by_the_name_of_its_flag(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *flags]) == 2
    assert re.search(re.escape(named), capsys.readouterr().err)


@pytest.mark.usefixtures("own_process")
def test_flags_of_bench_in_front_of_serve_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--baselines", "none", "serve", "overhead"]) == 2
    assert "--baselines: has no effect in front of serve" in capsys.readouterr().err
