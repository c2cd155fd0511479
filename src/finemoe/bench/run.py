"""The benchmark: a process for every row, one after another, the disk measured and its cache emptied in between."""

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

from finemoe.bench import disk_probe as link
from finemoe.bench.config import BATCHED, DISK_OFFLOAD, BenchConfig
from finemoe.bench.inputs import Requests, read_requests, read_text
from finemoe.bench.measurements import Answered, Measured, Order, Subject, subjects
from finemoe.bench.report import ANSWER_NAMES, NAMES, BenchReport, BenchRun, summarise
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
    """Measures everything that `config` names. A row that fails is reported as failed; the others go on.

    Args:
        log: takes a line about what goes on.

    Raises:
        FinemoeError: there is nothing to measure: no such model, policy or weights; or a budget is below the minimum.
    """
    refuse_gguf(config.model, "bench")
    checkpoint = locate(chosen_model(config.model), config.revision)
    described = describe(str(checkpoint.folder), trust_remote_code=config.trust_remote_code)
    expert_index = described.expert_index
    refuse_budgets(config, checkpoint)
    if config.replay_routing is not None:
        experts = [layout.experts for layout in expert_index.layouts]
        with open_routing(config.replay_routing) as trace:
            check_fit(trace, checkpoint.name, described.layers, experts, described.active)
    expert_bytes = expert_index.weight_bytes // expert_index.experts
    requests = read_requests(config, checkpoint, log)
    text = read_text(config, checkpoint)
    make_copies(config, checkpoint, expert_index, log)
    bench = _Bench(replace(config, model=str(checkpoint.folder)), checkpoint, expert_bytes, requests, text, log)
    runs = [bench.run(subject, repeat) for repeat in range(config.repeats) for subject in bench.due(repeat)]
    rows, fastest = summarise(runs)
    return BenchReport(
        model=checkpoint.name,
        host=describe_host(),
        link_held_bytes_s=config.link_bandwidth_bytes_s,
        replayed_routing=config.replay_routing,
        settings={name: value for name, value in asdict(config).items() if name != "model"},
        link_direct=all(probe.direct for probe in bench.probes),
        link_bytes_s=tuple(probe.bandwidth_bytes_s for probe in bench.probes),
        rows=rows,
        fastest_resident=fastest,
        names=ANSWER_NAMES if requests.measured else NAMES,
        requests=_sizes(requests) if requests.measured else None,
        perplexity_tokens=len(text),
    )


def refuse_budgets(config: BenchConfig, checkpoint: Checkpoint) -> None:
    """Looks at headers only.

    Raises:
        BudgetError: a row could never load its model with one of the budgets; the message names the minimum.
    """
    model_config = read_config(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    for expert_dtype in config.expert_dtypes:
        described = describe(
            str(checkpoint.folder), trust_remote_code=config.trust_remote_code, expert_dtype=expert_dtype
        )
        for budget in config.budgets:
            pool_slots(described.expert_index, model_config, budget, described.expert_index.slot_bytes)


def make_copies(config: BenchConfig, checkpoint: Checkpoint, expert_index: ExpertIndex, log: Log) -> None:
    """The quantized copies that lossy rows read, so that no row's time to load has their making in it."""
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
    """What the figures depend on."""
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


class _Bench:
    """One benchmark under way."""

    def __init__(
        self,
        config: BenchConfig,
        checkpoint: Checkpoint,
        expert_bytes: int,
        requests: Requests,
        perplexity_ids: tuple[int, ...],
        log: Log,
    ) -> None:
        self.probes: list[link.LinkProbe] = []
        self._config = config
        self._checkpoint = checkpoint
        self._expert_bytes = expert_bytes
        self._requests = requests
        self._perplexity_ids = perplexity_ids
        self._log = log
        self._memory_bytes = 0  # dense weights and pool of the first finemoe row that ran
        text = read_config(checkpoint.folder, trust_remote_code=config.trust_remote_code).get_text_config()
        chooser = random.Random(config.seed)  # noqa: S311 - tokens of a prompt
        draw = [chooser.randrange(text.vocab_size) for _ in range(config.prompt_tokens + config.context_tokens)]
        self._prompt, self._context = tuple(draw[: config.prompt_tokens]), tuple(draw[config.prompt_tokens :])

    def due(self, repeat: int) -> list[Subject]:
        """The rows of a repeat: those that take minutes are measured once."""
        slow = {BATCHED, DISK_OFFLOAD}
        return [s for s in subjects(self._config) if repeat == 0 or not slow & {s.kind, s.implementation}]

    def run(self, subject: Subject, repeat: int) -> BenchRun:
        self._log(f"{subject.name} ({repeat + 1} of {self._config.repeats}) ...")
        self._probe()
        link.evict(self._checkpoint.files)
        cached_share = link.cached_share(self._checkpoint.files)
        if cached_share is not None and cached_share > 0.05:
            self._log(f"  {cached_share:.0%} of the checkpoint stay in the page cache: another process has it open")
        outcome = self._measure(subject)
        self._probe()
        link_bytes_s = sum(probe.bandwidth_bytes_s for probe in self.probes[-2:]) / 2
        held = self._config.link_bandwidth_bytes_s
        if held is not None and subject.kind == "finemoe":
            link_bytes_s = min(link_bytes_s, held)
        if isinstance(outcome, str):
            self._log(f"  failed: {outcome}")
            return BenchRun(subject, repeat, link_bytes_s, cached_share, error=outcome)
        run = BenchRun(subject, repeat, link_bytes_s, cached_share, outcome)
        if subject.kind == "finemoe" and not self._memory_bytes:
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
            self.probes.append(link.probe(self._checkpoint.files, total_bytes, seed, self._expert_bytes))
        except OSError as error:
            raise CheckpointError(f"{error.filename or self._checkpoint.folder}: can't be read ({error})") from error

    def _measure(self, subject: Subject) -> Measured | Answered | str:
        """Runs a row in a process of its own. Returns one line if it fails."""
        config = self._config
        if subject.kind == "disk-offload" and not self._memory_bytes:
            return "there is no finemoe row to take the memory of"
        load = config.load_config(
            subject.budget or config.budgets[0], subject.policy or config.policies[0], subject.expert_dtype
        )
        compared = subject.kind == "finemoe" or subject.implementation == "eager"
        with tempfile.TemporaryDirectory(prefix="finemoe-bench-", dir=config.offload_dir) as scratch:
            order = Order(
                subject=subject,
                load=asdict(load),
                prompt=self._prompt,
                context=self._context,
                new_tokens=config.offload_tokens if subject.kind == "disk-offload" else config.new_tokens,
                threads=config.threads,
                expert_bytes=self._expert_bytes,
                memory_bytes=self._memory_bytes,
                offload_folder=scratch,
                requests=self._requests.measured,
                warm=self._requests.warm,
                store="" if config.store is None else str(Path(config.store).absolute()),
                replay_routing=config.replay_routing,
                text=self._perplexity_ids if compared else (),
            )
            return run_order(order, Path(scratch), config.timeout_s)


def run_order(order: Order, scratch: Path, timeout_s: float) -> Measured | Answered | str:
    """Runs an order in a process of its own. Returns the last line of its complaint if it fails."""
    order_file, result_file = scratch / "order.json", scratch / "result.json"
    order_file.write_text(json.dumps(asdict(order)))
    command = [sys.executable, "-m", "finemoe.bench.worker_process", str(order_file), str(result_file)]
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
        return Answered.from_dict(raw) if order.requests else Measured.from_dict(raw)
    if done.returncode == -signal.SIGKILL:
        return "killed, perhaps for want of memory"
    return lines[-1] if lines else f"ended with exit status {done.returncode}"
