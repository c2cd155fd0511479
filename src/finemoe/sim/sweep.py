"""Runs the cells of a table, several at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.errors import ConfigError
from finemoe.jit import compiler
from finemoe.policy import Policy, compute_future, make_policy, policy_or_bound_class
from finemoe.sim.config import SimulateConfig
from finemoe.sim.hardware import TIMING, Machine
from finemoe.sim.simulator import Outcome, Replay
from finemoe.sim.workload import Schedule, TraceView, make_schedule
from finemoe.system import available_cores
from finemoe.trace import Trace, TraceHeader, open_trace, split

_RESAMPLES = 1000


@dataclass(frozen=True)
class Cell:
    """One policy under one budget and one link."""

    policy: str
    expert_memory: float  # share of all routed experts
    link_ratio: float


@dataclass(frozen=True)
class SweepRow:
    """A cell's result. An access is one distinct expert needed by one layer of one iteration.

    Times are per layer and in units of one layer's compute for one token, `before_gate` of it before the gate and the
    rest after; `link_ratio` is the time to move one expert in the same unit. `gap` is the time between an iteration's
    last layer and the next one's first, which no other time includes; `lag` is that from a gate until a policy that
    searches has its say; what is prefetched takes `prefetch_slowdown` times the link ratio. `compute_spread`,
    `link_spread` and `lag_spread` are the standard deviations of such times' logarithms. Rates are of all accesses;
    `precision` is prefetched and used / prefetched, `None` without a prefetch. `wasted` counts what was prefetched and
    evicted, or given up, unused; `regretted`, misses of experts that had made room for a prefetch. `paused` is the
    share of iterations in which a policy did not prefetch because that did not pay. `link_busy` is the share of the
    time that a link moves something, the mean over devices, gaps included. `emulated` names what was made up from the
    truth, and how. Percentiles are of whole iterations, per layer. `time_per_layer_low` and `_high` are a 95% interval
    of `time_per_layer`, bootstrapped over requests; `None` where requests are interleaved.
    """

    policy: str
    expert_memory: float
    link_ratio: float
    capacity: int
    iterations: int
    hit_rate: float
    late_rate: float
    miss_rate: float
    stall_per_layer: float
    time_per_layer: float
    time_per_layer_p50: float
    time_per_layer_p95: float
    time_per_layer_p99: float
    transfers_per_layer: float
    wasted_per_layer: float
    regretted_per_layer: float
    paused: float
    precision: float | None
    link_busy: float
    before_gate: float = 0.5
    gap: float = 0.0
    lag: float = 0.0
    begin_lag: float | None = None
    prefetch_slowdown: float = 1.0
    compute_spread: float = 0.0
    link_spread: float = 0.0
    lag_spread: float = 0.0
    emulated: str | None = None
    time_per_layer_low: float | None = None
    time_per_layer_high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def runnable(config: SimulateConfig, header: TraceHeader) -> tuple[tuple[str, ...], dict[str, str]]:
    """The policies that this trace has enough for, and why the others are left out."""
    recorded = set(header.fields) | ({"gates"} if {"probs", "weights"} & set(header.fields) else set())
    if config.gate_recalls:
        recorded.add("lookahead")
    if config.predictors is not None:
        recorded.add("predictors")
    ways = {
        "lookahead": "--gate-recall emulates it",
        "predictors": "train them with finemoe trace train, and give --predictors",
    }
    left_out = {}
    for name in config.policies:
        missing = sorted(policy_or_bound_class(name).needs - recorded)
        if missing:
            hints = "; ".join(ways[field] for field in missing if field in ways)
            left_out[name] = f"this trace has no {' and no '.join(missing)}{f' ({hints})' if hints else ''}"
    return tuple(name for name in config.policies if name not in left_out), left_out


def run_cells(
    trace: str, config: SimulateConfig, cells: Sequence[Cell], progress: Callable[[int], None]
) -> Iterator[SweepRow]:
    """Runs all cells; yields rows as they are done.

    Args:
        progress: told of iterations replayed.

    Raises:
        ConfigError: there is nothing to replay, a budget is too small, or a process was killed.
    """
    header = _subject(trace, config).trace.header
    for cell in cells:
        _slots(cell, header, config)
    workers = min(config.workers or available_cores(), len(cells))
    if workers == 1:
        for cell in cells:
            yield run_cell(trace, config, cell, progress)
        return
    compiler()  # imports numba here once, so that a missing one is one error and not one per process
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, initializer=_tell, initargs=(told,)) as pool:
        others = set(multiprocessing.active_children())
        try:
            with _ctrl_c_held():
                pending: set[Future[SweepRow]] = {pool.submit(_run, trace, config, cell) for cell in cells}
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not told.empty():
                    progress(told.get())
                for future in done:
                    yield future.result()
        except BaseException as error:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()  # in the middle of its cell, which may take minutes more
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise ConfigError("--workers: a process was killed, perhaps for want of memory; try fewer") from error
            raise


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Holds Ctrl-C back. Processes that are started meanwhile never see it: their parent ends them, without a word."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_cell(
    trace: str, config: SimulateConfig, cell: Cell, progress: Callable[[int], None] = lambda _: None
) -> SweepRow:
    """Runs one cell in this process."""
    subject = _subject(trace, config)
    header, schedule = subject.trace.header, subject.schedule
    jit = compiler()
    options = subject.options(cell.policy)
    policy = make_policy(cell.policy, header.layers, header.experts, jit=jit, **options)
    if type(policy).learn is not Policy.learn:
        for recorded in subject.store.recorded(subject.stored):
            policy.learn(recorded)
    machine = Machine(
        capacity=_slots(cell, header, config), link_ratio=cell.link_ratio, devices=config.devices, chunks=config.chunks,
        ready_first=not config.no_ready_first, tokens_per_unit=config.tokens_per_unit,
        seed=config.seed, **{name: getattr(config, name) for name in TIMING},
    )  # fmt: skip
    outcome = Replay(schedule, subject.evidence, policy, machine, jit).run(progress)
    seen = config.gate_recalls[: policy.lookahead] if "lookahead" in policy.needs | policy.uses else ()
    emulated = f"lookahead, recall {', '.join(map(str, seen))}" if seen else None
    low, high = interval(schedule, outcome, config.seed)
    return replace(summarise(cell, machine, outcome, emulated), time_per_layer_low=low, time_per_layer_high=high)


def interval(schedule: Schedule, outcome: Outcome, seed: int) -> tuple[float | None, float | None]:
    """A 95% interval of the time per layer, from requests drawn again with replacement."""
    if len(schedule.request) != len(schedule):
        return None, None
    requests, number = np.unique(schedule.request, return_inverse=True)
    times = np.bincount(number, outcome.iteration_times) / outcome.layers
    iterations = np.bincount(number)
    drawn = np.random.default_rng(seed).integers(0, len(requests), (_RESAMPLES, len(requests)))
    low, high = np.percentile(times[drawn].sum(1) / iterations[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def summarise(cell: Cell, machine: Machine, outcome: Outcome, emulated: str | None) -> SweepRow:
    """From counts to rates."""
    accesses = max(1, outcome.hits + outcome.late + outcome.misses)
    layers = max(1, outcome.iterations * outcome.layers)
    p50, p95, p99 = np.percentile(outcome.iteration_times, (50, 95, 99)) / outcome.layers
    return SweepRow(
        policy=cell.policy, expert_memory=cell.expert_memory, link_ratio=cell.link_ratio, capacity=machine.capacity,
        iterations=outcome.iterations, hit_rate=outcome.hits / accesses, late_rate=outcome.late / accesses,
        miss_rate=outcome.misses / accesses, stall_per_layer=outcome.stall / layers,
        time_per_layer=(outcome.total - machine.gap * outcome.iterations) / layers,
        time_per_layer_p50=float(p50), time_per_layer_p95=float(p95), time_per_layer_p99=float(p99),
        transfers_per_layer=(outcome.misses + outcome.prefetched) / layers,
        wasted_per_layer=outcome.wasted / layers,
        regretted_per_layer=outcome.regretted / layers,
        paused=outcome.paused / max(1, outcome.iterations),
        precision=outcome.prefetched_used / outcome.prefetched if outcome.prefetched else None,
        link_busy=outcome.moved / (outcome.total * machine.devices) if outcome.total else 0.0,
        emulated=emulated, **{name: getattr(machine, name) for name in TIMING},
    )  # fmt: skip


def _slots(cell: Cell, header: TraceHeader, config: SimulateConfig) -> int:
    total = header.layers * header.experts
    capacity = int(cell.expert_memory * total + 1e-9)
    if capacity < config.devices:
        raise ConfigError(
            f"--expert-memory: {100 * cell.expert_memory:g}% of {total} experts is not one for each device; "
            f"{ceil(1000 * config.devices / total) / 10:g}% is"
        )
    return capacity


@dataclass(frozen=True, eq=False)
class _TraceInput:
    """What all cells of a configuration share."""

    trace: Trace
    evidence: TraceView
    schedule: Schedule
    store: TraceView
    stored: Sequence[int]
    config: SimulateConfig

    def options(self, policy: str) -> dict[str, Any]:
        """What a policy is made with beyond the shape."""
        kind = policy_or_bound_class(policy)
        options: dict[str, Any] = {}
        if kind.clairvoyant:
            schedule = self.schedule
            options["future"] = compute_future(
                schedule.layers, schedule.experts, schedule.ptr, schedule.needs, compiler()
            )
        if "predictors" in kind.needs:
            from finemoe.learned.predictors import load

            assert self.config.predictors is not None
            header = self.trace.header
            options["predictors"] = load(Path(self.config.predictors), header.fingerprint or header.model)
        return options


@cache
def _subject(path: str, config: SimulateConfig) -> _TraceInput:
    jit = compiler()
    trace = open_trace(path)
    evidence = TraceView(trace, config.gate_recalls, config.seed, jit)
    if config.store is not None:
        store_trace = open_trace(config.store)
        _, replayed = split(len(trace), 0.0, config.seed)
        store, stored = TraceView(store_trace, jit=jit), list(range(len(store_trace)))
        if (store_trace.header.layers, store_trace.header.experts) != (trace.header.layers, trace.header.experts):
            raise ConfigError(f"--store: {config.store} has another shape than {path}")
    else:
        kept, replayed = split(len(trace), config.learned_share, config.seed)
        store, stored = evidence, kept.tolist()
    chosen = replayed.tolist()[: config.requests]
    if not chosen:
        raise ConfigError(f"--store-split: none of the {len(trace)} requests of {path} is left to replay")
    schedule = make_schedule(trace, chosen, config.interleave, jit)
    return _TraceInput(trace, evidence, schedule, store, stored, config)


def count_iterations(trace: str, config: SimulateConfig) -> int:
    """Of one cell; each cell of a configuration has as many."""
    return len(_subject(trace, config).schedule)


_told: Any = None


def _tell(queue: Any) -> None:
    global _told  # noqa: PLW0603 - a worker process has one parent
    _told = queue


def _run(trace: str, config: SimulateConfig, cell: Cell) -> SweepRow:
    return run_cell(trace, config, cell, _told.put)
