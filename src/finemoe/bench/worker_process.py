"""The process of one row: `python -m finemoe.bench.worker_process TASK.json RESULT.json`.

A row has its own process so that its peak memory, threads and allocator state do not depend on other rows.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from finemoe.bench.config import BATCHED
from finemoe.bench.disk_probe import evict, probe
from finemoe.bench.inputs import Request, learn_trace, perplexity
from finemoe.bench.measurements import Phase, PromptsResult, RandomTokensResult, RequestResult, WorkerTask, counted
from finemoe.budget import format_bytes
from finemoe.checkpoint import locate, read_headers
from finemoe.config import LoadConfig
from finemoe.errors import BudgetError, FinemoeError
from finemoe.model import load_config, model_class
from finemoe.model.quantized import restore_on_load
from finemoe.system import available_bytes, peak_rss_bytes, return_freed_memory, unmap_idle_code
from finemoe.trace.forced_routing import replay_routing

PROBE_BYTES = 48 << 20  # before each token
BATCHED_CHUNK = 16  # tokens per pass: batched_mm copies an expert's weights for every token routed to it


def run_requests(
    model: Any, requests: Sequence[Request], new_tokens: int, chunk: int | None = None
) -> list[RequestResult]:
    """Answers `requests` in order, greedily.

    It does no other work between requests or tokens, as an idle link would keep prefetching and flatter such policies.

    Args:
        new_tokens: most tokens of an answer.
        chunk: tokens per forward pass of a prompt; `None`: all at once.
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    with torch.no_grad():
        return [_run_request(model, request, new_tokens, ends, chunk or len(request)) for request in requests]


def _run_request(model: Any, request: Request, new_tokens: int, ends: set[int | None], chunk: int) -> RequestResult:
    cache: Any = None
    tokens: list[int] = []
    logits = hashlib.sha256()

    def step(inputs: Sequence[Tensor]) -> float:
        """Generates one token; returns its time in seconds."""
        nonlocal cache
        start_s = time.perf_counter()
        for ids in inputs:
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        last = output.logits[:, -1:]
        tokens.append(int(last.argmax(-1)))
        taken_s = time.perf_counter() - start_s
        logits.update(last.contiguous().view(torch.uint8).numpy().tobytes())
        return taken_s

    counters = _CounterDelta(model)
    seconds = [step(prompt_chunks(request, chunk))]
    prompt = counters.phase(seconds)
    seconds = []
    while len(tokens) < new_tokens and tokens[-1] not in ends:
        seconds.append(step([torch.tensor([tokens[-1:]])]))
    decode = counters.phase(seconds)
    return RequestResult(len(request), prompt, decode, tuple(tokens), logits.hexdigest()[:16])


def prompt_chunks(prompt: Sequence[int], most: int) -> list[Tensor]:
    """A prompt's ids in near-equal chunks `[1, n]`, `n <= most`; a rest of one token would look like decoding."""
    ids = torch.tensor([list(prompt)])
    return list(ids.tensor_split(-(-ids.shape[1] // most), dim=1))


class _CounterDelta:
    """The growth of the engine's counters since the last phase, without resetting them: prefetches span phases."""

    def __init__(self, model: Any) -> None:
        self._handle = getattr(model, "finemoe", None)
        self._before = self._now()

    def phase(self, seconds: Sequence[float]) -> Phase:
        before, self._before = self._before, self._now()
        grown = {name: value - before[name] for name, value in self._before.items()}
        return Phase(tuple(seconds), disk_bytes=None, **grown)

    def _now(self) -> dict[str, Any]:
        return {} if self._handle is None else counted(self._handle)


def _timed_load(task: WorkerTask) -> tuple[Any, float]:
    """Loads the model; returns it and the load time in seconds."""
    if task.threads:
        torch.set_num_threads(task.threads)
    start_s = time.perf_counter()
    model = _load(task)
    if task.replay_routing is not None:
        replay_routing(model, task.replay_routing)
    if task.variant.kind == "finemoe":
        model.finemoe.attach_timing()
        model.finemoe.attach_link_accounting()
        unmap_idle_code()
    return model, time.perf_counter() - start_s


def measure_random_tokens(task: WorkerTask) -> RandomTokensResult:
    """Loads the model, times a cold prompt, then the continuation of another."""
    model, load_s = _timed_load(task)
    handle = getattr(model, "finemoe", None)
    prober = _DiskProber(task) if task.variant.kind == "finemoe" else None
    before_step = prober.probe if prober else _evictor(task)
    chunk = BATCHED_CHUNK if task.variant.implementation == BATCHED else len(task.prompt) + len(task.context)
    with torch.no_grad():
        prompt, _, _ = _generate(model, task.prompt, 1, before_step, chunk, prober)
        decode, tokens, logits = _generate(model, task.context, task.new_tokens, before_step, chunk, prober)
    measured = RandomTokensResult(
        load_s=load_s,
        prompt=prompt[0],
        decode=decode[1],
        tokens=tuple(tokens),
        logits=tuple(logits),
        dense_bytes=_memory_bytes([*model.parameters(), *model.buffers()]),
        pool_bytes=0 if handle is None else handle.stats().expert_memory_bytes,
        peak_rss_bytes=own_peak_rss_bytes(),
        torch_threads=torch.get_num_threads(),
        explained=None if handle is None else handle.stats().explained,  # it was reset before decoding
    )
    return replace(measured, perplexity=_perplexity(model, task))


def measure_prompts(task: WorkerTask) -> PromptsResult:
    """Loads the model and answers its requests; `warm` ones first, after which the pool is emptied."""
    model, load_s = _timed_load(task)
    handle = getattr(model, "finemoe", None)
    chunk = BATCHED_CHUNK if task.variant.implementation == BATCHED else None
    if task.store and handle is not None:
        learn_trace(handle, Path(task.store))
    run_requests(model, task.warm, task.new_tokens, chunk)
    if handle is not None:
        handle.evict_all()  # the policy keeps what it learned
        handle.reset_stats()
    answers = run_requests(model, task.requests, task.new_tokens, chunk)
    stats = None if handle is None else handle.stats()
    answered = PromptsResult(
        load_s=load_s,
        answers=tuple(answers),
        prefetched=stats.prefetched if stats else 0,
        prefetched_used=stats.prefetched_used if stats else 0,
        wasted=stats.wasted if stats else 0,
        expert_bytes=stats.expert_bytes / stats.experts if stats else 0.0,
        dense_bytes=_memory_bytes([*model.parameters(), *model.buffers()]),
        pool_bytes=stats.expert_memory_bytes if stats else 0,
        peak_rss_bytes=own_peak_rss_bytes(),
        torch_threads=torch.get_num_threads(),
        explained=stats.explained if stats else None,
    )
    return replace(answered, perplexity=_perplexity(model, task))


def _perplexity(model: Any, task: WorkerTask) -> float | None:
    """Runs last: it would change timings and counters."""
    return perplexity(model, task.text) if task.text else None


def own_peak_rss_bytes() -> int:
    """Peak resident set of this process; on Linux without its parent's, which `ru_maxrss` inherits."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_rss_bytes()


def _load(task: WorkerTask) -> Any:
    config = LoadConfig(**task.load)
    if task.variant.kind == "finemoe":
        return load_config(config)
    checkpoint = locate(str(config.model), config.revision)
    model_config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    restore_on_load(model_config)  # as finemoe does
    arguments: dict[str, Any] = {
        "config": model_config,
        "dtype": config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
        "experts_implementation": task.variant.implementation,
        "use_safetensors": True,
        "trust_remote_code": config.trust_remote_code,
    }
    if task.variant.kind == "resident":
        needed = sum(header.length_bytes for header in read_headers(checkpoint.files).values())
        if needed > (available := available_bytes()):
            raise BudgetError(f"the model needs {format_bytes(needed)}, of {format_bytes(available)} available")
    else:
        arguments |= {
            "device_map": "auto",
            "max_memory": {"cpu": task.memory_bytes},
            "offload_folder": task.offload_folder,
        }
    return model_class(model_config).from_pretrained(checkpoint.folder, **arguments).eval()


def _evictor(task: WorkerTask) -> Callable[[], None]:
    """Called before each step: evicts the page cache for disk offload, to which it would be additional memory."""
    if task.variant.kind != "disk-offload":
        return lambda: None
    files = [*locate(str(task.load["model"])).files, *Path(task.offload_folder).rglob("*.safetensors")]
    return lambda: evict(files)


def _generate(
    model: Any,
    prompt: Sequence[int],
    new_tokens: int,
    before_step: Callable[[], None],
    chunk: int,
    prober: _DiskProber | None = None,
) -> tuple[tuple[Phase, Phase], list[int], list[str]]:
    """Greedy decoding, with at most `chunk` tokens of the prompt per forward pass.

    Returns:
        The phases of the prompt and of the tokens after it, the tokens, and their logits' hashes.
    """
    cache: Any = None
    tokens: list[int] = []
    logits: list[Tensor] = []

    def step(ids: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal cache
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        last = output.logits[:, -1:]
        return last, last.argmax(-1)

    phases: list[Phase] = []
    inputs = prompt_chunks(prompt, chunk)
    for steps in (1, new_tokens - 1):
        phase_meter = _PhaseMeter(model, prober)
        for _ in range(steps):
            before_step()
            start_s = time.perf_counter()
            for ids in inputs:
                last, following = step(ids)
            tokens.append(int(following))
            phase_meter.seconds.append(time.perf_counter() - start_s)
            logits.append(last)
            inputs = [following]
        phases.append(phase_meter.phase())
    return (phases[0], phases[1]), tokens, [_hash(row) for row in logits]


class _DiskProber:
    """Measures the disk between tokens, as the bandwidth of a shared disk changes within seconds."""

    def __init__(self, task: WorkerTask) -> None:
        self._files = locate(str(task.load["model"])).files
        self._run_bytes = task.expert_bytes
        self._limit_bytes_s = LoadConfig(**task.load).link_bandwidth_bytes_s
        self._seed = 0
        self.reset()

    def reset(self) -> None:
        self.read_bytes, self._seconds = 0, 0.0

    def probe(self) -> None:
        found = probe(self._files, PROBE_BYTES, self._seed, self._run_bytes)
        self._seed += 1
        self.read_bytes += found.read_bytes
        self._seconds += found.read_bytes / found.bandwidth_bytes_s

    @property
    def bandwidth_bytes_s(self) -> float | None:
        if not self._seconds:
            return None
        measured = self.read_bytes / self._seconds
        return measured if self._limit_bytes_s is None else min(measured, self._limit_bytes_s)


class _PhaseMeter:
    """Measures one phase from its construction on; resets the engine's counters."""

    def __init__(self, model: Any, prober: _DiskProber | None = None) -> None:
        self.seconds: list[float] = []
        self._prober = prober
        if prober is not None:
            prober.reset()
        self._handle = getattr(model, "finemoe", None)
        if self._handle is not None:
            self._handle.reset_stats()
        self._disk_bytes = _disk_bytes()

    def phase(self) -> Phase:
        after = _disk_bytes()
        if after is not None and self._prober is not None:
            after -= self._prober.read_bytes
        disk_bytes = None if after is None or self._disk_bytes is None else after - self._disk_bytes
        if self._handle is None:
            return Phase(tuple(self.seconds), disk_bytes)
        link_bytes_s = self._prober.bandwidth_bytes_s if self._prober else None
        return Phase(tuple(self.seconds), disk_bytes, link_bytes_s=link_bytes_s, **counted(self._handle))


def _disk_bytes() -> int | None:
    """Bytes that this process has read from storage; `None` where the kernel does not count them."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None


def _memory_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors in memory, shared storage counted once."""
    held = {(t.data_ptr(), t.nbytes) for t in tensors if t.device.type != "meta"}
    return sum(nbytes for _, nbytes in held)


def _hash(logits: Tensor) -> str:
    return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def main(task_path: str, result_path: str) -> int:
    """Runs a task: writes the result, or one line of error to standard error. Returns the exit status."""
    transformers.utils.logging.disable_progress_bar()
    task = WorkerTask.from_dict(json.loads(Path(task_path).read_text()))
    if task.variant.kind == "finemoe":  # as the finemoe command does; transformers runs with defaults
        return_freed_memory()
    try:
        result = asdict(measure_prompts(task) if task.requests else measure_random_tokens(task))
    except (FinemoeError, ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        sys.stderr.write(f"{type(error).__name__}: {lines[0]}\n")
        return 2
    Path(result_path).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
