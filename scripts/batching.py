"""Tokens per second of 1 to 16 concurrent jobs in the serving worker, against one `generate` after the other.

    python scripts/batching.py [--model FOLDER] [--policy finemoe] [--expert-memory 25%] [--json OUT]

Every figure is of the same jobs: random prompts, answers of a fixed length. What a pass of several jobs reads is shared
by them. Policies learn, so each measurement starts from a model that was loaded anew, with nothing learned.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import finemoe
from finemoe.serving.config import ServeConfig
from finemoe.serving.job import Finished, Job, Token
from finemoe.serving.worker import BatchingWorker


def load(given: argparse.Namespace) -> Any:
    if given.model is None:
        from finemoe.model import reference_model

        given.model = str(reference_model())
    return finemoe.load(given.model, expert_memory=given.expert_memory, policy=given.policy, map_store="none")


def prompts(model: Any, given: argparse.Namespace) -> list[list[int]]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(given.seed)
    return torch.randint(vocabulary, (given.jobs, given.prompt_tokens), generator=draw).tolist()


def in_turn(model: Any, given: argparse.Namespace) -> None:
    for prompt in prompts(model, given):
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
        for number, prompt in enumerate(prompts(model, given)):
            room.acquire()
            worker.submit(Job(str(number), prompt, given.new_tokens), listen)
        for _ in range(concurrent):
            room.acquire()
    finally:
        worker.close()
    if failed:
        raise SystemExit(f"a job failed: {failed[0]}")
    return worker.batches


def measure(given: argparse.Namespace, concurrent: int) -> dict[str, Any]:
    """One row; `concurrent` 0 is `generate`."""
    with load(given) as model:
        start_s = time.perf_counter()
        batched = in_worker(model, given, concurrent) if concurrent else False
        if not concurrent:
            in_turn(model, given)
        total_s = time.perf_counter() - start_s
        stats = model.finemoe.stats()
    return {
        "how": "worker" if concurrent else "generate",
        "concurrent": concurrent or 1,
        "batched": batched,
        "total_s": total_s,
        "tok_s": given.jobs * given.new_tokens / total_s,
        "hit_rate": stats.hit_rate,
        "stall_s": stats.stall_s,
        "bytes_read": stats.bytes_read,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the reference model)")
    parser.add_argument("--policy", default="finemoe")
    parser.add_argument("--expert-memory", default="25%")
    parser.add_argument("--cache-bytes", default="256MiB")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--jobs", type=int, default=16, help="in each row")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="-", help="where to write the rows; - is standard output")
    given = parser.parse_args()
    rows = []
    for concurrent in [0, *given.concurrent]:
        rows.append(measure(given, concurrent))
        print(f"{rows[-1]['how']} {rows[-1]['concurrent']}: {rows[-1]['tok_s']:.2f} tok/s", file=sys.stderr)
    text = json.dumps({"settings": vars(given), "rows": rows}, indent=2)
    if given.json == "-":
        print(text)
    else:
        Path(given.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
