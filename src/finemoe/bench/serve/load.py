"""A published trace's load: latencies, goodput and hit rate of several policies that get the same requests.

Each policy and repeat has a server of its own, with an empty pool. Prompts are split by a seed: 70% for calibration and
for what policies learn beforehand, 30% for the measurement.
"""

from __future__ import annotations

import asyncio
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

from finemoe.bench.serve.arrivals import LengthScale, make_requests, read_arrivals, window
from finemoe.bench.serve.client import STATUSES, Client, RequestOutcome, TimedRequest, closed_loop, open_loop
from finemoe.bench.serve.config import LoadTestConfig
from finemoe.bench.serve.scenario import Scenario, log, number
from finemoe.bench.serve.server import ServerProcess, expert_metrics, serve_process
from finemoe.bench.table import align
from finemoe.errors import BenchmarkError, ConfigError
from finemoe.model.generation import load_tokenizer
from finemoe.policy import policy_class
from finemoe.trace import split
from finemoe.trace.prompts import read_prompts

LEARNED_SHARE = 0.7  # of the prompts
CLIENTS = 4  # in flight during calibration and warm-up
ALONE = 4  # requests that measure an idle server; the first is not counted
DRAIN_SHARE = 0.25  # of a cell's time, for the answers in progress when the last request has arrived
T = TypeVar("T")


class LoadTest(Scenario):
    """The benchmark; see `Scenario`.

    The document's `cells` are one policy in one window each: `asked` requests, their outcomes in `requests`, `span_s`
    from the window's start to the last outcome, and the figures of `expert_metrics`.
    """

    def __init__(self, config: LoadTestConfig, out: Path | None = None) -> None:
        super().__init__(config, out)
        assert config.arrivals is not None and config.prompts is not None  # checked by the config
        self.config = config
        tokenizer = load_tokenizer(self.folder)
        self._chat = bool(tokenizer.chat_template)
        self._encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._decode = tokenizer.decode
        texts = read_prompts(Path(config.prompts)).texts
        learned, measured = split(len(texts), LEARNED_SHARE, config.seed)
        self._learned, self._measured = [texts[n] for n in learned], [texts[n] for n in measured]
        self._arrivals = read_arrivals(Path(config.arrivals))
        self._lengths = LengthScale(
            config.prompt_scale, config.answer_scale, config.max_prompt_tokens, config.max_output_tokens
        )
        self._start_s = 20.0  # of a server, until one has started
        self.document["settings"] |= {"chat": self._chat, "prompts_split": LEARNED_SHARE}
        self.document |= {name: getattr(config, name) for name in ("rate", "slo_ttft_s", "slo_tpot_s")}
        self.document |= {"learned_from": None, "cells": [], "left_out": []}

    @property
    def measured(self) -> bool:
        return any(cell["requests"] for cell in self.document["cells"])

    def run(self) -> None:
        config, document, policies = self.config, self.document, self.config.policies
        if None in {document[name] for name in ("rate", "slo_ttft_s", "slo_tpot_s")}:
            self._calibrate()
        with tempfile.TemporaryDirectory() as folder:
            stores = {policy: self._learn(policy, Path(folder)) for policy in policies}
            cells = [
                (repeat, policy)
                for repeat in range(config.repeats)
                for policy in _rotated(policies, repeat)  # so that no policy is always the first
            ]
            window_s = config.window_s or self._fitting_window_s(len(cells))
            document["window_s"] = window_s
            for at, (repeat, policy) in enumerate(cells):
                if config.limit_s - self.elapsed_s < window_s + self._start_s:
                    document["left_out"] = [f"{name}, repeat {n + 1}" for n, name in cells[at:]]
                    break
                self._measure(policy, repeat, window_s, stores[policy])

    def _fitting_window_s(self, cells: int) -> float:
        share_s = (self.config.limit_s - self.elapsed_s) / cells - self._start_s
        if share_s < 5:
            raise ConfigError(f"--limit-s: {self.config.limit_s:g} leaves no time for {cells} cells; give more")
        return (1 - DRAIN_SHARE) * share_s

    def _flags(self, policy: str, store: Path | None) -> list[str]:
        name, *own = shlex.split(policy)
        return [*self.server_flags(name, store), *own]

    def _unmeasured(self, count: int, first: int = 0) -> list[TimedRequest]:
        """Requests of the prompts that are not measured, with lengths from all over the trace."""
        every = max(1, len(self._arrivals) // count)
        chosen = self._arrivals[::every][:count]
        return make_requests(chosen, self._learned, self._lengths, self._encode, self._decode, first)

    def _run(self, server: ServerProcess, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        async def connected() -> T:
            timeout_s = self.config.limit_s
            async with Client(server.url, server.name, chat=self._chat, timeout_s=timeout_s) as client:
                return await work(client)

        return asyncio.run(connected())

    def _calibrate(self) -> None:
        """Throughput of four closed-loop clients, and latencies of requests alone, under the first policy."""
        requests = self._unmeasured(self.config.calibrate_requests + ALONE)
        policy = self.config.policies[0]

        async def measure(client: Client) -> tuple[list[RequestOutcome], list[RequestOutcome], float]:
            alone, _ = await closed_loop(client, requests[:ALONE], 1)
            together, seconds = await closed_loop(client, requests[ALONE:], CLIENTS)
            return alone[1:], together, seconds

        log(f"calibrating on {policy}, {len(requests)} requests")
        with serve_process(self._flags(policy, None)) as server:
            self._start_s = server.start_s
            alone, together, seconds = self._run(server, measure)
        ended = [outcome for outcome in together if outcome.status == "finished"]
        ttft_s = [outcome.ttft_s for outcome in alone if outcome.ttft_s is not None]
        tpot_s = [outcome.tpot_s for outcome in alone if outcome.tpot_s is not None]
        if not ended or not tpot_s:
            worst = next((outcome for outcome in (*alone, *together) if outcome.status != "finished"), None)
            raise BenchmarkError(f"calibration: requests did not finish, or had one token ({worst})")
        found = {
            "requests_s": len(ended) / seconds,
            "tok_s": sum(outcome.tokens for outcome in ended) / seconds,
            "alone_ttft_s": median(ttft_s),
            "alone_tpot_s": median(tpot_s),
        }
        chosen = {
            "rate": self.config.utilisation * found["requests_s"],
            "slo_ttft_s": 5 * found["alone_ttft_s"],
            "slo_tpot_s": 2 * found["alone_tpot_s"],
        }
        self.document["calibration"] = found
        self.document |= {name: value for name, value in chosen.items() if self.document[name] is None}
        self.write()

    def _learn(self, policy: str, folder: Path) -> Path | None:
        """The maps that a policy starts from; `None` if it learns nothing, or nothing beforehand."""
        config, name = self.config, shlex.split(policy)[0]
        if not policy_class(name).is_persistent or not (config.warm_requests or config.store):
            return None
        path = folder / f"{name.replace('/', '-')}.maps"
        if path.exists():  # of the same policy with other flags
            return path
        if config.store:
            log(f"{policy} learns from {config.store}")
            command = ["maps", "learn", config.store, "--policy", name.partition("/")[0], "--out", str(path)]
            learn = subprocess.run(
                [sys.executable, "-m", "finemoe", *command], check=False, capture_output=True, text=True
            )
            if learn.returncode:
                raise BenchmarkError(f"--store: {' '.join(learn.stderr.split())[-500:]}")
            self.document["learned_from"] = config.store
            return path
        log(f"{policy} learns from {config.warm_requests} requests")
        requests = self._unmeasured(config.warm_requests, len(self._learned) // 2)
        with serve_process(self._flags(policy, path)) as server:
            self._start_s = server.start_s
            outcomes, _ = self._run(server, lambda client: closed_loop(client, requests, CLIENTS))
        ended = sum(outcome.status == "finished" for outcome in outcomes)
        self.document["learned_from"] = f"{ended} requests of other prompts"
        return path

    def _measure(self, policy: str, repeat: int, window_s: float, store: Path | None) -> None:
        """One cell: all requests of a window, to a policy's own server."""
        begin_s, end_s = (self.config.skip_s + n * window_s for n in (repeat, repeat + 1))
        arrivals = window(self._arrivals, self.document["rate"], begin_s, end_s)
        first = repeat * len(self._measured) // 2
        requests = make_requests(arrivals, self._measured, self._lengths, self._encode, self._decode, first)
        cell: dict[str, Any] = {"policy": policy, "repeat": repeat, "asked": len(requests), "requests": []}
        self.document["cells"].append(cell)
        log(f"{policy}, repeat {repeat + 1}: {len(requests)} requests in {window_s:.0f} s")

        def on_outcome(outcome: RequestOutcome) -> None:
            cell["requests"].append(asdict(outcome))
            cell["span_s"] = time.perf_counter() - start_s
            self.write()
            done = f"{len(cell['requests'])} of {len(requests)}"
            log(f"{policy}: {done}, {outcome.status} after {outcome.total_s:.1f} s")

        own = None
        if store is not None and store.exists():
            own = Path(shutil.copy(store, store.with_suffix(".own")))  # the server adds to it
        with serve_process(self._flags(policy, own)) as server:
            before, start_s = server.metrics(), time.perf_counter()
            try:
                self._run(server, lambda client: open_loop(client, requests, on_outcome))
            finally:
                with suppress(OSError):  # the server may have failed
                    cell |= expert_metrics(before, server.metrics())
        self.write()

    def table(self) -> str:
        return render(self.document)


def _rotated(names: Sequence[str], by: int) -> Iterable[str]:
    at = by % len(names)
    return [*names[at:], *names[:at]]


def summarise(cells: Sequence[dict[str, Any]], slo_ttft_s: float, slo_tpot_s: float) -> dict[str, Any]:
    """All cells of one policy in one row. Percentiles are over requests; rates over the cells' time together.

    `goodput` is the share of all requests that finished within both limits.
    """
    requests = [row for cell in cells for row in cell["requests"]]
    span_s = sum(cell.get("span_s", 0.0) for cell in cells)
    ended = [row for row in requests if row["status"] == "finished"]
    good = [row for row in ended if row["ttft_s"] <= slo_ttft_s and (row["tpot_s"] or 0.0) <= slo_tpot_s]
    accesses = sum(cell.get("accesses", 0) for cell in cells)
    tokens = sum(row["tokens"] for row in ended)
    row: dict[str, Any] = {
        "asked": sum(cell["asked"] for cell in cells),
        "tok_s": tokens / span_s if span_s else None,
        "goodput": len(good) / len(requests) if requests else None,
        "goodput_tok_s": sum(row["tokens"] for row in good) / span_s if span_s else None,
        "stall_share": sum(cell.get("stall_s", 0.0) for cell in cells) / span_s if span_s else None,
        "bytes_per_token": sum(cell.get("bytes_read", 0.0) for cell in cells) / tokens if tokens else None,
    }
    for name in ("ttft_s", "tpot_s"):
        values = [row[name] for row in requests if row[name] is not None]
        for q in (50, 95, 99):
            row[f"{name}_p{q}"] = float(np.percentile(values, q)) if values else None
    for result in ("hit", "late", "miss"):
        counted = sum(cell[f"{result}_rate"] * cell["accesses"] for cell in cells if cell.get("accesses"))
        row[f"{result}_rate"] = counted / accesses if accesses else None
    return row | {status: sum(one["status"] == status for one in requests) for status in STATUSES}


def render(document: dict[str, Any]) -> str:
    """The document as a table, with the settings that it was measured under."""
    given = document["settings"]
    head = (
        "policy", "asked", "TTFT p50 s", "p95", "p99", "TPOT p50 ms", "p95", "p99", "tok/s", "good", "good tok/s",
        "hit / late / miss", "stall", "MiB/tok", "refused", "timeout", "error", "lost",
    )  # fmt: skip
    rows = [head]
    for policy in dict.fromkeys(cell["policy"] for cell in document["cells"]):
        cells = [cell for cell in document["cells"] if cell["policy"] == policy]
        row = summarise(cells, document["slo_ttft_s"], document["slo_tpot_s"])
        rates = [row[f"{result}_rate"] for result in ("hit", "late", "miss")]
        rows.append((
            policy, str(row["asked"]),
            *(number(row[f"ttft_s_p{q}"], ".2f") for q in (50, 95, 99)),
            *(number(row[f"tpot_s_p{q}"], ".0f", 1000) for q in (50, 95, 99)),
            number(row["tok_s"], ".2f"), number(row["goodput"], ".0%"), number(row["goodput_tok_s"], ".2f"),
            "-" if None in rates else " / ".join(f"{100 * rate:.1f}" for rate in rates) + "%",
            number(row["stall_share"], ".0%"), number(row["bytes_per_token"], ".1f", 1 / (1 << 20)),
            *(str(row[status]) for status in STATUSES[1:]),
        ))  # fmt: skip
    throughput = document.get("calibration", {}).get("requests_s")
    found = f"; four closed-loop clients got {throughput:.3f} requests/s" if throughput else ""
    lines = [
        f"model    {given['model']}, {given['expert_memory']} of the experts",
        f"load     {Path(given['arrivals']).name} at {document['rate']:.3f} requests/s{found}",
        f"windows  {given['repeats']} of {document.get('window_s', 0):.0f} s",
        f"prompts  {Path(given['prompts']).name}, {'chat' if given['chat'] else 'completions'}, greedy, streamed",
        f"lengths  contexts x {given['prompt_scale']:g}, at most {given['max_prompt_tokens']} tokens;",
        f"         answers x {given['answer_scale']:g}, at most {given['max_output_tokens']}",
        f"maps     learning policies started from {document['learned_from'] or 'nothing'}",
        "",
        *align(rows),
        "",
    ]
    if document["left_out"]:
        lines.append(f"Left out, --limit-s: {', '.join(document['left_out'])}.")
    limits = f"{document['slo_ttft_s']:.2f} s, TPOT at most {1000 * document['slo_tpot_s']:.0f} ms"
    lines += [
        f"good: share of all requests with TTFT at most {limits}.",
        "TTFT counts from when a request was due; TPOT is a request's mean. stall: share of the measured time.",
    ]
    return "\n".join(lines)
