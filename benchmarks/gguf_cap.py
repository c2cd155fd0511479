"""Compares llama.cpp's own file mapping with finemoe under a memory cap: same GGUF file, library and prompt.

    python benchmarks/gguf_cap.py model.gguf --cap 50% --policies lru,finemoe --new-tokens 64

Each row runs in a separate process in a memory cgroup of the cap's size (page cache included), after the file was
dropped from the page cache. The first row has no cap and is the upper bound. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

OVERHEAD_BYTES = 128 << 20  # interpreter, library, activations, KV cache
PROMPT_TOKENS = 32


def plain(path: str, threads: int) -> Iterator[int]:
    """Greedy tokens of llama.cpp with its own mapping and no callback."""
    from finemoe.gguf.binding import LOAD_MMAP, load_library
    from finemoe.gguf.context import Context, ContextOptions

    library = load_library()
    params = library.api.llama_model_default_params()
    params.n_gpu_layers, params.load_mode, params.use_extra_bufts = 0, LOAD_MMAP, False
    model = library.api.llama_model_load_from_file(os.fsencode(path), params)
    context = Context(library, model, 512, ContextOptions(512, threads))
    prompt = prompt_of(int(library.api.llama_vocab_n_tokens(library.api.llama_model_get_vocab(model))))
    context.run(prompt, 0, logits=True)
    position = len(prompt)
    while True:
        token = int(context.logits().argmax())
        yield token
        context.run([token], position, logits=True)
        position += 1


def offloaded(given: argparse.Namespace, out: dict[str, Any]) -> Iterator[int]:
    """Greedy tokens of finemoe; adds its statistics to `out` when the generator is closed."""
    from finemoe.config import LoadConfig
    from finemoe.model.backend import load_config

    config = LoadConfig(
        given.model, expert_memory=given.expert_memory, policy=given.row, threads=given.threads, map_store="none"
    )
    with load_config(config) as model:
        try:
            yield from model.generate(prompt_of(model.vocabulary.size), given.new_tokens)
        finally:
            stats = model.finemoe.stats()
            out |= {"hits": stats.hit_rate, "late": stats.late_rate, "stall_s": stats.stall_s}
            out |= {"bytes_read": stats.bytes_read, "expert_memory_bytes": stats.expert_memory_bytes}


def prompt_of(vocabulary: int) -> list[int]:
    """A random prompt, the same in every row."""
    import numpy as np

    return [int(token) for token in np.random.default_rng(0).integers(20, vocabulary - 20, PROMPT_TOKENS)]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one row in this process."""
    row: dict[str, Any] = {}
    start_s = time.perf_counter()
    tokens = plain(given.model, given.threads) if given.row == "llama.cpp" else offloaded(given, row)
    ids, times_s = [], []
    for token in tokens:
        ids.append(token)
        times_s.append(time.perf_counter())
        if len(ids) == given.new_tokens:
            break
    tokens.close()  # type: ignore[attr-defined] # a generator
    decode_s = times_s[-1] - times_s[0]
    row |= {"load_and_first_s": times_s[0] - start_s, "tok_s": (len(ids) - 1) / decode_s, "token_ids": ids}
    return row


def run_row(given: argparse.Namespace, row: str, cap_bytes: int | None, expert_memory: str) -> dict[str, Any]:
    """Measure one row in a separate process."""
    from cap import Cap

    with Path(given.model).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [
        sys.executable, __file__, given.model, "--row", row, "--expert-memory", expert_memory,
        "--new-tokens", str(given.new_tokens), "--threads", str(given.threads),
    ]  # fmt: skip
    if cap_bytes is None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.timeout_s, check=False)
        usage = None
    else:
        with Cap(cap_bytes, f"finemoe-gguf-{os.getpid()}") as cap:
            done = subprocess.run(
                cap.command(command), capture_output=True, text=True, timeout=given.timeout_s, check=False
            )
            usage = cap.usage()
    if done.returncode:
        return {"row": row, "failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"row": row, "cap_bytes": cap_bytes, "peak_bytes": None if usage is None else usage.peak_bytes, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--cap", default="50%", help="memory cap in percent of the file size")
    parser.add_argument("--policies", default="lru,finemoe")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=600)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--expert-memory", default="all", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(given)))
        return 0
    from finemoe.gguf.file import open_gguf

    file = open_gguf(given.model)
    size_bytes = sum(path.stat().st_size for path in file.files)
    cap_bytes = int(size_bytes * float(given.cap.rstrip("%")) / 100)
    budget = str(max(1, cap_bytes - file.dense_bytes - OVERHEAD_BYTES))
    rows = []
    for _ in range(given.repeats):
        for row, cap, memory in [
            ("llama.cpp", None, "all"),
            ("llama.cpp", cap_bytes, "all"),
            *((policy, cap_bytes, budget) for policy in given.policies.split(",")),
        ]:
            found = run_row(given, row, cap, memory)
            found["same_tokens"] = found.get("token_ids") == rows[0].get("token_ids") if rows else True
            rows.append(found)
            shown = {name: value for name, value in found.items() if name != "token_ids"}
            print(json.dumps(shown), file=sys.stderr, flush=True)
    settings = {"model": Path(given.model).name, "bytes": size_bytes, "cap": given.cap, "threads": given.threads}
    print(json.dumps(settings | {"rows": [{k: v for k, v in row.items() if k != "token_ids"} for row in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
