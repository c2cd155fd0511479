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
from statistics import median
from typing import Any

from asking import ask_alone
from in_turn import Timed, add_arguments, by_generate, cells, heading, parse, prompts_of, ratios, timed
from serve_here import Parts, running, server_parts
from serve_process import align, end_as_by_ctrl_c, number, tell, write_whole

import finemoe
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Finished, Job, Token

WAYS = ("generate", "worker", "http")
GOAL = 1.03  # of http against generate


def by_worker(parts: Parts, prompt: list[int], new_tokens: int) -> Timed:
    times_s: list[float] = []
    ended = threading.Event()

    def listen(_name: str, news: Token | Finished) -> None:
        if isinstance(news, Token):
            times_s.append(time.perf_counter())
        else:
            ended.set()

    start_s = time.perf_counter()
    parts.worker.submit(Job("alone", prompt, new_tokens, stop=parts.app_state.served.stop_ids), listen)
    ended.wait()
    return timed(start_s, times_s)


class Overhead:
    """One run of the program."""

    def __init__(self, given: argparse.Namespace, client: ProcessPoolExecutor) -> None:
        self.prompts = prompts_of(given)
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
                    ask_alone, parts.url, parts.app_state.served.name, prompt, tokens
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


def render(report: dict[str, Any]) -> str:
    """A line for each way."""
    rows, given = report["rows"], report["settings"]
    told = {row["way"] for row in rows}
    lines = [heading(*WAYS[:2]), *(cells(rows, way, *WAYS[:2]) for way in WAYS if way in told)]
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
    add_arguments(parser, prompts=8, tokens=64, new_tokens=64, repeats=5, limit_s=1200.0)
    parser.add_argument("--expert-memory", default="all")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--cache-bytes", default="256MiB")
    given = parse(parser)
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
