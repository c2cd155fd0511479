"""Tokens per second of 1 to 16 concurrent requests that share forward passes, against one after the other.

    python scripts/batching.py [--model FOLDER] [--policy finemoe] [--expert-memory 25%] [--json OUT]
    python scripts/batching.py --http [--prompts FILE] [--repeats 3] [--limit-s 1800] [--json OUT]

Every figure is of the same jobs: random prompts, or those of a file cut to one length, and answers of one length. What
a pass of several jobs reads is shared by them. Without `--http` jobs go to the serving worker, and `generate` is what
they are compared with, each answer after the other. With it, so many clients of `finemoe serve` ask without pause, and
the same is measured with a server that runs one answer at a time (`--max-running 1`); an answer may end early there.

Policies learn, so each measurement starts from a model that was loaded anew, with nothing learned.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arrivals import Ask
from asking import Asker, in_turn
from serve_process import align, came, end_as_by_ctrl_c, number, serve_process, tell, write_whole
from transformers import AutoConfig, AutoTokenizer

import finemoe
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Finished, Job, Token
from finemoe.serving.scheduler.worker import BatchingWorker
from finemoe.trace.prompts import read_prompts

ALONE = "one at a time"


def prompts(given: argparse.Namespace) -> list[list[int]]:
    """Token ids of each job."""
    if given.prompts is not None:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        texts = read_prompts(Path(given.prompts)).texts
        texts = [texts[(given.seed + at) % len(texts)] for at in range(given.jobs)]
        return [tokenizer(text)["input_ids"][: given.prompt_tokens] for text in texts]
    vocabulary = AutoConfig.from_pretrained(given.model).get_text_config().vocab_size
    draw = torch.Generator().manual_seed(given.seed)
    return torch.randint(vocabulary, (given.jobs, given.prompt_tokens), generator=draw).tolist()


def by_generate(model: Any, given: argparse.Namespace) -> None:
    for prompt in prompts(given):
        ids = torch.tensor([prompt])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
            max_new_tokens=given.new_tokens,
        )  # fmt: skip


def in_worker(model: Any, given: argparse.Namespace, concurrent: int) -> bool:
    """Keeps so many jobs in the worker. Returns whether it could batch them."""
    room, failed = threading.Semaphore(concurrent), []

    def listen(_name: str, news: Token | Finished) -> None:
        if isinstance(news, Finished):
            if news.reason != "length":
                failed.append(news.message)
            room.release()

    worker = BatchingWorker(model, ServeConfig(cache_bytes=given.cache_bytes, max_running=max(given.concurrent)))
    try:
        for name, prompt in enumerate(prompts(given)):
            room.acquire()
            worker.submit(Job(str(name), prompt, given.new_tokens), listen)
        for _ in range(concurrent):
            room.acquire()
    finally:
        worker.close()
    if failed:
        raise SystemExit(f"a job failed: {failed[0]}")
    return worker.batches


def measure(given: argparse.Namespace, concurrent: int) -> dict[str, Any]:
    """One row in this process; `concurrent` 0 is `generate`."""
    memory = {"expert_memory": given.expert_memory, "policy": given.policy, "map_store": "none"}
    with finemoe.load(given.model, **memory) as model:
        start_s = time.perf_counter()
        batched = in_worker(model, given, concurrent) if concurrent else False
        if not concurrent:
            by_generate(model, given)
        total_s = time.perf_counter() - start_s
        stats = model.finemoe.stats()
    return {
        "how": "worker" if concurrent else "generate",
        "concurrent": concurrent or 1,
        "batched": batched,
        "total_s": total_s,
        "tokens": given.jobs * given.new_tokens,
        "tok_s": given.jobs * given.new_tokens / total_s,
        "hit_rate": stats.hit_rate,
        "stall_s": stats.stall_s,
        "bytes_read": stats.bytes_read,
    }


def measure_http(given: argparse.Namespace, clients: int, how: str) -> dict[str, Any]:
    """One row through a server of its own; a short answer, whose first pass is slower, goes before."""
    running = 1 if how == ALONE else max(given.concurrent)
    flags = ["--model", given.model, "--policy", given.policy, "--expert-memory", given.expert_memory]
    flags += ["--cache-bytes", given.cache_bytes, "--max-running", str(running), "--max-waiting", str(max(64, clients))]
    asks = [Ask(0.0, prompt, len(prompt), given.new_tokens) for prompt in prompts(given)]

    async def ask(url: str, name: str) -> tuple[list[dict[str, Any]], float, dict[str, float]]:
        async with Asker(url, name, chat=False) as asker:
            await asker.ask(Ask(0.0, asks[-1].prompt, 1, 2))
            before = server.figures()
            rows, total_s = await in_turn(asker, asks, clients)
        return rows, total_s, before

    with serve_process(flags) as server:
        rows, total_s, before = asyncio.run(ask(server.url, server.name))
        figures = came(before, server.figures())
    if bad := [row for row in rows if row["status"] != "finished"]:
        raise SystemExit(f"a request failed: {bad[0]}")
    tokens = sum(row["tokens"] for row in rows)
    latencies = {
        f"{name}_p50": median(row[name] for row in rows if name in row)
        for name in ("ttft_s", "tpot_s")
        if any(name in row for row in rows)
    }
    return {
        "how": how,
        "concurrent": clients,
        "batched": running > 1,
        "total_s": total_s,
        "tokens": tokens,
        "tok_s": tokens / total_s,
        **latencies,
        **{name: figures[name] for name in ("hit_rate", "stall_s", "bytes_read")},
    }


def render(rows: list[dict[str, Any]]) -> str:
    """A line for each way and number of jobs; medians over repeats. `x`: times what goes one at a time."""
    head = ("", "at once", "tok/s", "x", "TTFT p50 s", "TPOT p50 ms", "hits", "MiB/tok", "stall")
    kinds = list(dict.fromkeys((row["how"], row["concurrent"]) for row in rows))

    rows = [
        row | {"stall_share": row["stall_s"] / row["total_s"], "mib": row["bytes_read"] / row["tokens"] / (1 << 20)}
        for row in rows
    ]

    def middle(how: str, concurrent: int, name: str) -> float | None:
        same = [row for row in rows if (row["how"], row["concurrent"]) == (how, concurrent)]
        values = [row[name] for row in same if row.get(name) is not None]
        return median(values) if values else None

    lines = [head]
    for how, concurrent in kinds:
        tok_s = middle(how, concurrent, "tok_s")
        slow = middle(ALONE, concurrent, "tok_s") or middle("generate", 1, "tok_s")
        lines.append((
            how, str(concurrent), number(tok_s, ".2f"), number(tok_s / slow if tok_s and slow else None, ".2f"),
            number(middle(how, concurrent, "ttft_s_p50"), ".2f"),
            number(middle(how, concurrent, "tpot_s_p50"), ".0f", 1000),
            number(middle(how, concurrent, "hit_rate"), ".1%"), number(middle(how, concurrent, "mib"), ".1f"),
            number(middle(how, concurrent, "stall_share"), ".0%"),
        ))  # fmt: skip
    return align(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder (default: the reference model)")
    parser.add_argument("--http", action="store_true", help="measure finemoe serve, asked by OpenAI's client")
    parser.add_argument("--policy", default="finemoe")
    parser.add_argument("--expert-memory", default="25%")
    parser.add_argument("--cache-bytes", default="256MiB")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--jobs", type=int, default=16, help="in each row")
    parser.add_argument("--prompts", help="a file as for finemoe record (default: random tokens)")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1, help="of all rows, in turn")
    parser.add_argument("--limit-s", type=float, default=86400.0, help="begin no row after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="-", help="where to write the rows, as they come; - is standard output")
    given = parser.parse_args()
    if given.model is None:
        from finemoe.model import reference_model

        given.model = str(reference_model())
    os.environ["FINEMOE_MAPS"] = "none"
    end_as_by_ctrl_c()
    report: dict[str, Any] = {"settings": vars(given), "rows": [], "left_out": []}
    kinds = [(how, n) for n in given.concurrent for how in ((ALONE, "server") if given.http else ("worker",))]
    if not given.http:
        kinds.insert(0, ("generate", 0))
    begin_s = time.perf_counter()
    try:
        for repeat in range(given.repeats):
            for how, concurrent in kinds:
                if time.perf_counter() - begin_s > given.limit_s:
                    report["left_out"].append(f"{how} {concurrent}, repeat {repeat + 1}")
                    continue
                row = measure_http(given, concurrent, how) if given.http else measure(given, concurrent)
                report["rows"].append(row | {"repeat": repeat})
                tell(f"{how} {row['concurrent']}: {row['tok_s']:.2f} tok/s")
                write_whole(report, None if given.json == "-" else given.json)
    except KeyboardInterrupt:
        tell("cut short")
    if given.json == "-":
        print(json.dumps(report, indent=2))
    else:
        write_whole(report, given.json)
        if report["rows"]:
            print(render(report["rows"]))
        if report["left_out"]:
            print(f"Left out for want of time: {', '.join(report['left_out'])}.")


if __name__ == "__main__":
    main()
