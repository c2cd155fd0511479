"""What serving costs: time per token through HTTP, by the worker without HTTP, and by `generate`.

The same prompts, one at a time, greedy, on one loaded model, by each way in turn: `generate` as transformers runs it;
`worker`, the server's model thread; `http`, streamed completions to a client in a process of its own. Their order
changes from round to round. The live page's counters start with the first server, and run for all three from then on.

A ratio compares the same prompt in the same round; shown are medians, with 95% intervals by bootstrap.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from finemoe.bench.serve.client import complete
from finemoe.bench.serve.config import OverheadConfig
from finemoe.bench.serve.scenario import Scenario, log, number, prompt_ids
from finemoe.bench.serve.server import serving
from finemoe.bench.table import align
from finemoe.errors import BenchmarkError
from finemoe.model import load_config as load
from finemoe.serving.app import Service
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Finished, Job, Token

GENERATE, WORKER, HTTP = WAYS = ("generate", "worker", "http")
GOAL = 1.03  # of HTTP, times generate
WARM_UP_TOKENS = 4
Timed = dict[str, Any]  # tokens, ttft_s; tpot_s of more than one token


class Overhead(Scenario):
    """The benchmark; see `Scenario`. The document's `rows` are answers: `way`, `round`, `prompt`, and their times.

    Args:
        config: its settings.
        out: file to write the document to.
        executor: runs the HTTP client; `None`: a process of its own.
    """

    def __init__(self, config: OverheadConfig, out: Path | None = None, executor: Executor | None = None) -> None:
        super().__init__(config, out)
        self.config = config
        self._prompts = prompt_ids(self.folder, config.prompts, config.prompts_limit, config.prompt_tokens)
        self._executor = executor or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.document["rows"] = []

    @property
    def measured(self) -> bool:
        return bool(self.document["rows"])

    def run(self) -> None:
        with self._executor, load(self.load_config()) as model:
            for turn in range(self.config.repeats):
                halves = [self._measure_generate, self._measure_server]
                for half in halves if turn % 2 == 0 else halves[::-1]:
                    half(model, turn)
                if self.elapsed_s > self.config.limit_s:
                    log(f"--limit-s: ends after {turn + 1} rounds")
                    return

    def _measure_generate(self, model: Any, turn: int) -> None:
        by_generate(model, self._prompts[0], WARM_UP_TOKENS)
        for n, prompt in enumerate(self._prompts):
            self._add(GENERATE, turn, n, by_generate(model, prompt, self.config.new_tokens))

    def _measure_server(self, model: Any, turn: int) -> None:
        config = ServeConfig(
            port=0,
            cache_bytes=self.config.cache_bytes,
            max_output_tokens=max(ServeConfig.max_output_tokens, self.config.new_tokens),
        )
        with serving(model, config) as (service, url):
            ways: dict[str, Callable[[list[int], int], Timed]] = {
                HTTP: lambda prompt, tokens: self._by_http(url, service.app_state.served.name, prompt, tokens),
                WORKER: lambda prompt, tokens: by_worker(service, prompt, tokens),
            }
            for way in ways.values():
                way(self._prompts[0], WARM_UP_TOKENS)
            for n, prompt in enumerate(self._prompts):
                for name in sorted(ways, reverse=bool((n + turn) % 2)):
                    self._add(name, turn, n, ways[name](prompt, self.config.new_tokens))

    def _by_http(self, url: str, model: str, prompt: list[int], new_tokens: int) -> Timed:
        outcome = self._executor.submit(complete, url, model, prompt, new_tokens).result()
        if outcome.status != "finished":
            raise BenchmarkError(f"a request was not finished, but {outcome.status} ({outcome.message})")
        row: Timed = {"ttft_s": outcome.ttft_s, "tokens": outcome.tokens}
        return row if outcome.tpot_s is None else row | {"tpot_s": outcome.tpot_s}

    def _add(self, way: str, turn: int, prompt: int, row: Timed) -> None:
        self.document["rows"].append({"way": way, "round": turn, "prompt": prompt} | row)
        log(f"round {turn + 1}, prompt {prompt + 1}, {way}: {number(row.get('tpot_s'), '.2f', 1000)} ms per token")
        self.write()

    def table(self) -> str:
        return render(self.document)


class _TokenTimes(BaseStreamer):
    """Notes when each token of `generate` arrives; the first call is the prompt's."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, _value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None: ...


def by_generate(model: Any, prompt: list[int], new_tokens: int) -> Timed:
    """Times of one greedy answer by transformers' `generate`."""
    ids, times = torch.tensor([prompt]), _TokenTimes()
    start_s = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_p=None, top_k=None,
        max_new_tokens=new_tokens, pad_token_id=0, streamer=times,
    )  # fmt: skip
    return _timed(start_s, times.times_s[1:])


def by_worker(service: Service, prompt: list[int], new_tokens: int) -> Timed:
    """Times of one greedy answer by the server's worker."""
    times_s: list[float] = []
    ended = threading.Event()

    def listen(_name: str, event: Token | Finished) -> None:
        if isinstance(event, Token):
            times_s.append(time.perf_counter())
        else:
            ended.set()

    start_s = time.perf_counter()
    service.worker.submit(Job("overhead", prompt, new_tokens, stop=service.app_state.served.stop_ids), listen)
    ended.wait()
    return _timed(start_s, times_s)


def _timed(start_s: float, times_s: list[float]) -> Timed:
    row: Timed = {"ttft_s": times_s[0] - start_s, "tokens": len(times_s)}
    return row | ({"tpot_s": (times_s[-1] - times_s[0]) / (len(times_s) - 1)} if len(times_s) > 1 else {})


def ratios(rows: list[dict[str, Any]], way: str, base: str) -> list[float]:
    """TPOT of one way over another's, of the same prompt in the same round."""
    tpot_s = {(row["way"], row["round"], row["prompt"]): row["tpot_s"] for row in rows if "tpot_s" in row}
    return [s / tpot_s[base, *at] for (name, *at), s in tpot_s.items() if name == way and (base, *at) in tpot_s]


def interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the median, by bootstrap."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(low), float(high)


def render(document: dict[str, Any]) -> str:
    """A line for each way."""
    rows, given = document["rows"], document["settings"]
    lines: list[tuple[str, ...]] = [("", "answers", "TTFT p50 ms", "TPOT p50 ms", f"x {GENERATE}", f"x {WORKER}")]
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        if own:
            tpot_s = [row["tpot_s"] for row in own if "tpot_s" in row]
            lines.append((
                way, str(len(own)), number(median(row["ttft_s"] for row in own), ".1f", 1000),
                number(median(tpot_s) if tpot_s else None, ".2f", 1000),
                *(_ratio(ratios(rows, way, base) if way != base else []) for base in (GENERATE, WORKER)),
            ))  # fmt: skip
    found = ratios(rows, HTTP, GENERATE)
    goal = f"; {'met' if median(found) <= GOAL else 'MISSED'}" if found else ""
    return "\n".join([
        f"model {given['model']}, {given['expert_memory']} of the experts, {given['policy']}",
        "",
        *align(lines),
        "",
        "x: TPOT's ratio for the same prompt in the same round, median and its 95% interval.",
        f"Goal: http at most {GOAL:g} x generate{goal}.",
    ])  # fmt: skip


def _ratio(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = interval(values)
    return f"{median(values):.3f} ({low:.3f} to {high:.3f})"
