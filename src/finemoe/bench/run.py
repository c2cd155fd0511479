"""Runs a benchmark: a process per row, in turn, measuring the disk and evicting the page cache in between."""

from __future__ import annotations

import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from finemoe.bench import disk_probe
from finemoe.bench.config import BATCHED, DISK_OFFLOAD, BenchConfig
from finemoe.bench.inputs import Requests, read_requests, read_text
from finemoe.bench.measurements import PromptsResult, RandomTokensResult, Variant, WorkerTask, variants
from finemoe.bench.row_metrics import PROMPT_FIGURES, RANDOM_TOKEN_FIGURES, BenchReport, BenchRun, summarise
from finemoe.checkpoint import Checkpoint, ExpertIndex, locate, read_headers
from finemoe.errors import CheckpointError
from finemoe.gguf.locate import refuse_gguf
from finemoe.model import chosen_model, read_config
from finemoe.model.describe import describe
from finemoe.model.introspect import pool_slots
from finemoe.store import DiskStore
from finemoe.store.quantization import SCHEMES
from finemoe.store.quantized_copy import ExpertCopy, copy_folder
from finemoe.system import available_cores, evict_from_page_cache
from finemoe.trace.forced_routing import check_fit, open_routing

Log = Callable[[str], None]


def run_bench(config: BenchConfig, log: Log) -> BenchReport:
    """Measures all rows that `config` names. A failing row is reported; the others still run.

    Args:
        log: called with lines on the progress.

    Raises:
        FinemoeError: no such model, policy or weights, or a budget is below the minimum.
    """
    refuse_gguf(config.model, "bench")
    checkpoint = locate(chosen_model(config.model), config.revision)
    described = describe(str(checkpoint.folder), trust_remote_code=config.trust_remote_code)
    expert_index = described.expert_index
    check_budgets(config, checkpoint)
    if config.replay_routing is not None:
        experts = [layout.experts for layout in expert_index.layouts]
        with open_routing(config.replay_routing) as trace:
            check_fit(trace, checkpoint.name, described.layers, experts, described.active)
    expert_bytes = expert_index.weight_bytes // expert_index.experts
    requests = read_requests(config, checkpoint, log)
    text = read_text(config, checkpoint)
    write_quantized_copies(config, checkpoint, expert_index, log)
    runner = _BenchRunner(replace(config, model=str(checkpoint.folder)), checkpoint, expert_bytes, requests, text, log)
    runs = [runner.run(variant, repeat) for repeat in range(config.repeats) for variant in runner.variants(repeat)]
    rows, fastest = summarise(runs)
    return BenchReport(
        model=checkpoint.name,
        host=describe_host(),
        link_limit_bytes_s=config.link_bandwidth_bytes_s,
        replayed_routing=config.replay_routing,
        settings={name: value for name, value in asdict(config).items() if name != "model"},
        link_direct=all(probe.direct for probe in runner.probes),
        link_bytes_s=tuple(probe.bandwidth_bytes_s for probe in runner.probes),
        rows=rows,
        fastest_resident=fastest,
        names=PROMPT_FIGURES if requests.measured else RANDOM_TOKEN_FIGURES,
        requests=_sizes(requests) if requests.measured else None,
        perplexity_tokens=len(text),
    )


def check_budgets(config: BenchConfig, checkpoint: Checkpoint) -> None:
    """Checks all budgets, reading headers only.

    Raises:
        BudgetError: a budget is below the minimum of a row, which the message names.
    """
    model_config = read_config(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    for expert_dtype in config.expert_dtypes:
        described = describe(
            str(checkpoint.folder), trust_remote_code=config.trust_remote_code, expert_dtype=expert_dtype
        )
        for budget in config.budgets:
            pool_slots(described.expert_index, model_config, budget, described.expert_index.slot_bytes)


def write_quantized_copies(config: BenchConfig, checkpoint: Checkpoint, expert_index: ExpertIndex, log: Log) -> None:
    """Writes the quantized copies that lossy rows read, so that this is not in their load times."""
    for scheme in (SCHEMES[name] for name in config.expert_dtypes if name in SCHEMES):
        copy = ExpertCopy(expert_index, scheme, copy_folder(checkpoint, read_headers(checkpoint.files), scheme))
        log(f"copy of the experts as {scheme.name} ...")
        with closing(DiskStore(checkpoint.files, expert_index, config.io)) as store:
            copy.write(store)
        for file in copy.files:
            evict_from_page_cache(file)


def _sizes(requests: Requests) -> dict[str, int]:
    return {
        "requests": len(requests.measured),
        "prompt_tokens": sum(map(len, requests.measured)),
        "warm_requests": len(requests.warm),
        "stored_requests": requests.stored,
    }


def describe_host() -> dict[str, str | int]:
    """The hardware and the versions that the figures depend on."""
    model = platform.processor() or platform.machine()
    try:
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        pass
    return {
        "cpu": model,
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "platform": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "finemoe")},
    }


class _BenchRunner:
    """Runs the rows of one benchmark."""

    def __init__(
        self,
        config: BenchConfig,
        checkpoint: Checkpoint,
        expert_bytes: int,
        requests: Requests,
        perplexity_ids: tuple[int, ...],
        log: Log,
    ) -> None:
        self.probes: list[disk_probe.DiskProbe] = []
        self._config = config
        self._checkpoint = checkpoint
        self._expert_bytes = expert_bytes
        self._requests = requests
        self._perplexity_ids = perplexity_ids
        self._log = log
        self._memory_bytes = 0  # dense weights and pool of the first finemoe row that ran
        text = read_config(checkpoint.folder, trust_remote_code=config.trust_remote_code).get_text_config()
        random_source = random.Random(config.seed)  # noqa: S311 - not for security
        draw = [random_source.randrange(text.vocab_size) for _ in range(config.prompt_tokens + config.context_tokens)]
        self._prompt, self._context = tuple(draw[: config.prompt_tokens]), tuple(draw[config.prompt_tokens :])

    def variants(self, repeat: int) -> list[Variant]:
        """The rows of a repeat; those that take minutes are measured once."""
        slow = {BATCHED, DISK_OFFLOAD}
        return [s for s in variants(self._config) if repeat == 0 or not slow & {s.kind, s.implementation}]

    def run(self, variant: Variant, repeat: int) -> BenchRun:
        self._log(f"{variant.name} ({repeat + 1} of {self._config.repeats}) ...")
        self._probe()
        disk_probe.evict(self._checkpoint.files)
        cached_share = disk_probe.cached_share(self._checkpoint.files)
        if cached_share is not None and cached_share > 0.05:
            self._log(f"  {cached_share:.0%} of the checkpoint stays in the page cache: another process has it open")
        outcome = self._measure(variant)
        self._probe()
        link_bytes_s = sum(probe.bandwidth_bytes_s for probe in self.probes[-2:]) / 2
        limit = self._config.link_bandwidth_bytes_s
        if limit is not None and variant.kind == "finemoe":
            link_bytes_s = min(link_bytes_s, limit)
        if isinstance(outcome, str):
            self._log(f"  failed: {outcome}")
            return BenchRun(variant, repeat, link_bytes_s, cached_share, error=outcome)
        run = BenchRun(variant, repeat, link_bytes_s, cached_share, outcome)
        if variant.kind == "finemoe" and not self._memory_bytes:
            self._memory_bytes = outcome.weight_bytes
        ttft_s, tpot_s = run.figures["ttft_s"], run.figures["tpot_s"]
        self._log(
            f"  load {outcome.load_s:.1f} s, TTFT {ttft_s or 0:.2f} s, TPOT {1000 * (tpot_s or 0):.1f} ms, "
            f"disk {link_bytes_s / 1e9:.2f} GB/s"
        )
        return run

    def _probe(self) -> None:
        config = self._config
        total_bytes, seed = config.link_probe_mib << 20, config.seed + len(self.probes)
        try:
            self.probes.append(disk_probe.probe(self._checkpoint.files, total_bytes, seed, self._expert_bytes))
        except OSError as error:
            raise CheckpointError(f"{error.filename or self._checkpoint.folder}: can't be read ({error})") from error

    def _measure(self, variant: Variant) -> RandomTokensResult | PromptsResult | str:
        """Runs a row in its own process. Returns its result, or one line if it fails."""
        config = self._config
        if variant.kind == "disk-offload" and not self._memory_bytes:
            return "there is no finemoe row whose memory it could be given"
        load = config.load_config(
            variant.budget or config.budgets[0], variant.policy or config.policies[0], variant.expert_dtype
        )
        measures_perplexity = variant.kind == "finemoe" or variant.implementation == "eager"
        with tempfile.TemporaryDirectory(prefix="finemoe-bench-", dir=config.offload_dir) as scratch:
            task = WorkerTask(
                variant=variant,
                load=asdict(load),
                prompt=self._prompt,
                context=self._context,
                new_tokens=config.offload_tokens if variant.kind == "disk-offload" else config.new_tokens,
                threads=config.threads,
                expert_bytes=self._expert_bytes,
                memory_bytes=self._memory_bytes,
                offload_folder=scratch,
                requests=self._requests.measured,
                warm=self._requests.warm,
                store="" if config.store is None else str(Path(config.store).absolute()),
                replay_routing=config.replay_routing,
                text=self._perplexity_ids if measures_perplexity else (),
            )
            return run_worker(task, Path(scratch), config.timeout_s)


def run_worker(task: WorkerTask, scratch: Path, timeout_s: float) -> RandomTokensResult | PromptsResult | str:
    """Runs a task in a worker process. Returns its result, or its last line of output if it fails."""
    task_file, result_file = scratch / "task.json", scratch / "result.json"
    task_file.write_text(json.dumps(asdict(task)))
    command = [sys.executable, "-m", "finemoe.bench.worker_process", str(task_file), str(result_file)]
    with (scratch / "stderr.txt").open("w+") as stderr:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"took longer than {timeout_s:.0f} s"
        stderr.seek(0)
        lines = stderr.read().strip().splitlines()
    if done.returncode == 0 and result_file.exists():
        raw: dict[str, Any] = json.loads(result_file.read_text())
        return PromptsResult.from_dict(raw) if task.requests else RandomTokensResult.from_dict(raw)
    if done.returncode == -signal.SIGKILL:
        return "killed, perhaps out of memory"
    return lines[-1] if lines else f"ended with exit status {done.returncode}"
