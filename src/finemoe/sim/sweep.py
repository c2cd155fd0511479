"""A sweep: a grid of simulated cells, in parallel processes, and their rows."""

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
from finemoe.sim.simulator import Outcome, Simulation
from finemoe.sim.workload import Schedule, TraceView, make_schedule
from finemoe.system import available_cores
from finemoe.trace import Trace, TraceHeader, open_trace, split

_RESAMPLES = 1000


@dataclass(frozen=True)
class Cell:
    """One policy under one budget and one link ratio."""

    policy: str
    expert_memory: float  # share of all routed experts
    link_ratio: float


@dataclass(frozen=True)
class SweepRow:
    """Result of a cell. An access is one distinct expert needed by one layer of one iteration.

    Times are per layer, in units of one layer's compute for one token, and exclude gaps between iterations; rates are
    shares of all accesses; the machine's settings are those of `Machine`. docs/simulator.md explains every column.

    Attributes:
        precision: prefetched and used / prefetched; `None` without a prefetch.
        wasted_per_layer: experts prefetched, and evicted or cancelled unused.
        regretted_per_layer: misses of experts that were evicted for a prefetch.
        paused: share of iterations with prefetching throttled.
        link_busy: share of the time, gaps included, in which a link transfers; the mean over devices.
        emulated: which input was emulated from the recorded routing, and how.
        time_per_layer_p50, time_per_layer_p95, time_per_layer_p99: percentiles over iterations.
        time_per_layer_low, time_per_layer_high: 95% interval, bootstrapped over requests; `None` if they interleave.
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
        """The row as JSON values."""
        return asdict(self)


def runnable(config: SimulateConfig, header: TraceHeader) -> tuple[tuple[str, ...], dict[str, str]]:
    """The policies whose inputs this trace has, and the reason why each of the others is left out."""
    recorded = set(header.fields) | ({"gates"} if {"probs", "weights"} & set(header.fields) else set())
    if config.gate_recalls:
        recorded.add("lookahead")
    if config.predictors is not None:
        recorded.add("predictors")
    remedies = {
        "lookahead": "--gate-recall emulates it",
        "predictors": "train them with finemoe trace train, and give --predictors",
    }
    left_out = {}
    for name in config.policies:
        missing = sorted(policy_or_bound_class(name).needs - recorded)
        if missing:
            hints = "; ".join(remedies[field] for field in missing if field in remedies)
            left_out[name] = f"this trace has no {' and no '.join(missing)}{f' ({hints})' if hints else ''}"
    return tuple(name for name in config.policies if name not in left_out), left_out


def run_cells(
    trace: str, config: SimulateConfig, cells: Sequence[Cell], progress: Callable[[int], None]
) -> Iterator[SweepRow]:
    """Runs all cells and yields their rows in order of completion.

    Args:
        progress: called with the number of iterations done since the last call.

    Raises:
        ConfigError: there is no request to replay, a budget is too small, or a process was killed.
    """
    header = _load_input(trace, config).trace.header
    for cell in cells:
        _slots(cell, header, config)
    workers = min(config.workers or available_cores(), len(cells))
    if workers == 1:
        for cell in cells:
            yield run_cell(trace, config, cell, progress)
        return
    compiler()  # imports numba here, so that its absence is one error and not one per process
    context = multiprocessing.get_context("spawn")
    progress_queue = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, initializer=_set_progress_queue, initargs=(progress_queue,)) as pool:
        others = set(multiprocessing.active_children())
        try:
            with _block_sigint():
                pending: set[Future[SweepRow]] = {pool.submit(_run, trace, config, cell) for cell in cells}
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not progress_queue.empty():
                    progress(progress_queue.get())
                for future in done:
                    yield future.result()
        except BaseException as error:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()  # its cell may take minutes more
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise ConfigError("--workers: a process was killed, perhaps out of memory; try fewer") from error
            raise


@contextmanager
def _block_sigint() -> Iterator[None]:
    """Blocks SIGINT. Processes started meanwhile inherit that: their parent terminates them, without a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def run_cell(
    trace: str, config: SimulateConfig, cell: Cell, progress: Callable[[int], None] = lambda _: None
) -> SweepRow:
    """Runs one cell in this process.

    Raises:
        ConfigError, TraceError: a setting or a trace is refused.
    """
    trace_input = _load_input(trace, config)
    header, schedule = trace_input.trace.header, trace_input.schedule
    jit = compiler()
    options = trace_input.options(cell.policy)
    policy = make_policy(cell.policy, header.layers, header.experts, jit=jit, **options)
    if type(policy).learn is not Policy.learn:
        for recorded in trace_input.store.recorded(trace_input.learned):
            policy.learn(recorded)
    machine = Machine(
        capacity=_slots(cell, header, config), link_ratio=cell.link_ratio, devices=config.devices, chunks=config.chunks,
        ready_first=not config.no_ready_first, tokens_per_unit=config.tokens_per_unit,
        seed=config.seed, **{name: getattr(config, name) for name in TIMING},
    )  # fmt: skip
    outcome = Simulation(schedule, trace_input.view, policy, machine, jit).run(progress)
    recalls = config.gate_recalls[: policy.lookahead] if "lookahead" in policy.needs | policy.uses else ()
    emulated = f"lookahead, recall {', '.join(map(str, recalls))}" if recalls else None
    low, high = interval(schedule, outcome, config.seed)
    return replace(summarise(cell, machine, outcome, emulated), time_per_layer_low=low, time_per_layer_high=high)


def interval(schedule: Schedule, outcome: Outcome, seed: int) -> tuple[float | None, float | None]:
    """A 95% interval of the time per layer, bootstrapped over requests; `None`s if they interleave."""
    if len(schedule.request) != len(schedule):
        return None, None
    requests, number = np.unique(schedule.request, return_inverse=True)
    times = np.bincount(number, outcome.iteration_times) / outcome.layers
    iterations = np.bincount(number)
    drawn = np.random.default_rng(seed).integers(0, len(requests), (_RESAMPLES, len(requests)))
    low, high = np.percentile(times[drawn].sum(1) / iterations[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def summarise(cell: Cell, machine: Machine, outcome: Outcome, emulated: str | None) -> SweepRow:
    """The row of a cell: rates from counts, without the interval."""
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
            f"--expert-memory: {100 * cell.expert_memory:g}% of {total} experts is less than one per device; "
            f"{ceil(1000 * config.devices / total) / 10:g}% is enough"
        )
    return capacity


@dataclass(frozen=True, eq=False)
class _TraceInput:
    """What all cells of a sweep share: the trace, its schedule, and the requests to learn from."""

    trace: Trace
    view: TraceView
    schedule: Schedule
    store: TraceView
    learned: Sequence[int]
    config: SimulateConfig

    def options(self, policy: str) -> dict[str, Any]:
        """Arguments of a policy's constructor beyond the model's shape."""
        kind = policy_or_bound_class(policy)
        options: dict[str, Any] = {}
        if kind.clairvoyant:
            schedule = self.schedule
            options["future"] = compute_future(
                schedule.layers, schedule.experts, schedule.ptr, schedule.needs, compiler()
            )
        if "predictors" in kind.needs:
            from finemoe.learned.promoe_predictors import load

            assert self.config.predictors is not None
            header = self.trace.header
            options["predictors"] = load(Path(self.config.predictors), header.fingerprint or header.model)
        return options


@cache
def _load_input(path: str, config: SimulateConfig) -> _TraceInput:
    jit = compiler()
    trace = open_trace(path)
    view = TraceView(trace, config.gate_recalls, config.seed, jit)
    if config.store is not None:
        store_trace = open_trace(config.store)
        _, replayed = split(len(trace), 0.0, config.seed)
        store, learned = TraceView(store_trace, jit=jit), list(range(len(store_trace)))
        if (store_trace.header.layers, store_trace.header.experts) != (trace.header.layers, trace.header.experts):
            raise ConfigError(f"--store: {config.store} has another number of layers or experts than {path}")
    else:
        kept, replayed = split(len(trace), config.learned_share, config.seed)
        store, learned = view, kept.tolist()
    chosen = replayed.tolist()[: config.requests]
    if not chosen:
        raise ConfigError(f"--store-split: none of the {len(trace)} requests of {path} is left to replay")
    schedule = make_schedule(trace, chosen, config.interleave, jit)
    return _TraceInput(trace, view, schedule, store, learned, config)


def count_iterations(trace: str, config: SimulateConfig) -> int:
    """The number of iterations of every cell of a configuration."""
    return len(_load_input(trace, config).schedule)


_progress_queue: Any = None


def _set_progress_queue(queue: Any) -> None:
    global _progress_queue  # noqa: PLW0603 - one per worker process
    _progress_queue = queue


def _run(trace: str, config: SimulateConfig, cell: Cell) -> SweepRow:
    return run_cell(trace, config, cell, _progress_queue.put)
