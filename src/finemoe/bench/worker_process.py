"""The process of one row: `python -m finemoe.bench.worker_process ORDER.json RESULT.json`.

Every row has a process of its own, so that peak memory, threads and allocator state are its own too.
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
from finemoe.bench.inputs import Request, perplexity, teach
from finemoe.bench.measurements import Answer, Answered, Measured, Order, Phase, counted
from finemoe.checkpoint import locate, read_headers
from finemoe.config import LoadConfig, format_bytes
from finemoe.errors import BudgetError, FinemoeError
from finemoe.model import load_config, model_class
from finemoe.model.quantized import restore_on_load
from finemoe.system import available_bytes, peak_rss_bytes, return_freed_memory, unmap_idle_code
from finemoe.trace.forced_routing import replay_routing


def answer_all(model: Any, requests: Sequence[Request], new_tokens: int, piece: int | None = None) -> list[Answer]:
    """Answers `requests` in order.

    Nothing happens between two requests or two tokens but the bookkeeping of this: an idle link would go on
    prefetching, and so flatter those that do.

    Args:
        new_tokens: an answer ends after so many, or where the model ends it.
        piece: feed prompts so many tokens at a time; `None`: whole.
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    with torch.no_grad():
        return [_answer(model, request, new_tokens, ends, piece or len(request)) for request in requests]


def _answer(model: Any, request: Request, new_tokens: int, ends: set[int | None], piece: int) -> Answer:
    cache: Any = None
    tokens: list[int] = []
    logits = hashlib.sha256()

    def step(inputs: Sequence[Tensor]) -> float:
        """One token. Returns its time."""
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

    count = _Count(model)
    seconds = [step(pieces(request, piece))]
    prompt = count.phase(seconds)
    seconds = []
    while len(tokens) < new_tokens and tokens[-1] not in ends:
        seconds.append(step([torch.tensor([tokens[-1:]])]))
    decode = count.phase(seconds)
    return Answer(len(request), prompt, decode, tuple(tokens), logits.hexdigest()[:16])


def pieces(prompt: Sequence[int], most: int) -> list[Tensor]:
    """A prompt's ids `[1, n]`, at most so many at a time; none alone after others, which would look like decoding."""
    ids = torch.tensor([list(prompt)])
    return list(ids.tensor_split(-(-ids.shape[1] // most), dim=1))


class _Count:
    """What the engine counted since the last phase. Never resets it: prefetches span phases."""

    def __init__(self, model: Any) -> None:
        self._offload = getattr(model, "finemoe", None)
        self._before = self._now()

    def phase(self, seconds: Sequence[float]) -> Phase:
        before, self._before = self._before, self._now()
        grown = {name: value - before[name] for name, value in self._before.items()}
        return Phase(tuple(seconds), disk_bytes=None, **grown)

    def _now(self) -> dict[str, Any]:
        return {} if self._offload is None else counted(self._offload)


PROBE_BYTES = 48 << 20  # before each token
BATCHED_PIECE = 16  # tokens at once: batched_mm copies an expert's weights for every token that it is routed to


def _loaded(order: Order) -> tuple[Any, float]:
    """The model, and how long that took."""
    if order.threads:
        torch.set_num_threads(order.threads)
    start_s = time.perf_counter()
    model = _load(order)
    if order.replay_routing is not None:
        replay_routing(model, order.replay_routing)
    if order.subject.kind == "finemoe":
        model.finemoe.attach_link_accounting()
        unmap_idle_code()
    return model, time.perf_counter() - start_s


def measure(order: Order) -> Measured:
    """Loads the subject, times a cold prompt, then the continuation of another."""
    model, load_s = _loaded(order)
    offload = getattr(model, "finemoe", None)
    prober = _Prober(order) if order.subject.kind == "finemoe" else None
    between = prober.probe if prober else _evictor(order)
    piece = BATCHED_PIECE if order.subject.implementation == BATCHED else len(order.prompt) + len(order.context)
    with torch.no_grad():
        prompt, _, _ = _generate(model, order.prompt, 1, between, piece, prober)
        decode, tokens, logits = _generate(model, order.context, order.new_tokens, between, piece, prober)
    measured = Measured(
        load_s=load_s,
        prompt=prompt[0],
        decode=decode[1],
        tokens=tuple(tokens),
        logits=tuple(logits),
        dense_bytes=_memory_bytes([*model.parameters(), *model.buffers()]),
        pool_bytes=0 if offload is None else offload.stats().expert_memory_bytes,
        peak_rss_bytes=own_peak_rss_bytes(),
        torch_threads=torch.get_num_threads(),
        explained=None if offload is None else offload.stats().explained,  # it was reset before decoding
    )
    return replace(measured, perplexity=_perplexity(model, order))


def measure_answers(order: Order) -> Answered:
    """Loads the subject and answers its requests; those to warm up first, after which the pool is emptied again."""
    model, load_s = _loaded(order)
    offload = getattr(model, "finemoe", None)
    piece = BATCHED_PIECE if order.subject.implementation == BATCHED else None
    if order.store and offload is not None:
        teach(offload, Path(order.store))
    answer_all(model, order.warm, order.new_tokens, piece)
    if offload is not None:
        offload.evict_all()  # what was learned stays
        offload.reset_stats()
    answers = answer_all(model, order.requests, order.new_tokens, piece)
    stats = None if offload is None else offload.stats()
    answered = Answered(
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
    return replace(answered, perplexity=_perplexity(model, order))


def _perplexity(model: Any, order: Order) -> float | None:
    """After everything that is timed and counted."""
    return perplexity(model, order.text) if order.text else None


def own_peak_rss_bytes() -> int:
    """Peak memory of this process alone: where the kernel says, without what its parent held when it was started."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_rss_bytes()


def _load(order: Order) -> Any:
    config = LoadConfig(**order.load)
    if order.subject.kind == "finemoe":
        return load_config(config)
    checkpoint = locate(str(config.model), config.revision)
    model_config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    restore_on_load(model_config)  # what finemoe computes with, too
    arguments: dict[str, Any] = {
        "config": model_config,
        "dtype": config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
        "experts_implementation": order.subject.implementation,
        "use_safetensors": True,
        "trust_remote_code": config.trust_remote_code,
    }
    if order.subject.kind == "resident":
        needed = sum(header.length_bytes for header in read_headers(checkpoint.files).values())
        if needed > (available := available_bytes()):
            raise BudgetError(f"the whole model is {format_bytes(needed)}, but only {format_bytes(available)} are free")
    else:
        arguments |= {
            "device_map": "auto",
            "max_memory": {"cpu": order.memory_bytes},
            "offload_folder": order.offload_folder,
        }
    return model_class(model_config).from_pretrained(checkpoint.folder, **arguments).eval()


def _evictor(order: Order) -> Callable[[], None]:
    """What to do before each step. Disk offload reads through the page cache, which would give it more memory."""
    if order.subject.kind != "disk-offload":
        return lambda: None
    files = [*locate(str(order.load["model"])).files, *Path(order.offload_folder).rglob("*.safetensors")]
    return lambda: evict(files)


def _generate(
    model: Any,
    prompt: Sequence[int],
    new_tokens: int,
    between: Callable[[], None],
    piece: int,
    prober: _Prober | None = None,
) -> tuple[tuple[Phase, Phase], list[int], list[str]]:
    """Greedy decoding, the prompt fed in pieces of at most `piece` tokens.

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
    inputs = pieces(prompt, piece)
    for steps in (1, new_tokens - 1):
        meter = _Meter(model, prober)
        for _ in range(steps):
            between()
            start_s = time.perf_counter()
            for ids in inputs:
                last, following = step(ids)
            tokens.append(int(following))
            meter.seconds.append(time.perf_counter() - start_s)
            logits.append(last)
            inputs = [following]
        phases.append(meter.phase())
    return (phases[0], phases[1]), tokens, [_hash(row) for row in logits]


class _Prober:
    """Measures the disk between tokens: its rate changes within seconds where others use it too."""

    def __init__(self, order: Order) -> None:
        self._files = locate(str(order.load["model"])).files
        self._stretch_bytes = order.expert_bytes
        self._held_bytes_s = LoadConfig(**order.load).link_bandwidth_bytes_s
        self._seed = 0
        self.reset()

    def reset(self) -> None:
        self.read_bytes, self._seconds = 0, 0.0

    def probe(self) -> None:
        found = probe(self._files, PROBE_BYTES, self._seed, self._stretch_bytes)
        self._seed += 1
        self.read_bytes += found.read_bytes
        self._seconds += found.read_bytes / found.bandwidth_bytes_s

    @property
    def bandwidth_bytes_s(self) -> float | None:
        if not self._seconds:
            return None
        measured = self.read_bytes / self._seconds
        return measured if self._held_bytes_s is None else min(measured, self._held_bytes_s)


class _Meter:
    """Counts what happens from its making on."""

    def __init__(self, model: Any, prober: _Prober | None = None) -> None:
        self.seconds: list[float] = []
        self._prober = prober
        if prober is not None:
            prober.reset()
        self._offload = getattr(model, "finemoe", None)
        if self._offload is not None:
            self._offload.reset_stats()
        self._disk_bytes = _disk_bytes()

    def phase(self) -> Phase:
        after = _disk_bytes()
        if after is not None and self._prober is not None:
            after -= self._prober.read_bytes
        disk_bytes = None if after is None or self._disk_bytes is None else after - self._disk_bytes
        if self._offload is None:
            return Phase(tuple(self.seconds), disk_bytes)
        link_bytes_s = self._prober.bandwidth_bytes_s if self._prober else None
        return Phase(tuple(self.seconds), disk_bytes, link_bytes_s=link_bytes_s, **counted(self._offload))


def _disk_bytes() -> int | None:
    """What this process has read from storage, by whatever way."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None


def _memory_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that are in memory, shared ones once."""
    held = {(t.data_ptr(), t.nbytes) for t in tensors if t.device.type != "meta"}
    return sum(nbytes for _, nbytes in held)


def _hash(logits: Tensor) -> str:
    return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def main(order_path: str, result_path: str) -> int:
    """Runs an order. Writes the result, or one line about what is wrong."""
    transformers.utils.logging.disable_progress_bar()
    order = Order.from_dict(json.loads(Path(order_path).read_text()))
    if order.subject.kind == "finemoe":  # as its command line does; transformers runs as it comes
        return_freed_memory()
    try:
        result = asdict(measure_answers(order) if order.requests else measure(order))
    except (FinemoeError, ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        sys.stderr.write(f"{type(error).__name__}: {lines[0]}\n")
        return 2
    Path(result_path).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
