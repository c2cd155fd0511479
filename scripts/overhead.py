"""What serving costs: time per token of one client through HTTP, of the batching worker alone, and of `generate`.

    python scripts/overhead.py --prompts FILE [--model FOLDER] [--expert-memory all] [--repeats 5] [--json OUT]

The same prompts, one at a time, greedy, on one loaded model: `generate` as transformers runs it; `worker`, the
server's model thread without HTTP; `http`, OpenAI's client in a process of its own that streams completions from the
server. They take turns, in an order that changes from round to round. All experts in memory isolate what is the
server's; `--expert-memory 25% --policy lru` shows what remains of it where experts are read.

A ratio is of the same prompt in the same round; shown are medians, and 95% intervals of them by bootstrap. The live
page's counting of every expert begins with the first server, and then goes on for all three.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from asking import ask_alone
from serve_here import Parts, running, server_parts
from serve_process import align, end_as_by_ctrl_c, number, tell, write_whole
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import finemoe
from finemoe.serving.config import ServeConfig
from finemoe.serving.job import Finished, Job, Token
from finemoe.trace.prompts import read_prompts

WAYS = ("generate", "worker", "http")
GOAL = 1.03  # of http against generate
Timed = dict[str, Any]


class _Times(BaseStreamer):
    """When each token came; the prompt is told first."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, _value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None: ...


def timed(start_s: float, times_s: list[float]) -> Timed:
    """Of a single token there is no TPOT."""
    row: Timed = {"ttft_s": times_s[0] - start_s, "tokens": len(times_s)}
    return row | ({"tpot_s": (times_s[-1] - times_s[0]) / (len(times_s) - 1)} if len(times_s) > 1 else {})


def by_generate(model: Any, prompt: list[int], new_tokens: int) -> Timed:
    ids, times = torch.tensor([prompt]), _Times()
    start_s = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_p=None, top_k=None,
        max_new_tokens=new_tokens, pad_token_id=0, streamer=times,
    )  # fmt: skip
    return timed(start_s, times.times_s[1:])


def by_worker(parts: Parts, prompt: list[int], new_tokens: int) -> Timed:
    times_s: list[float] = []
    ended = threading.Event()

    def listen(_name: str, news: Token | Finished) -> None:
        if isinstance(news, Token):
            times_s.append(time.perf_counter())
        else:
            ended.set()

    start_s = time.perf_counter()
    parts.worker.submit(Job("alone", prompt, new_tokens, stop=parts.house.served.stop_ids), listen)
    ended.wait()
    return timed(start_s, times_s)


class Overhead:
    """One run of the program."""

    def __init__(self, given: argparse.Namespace, client: ProcessPoolExecutor) -> None:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        texts = read_prompts(Path(given.prompts), limit=given.prompts_limit).texts
        self.prompts = [tokenizer(text)["input_ids"][: given.prompt_tokens] for text in texts]
        self.given = given
        self.client = client
        self.begin_s = time.perf_counter()
        self.report: dict[str, Any] = {"settings": vars(given), "rows": []}

    def run(self) -> None:
        given = self.given
        config = ServeConfig(port=0, cache_bytes=given.cache_bytes, max_output_tokens=max(2048, given.new_tokens))
        with finemoe.load(
            given.model, expert_memory=given.expert_memory, policy=given.policy, map_store="none"
        ) as model:
            for turn in range(given.repeats):
                rounds: list[Callable[[], None]] = [
                    lambda turn=turn: self.alone(model, turn),
                    lambda turn=turn: self.serving(model, config, turn),
                ]
                for each in rounds if turn % 2 == 0 else rounds[::-1]:
                    each()
                if time.perf_counter() - self.begin_s > given.limit_s:
                    tell(f"--limit-s: ends after {turn + 1} rounds")
                    return

    def alone(self, model: Any, turn: int) -> None:
        by_generate(model, self.prompts[0], 4)  # what runs first is slower
        for at, prompt in enumerate(self.prompts):
            self.keep("generate", turn, at, by_generate(model, prompt, self.given.new_tokens))

    def serving(self, model: Any, config: ServeConfig, turn: int) -> None:
        with server_parts(model, config) as parts, running(parts):
            by: dict[str, Callable[[list[int], int], Timed]] = {
                "worker": lambda prompt, tokens: by_worker(parts, prompt, tokens),
                "http": lambda prompt, tokens: self.client.submit(
                    ask_alone, parts.url, parts.house.served.name, prompt, tokens
                ).result(),
            }
            for way in by.values():
                way(self.prompts[0], 4)
            for at, prompt in enumerate(self.prompts):
                for name in sorted(by, reverse=bool((at + turn) % 2)):
                    self.keep(name, turn, at, by[name](prompt, self.given.new_tokens))

    def keep(self, way: str, turn: int, prompt: int, row: Timed) -> None:
        if row.get("status", "finished") != "finished":
            raise SystemExit(f"a request failed: {row}")
        self.report["rows"].append({"way": way, "round": turn, "prompt": prompt} | row)
        tell(f"round {turn + 1}, prompt {prompt + 1}, {way}: {number(row.get('tpot_s'), '.2f', 1000)} ms per token")
        write_whole(self.report, self.given.json)


def ratios(rows: list[Timed], way: str, base: str) -> list[float]:
    """TPOT of a way over another's, of the same prompt in the same round."""
    of = {(row["way"], row["round"], row["prompt"]): row["tpot_s"] for row in rows if "tpot_s" in row}
    return [s / of[base, *place] for (name, *place), s in of.items() if name == way and (base, *place) in of]


def interval(values: list[float]) -> tuple[float, float]:
    """95% of the median, by bootstrap."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(low), float(high)


def render(report: dict[str, Any]) -> str:
    """A line for each way."""
    rows, given = report["rows"], report["settings"]
    lines = [("", "answers", "TTFT p50 ms", "TPOT p50 ms", "x generate", "x worker")]
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        if not own:
            continue
        cells = []
        for base in WAYS[:2]:
            found = ratios(rows, way, base) if base != way else []
            low, high = interval(found) if found else (0.0, 0.0)
            cells.append(f"{median(found):.3f} ({low:.3f} to {high:.3f})" if found else "-")
        tpot_s = [row["tpot_s"] for row in own if "tpot_s" in row]
        ttft = number(median(row["ttft_s"] for row in own), ".1f", 1000)
        lines.append((way, str(len(own)), ttft, number(median(tpot_s) if tpot_s else None, ".2f", 1000), *cells))
    of_http = ratios(rows, "http", "generate")
    goal = f"; it is {'met' if median(of_http) <= GOAL else 'MISSED'}" if of_http else ""
    return "\n".join([
        f"model {given['model']}, {given['expert_memory']} of the experts, {given['policy']}",
        "",
        align(lines),
        "",
        "x: of the same prompt in the same round, median and its 95% interval.",
        f"Goal: http at most {GOAL:g} x generate{goal}.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="a file as for finemoe record")
    parser.add_argument("--prompts-limit", type=int, default=8)
    parser.add_argument("--model", help="folder (default: the reference model)")
    parser.add_argument("--expert-memory", default="all")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--cache-bytes", default="256MiB")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="prompts are cut to so many")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--limit-s", type=float, default=1200.0, help="begin no round after so many seconds")
    parser.add_argument("--json", metavar="OUT", help="write all answers' times here, as they come")
    given = parser.parse_args()
    if given.model is None:
        from finemoe.model import reference_model

        given.model = str(reference_model())
    os.environ["FINEMOE_MAPS"] = "none"
    end_as_by_ctrl_c()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client:
        overhead = Overhead(given, client)
        try:
            overhead.run()
        except KeyboardInterrupt:
            tell("cut short")
    if overhead.report["rows"]:
        print(render(overhead.report))


if __name__ == "__main__":
    main()
