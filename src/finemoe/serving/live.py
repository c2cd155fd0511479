"""Per-second samples of a running server, kept for ten minutes: throughput, latency, hit rate, stalls."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from finemoe.metrics import PerExpert, Stats
from finemoe.serving.scheduler.job import WorkerLoad

INTERVAL_S = 1.0
MAX_SAMPLES = 600  # ten minutes


class ProgressDelta(NamedTuple):
    """Tokens and latencies since the last `ProgressCounters.take`."""

    tokens: int
    ttft_s: tuple[float, ...]  # of the answers whose first token was generated
    tpot_s: tuple[float, ...]  # of the answers with more than one token that finished


class ProgressCounters:
    """Thread-safe counters of generated tokens and latencies; a `ProgressListener`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = 0
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []

    def token(self, count: int = 1) -> None:
        """Counts generated tokens."""
        with self._lock:
            self._tokens += count

    def first_token(self, ttft_s: float) -> None:
        """Records the time to first token of an answer."""
        with self._lock:
            self._ttft_s.append(ttft_s)

    def finished(self, tpot_s: float) -> None:
        """Records the mean time per token after the first of a finished answer."""
        with self._lock:
            self._tpot_s.append(tpot_s)

    def take(self) -> ProgressDelta:
        """Returns the counts since the last call and resets them; for a single consumer."""
        with self._lock:
            delta = ProgressDelta(self._tokens, tuple(self._ttft_s), tuple(self._tpot_s))
            self._tokens, self._ttft_s, self._tpot_s = 0, [], []
        return delta


class StatsProvider(Protocol):
    """The part of `model.finemoe` that live data needs."""

    def watch(self) -> None: ...

    def experts(self) -> PerExpert: ...

    def stats(self) -> Stats: ...


@dataclass(frozen=True)
class LiveSource:
    """The objects that live data is read from.

    Attributes:
        offload: `model.finemoe`.
        progress: counts tokens and latencies of requests.
        load: the worker's `load`.
        name: the model's name in requests; `None` for its own name.
    """

    offload: StatsProvider
    progress: ProgressCounters
    load: Callable[[], WorkerLoad]
    name: str | None = None


@dataclass(frozen=True)
class Sample:
    """Measurements of one interval; `None` where nothing happened that could be measured."""

    time_s: float  # end of the interval, seconds since the epoch
    tok_s: float
    ttft_s: float | None  # mean over the answers whose first token was generated
    tpot_s: float | None  # mean over the answers that finished
    hit_rate: float | None
    bytes_s: float  # bytes of experts transferred per second
    stall_share: float  # share of the interval in which a layer waited for experts
    running: int
    waiting: int


class LiveSampler:
    """Samples a server once per second on its own thread.

    Args:
        source: what is sampled.
        clock: returns seconds; measures the length of an interval.
    """

    def __init__(self, source: LiveSource, clock: Callable[[], float] = time.perf_counter) -> None:
        self._source = source
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._previous: Stats = source.offload.stats()
        self._previous_s = clock()

    def start(self) -> None:
        """Starts the thread."""
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="finemoe-live", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def sample(self) -> Sample:
        """Takes and keeps a sample of the time since the last one."""
        stats, load, delta, now_s = (
            self._source.offload.stats(),
            self._source.load(),
            self._source.progress.take(),
            self._clock(),
        )
        sample = _make_sample(self._previous, stats, load, delta, max(now_s - self._previous_s, 1e-9))
        self._previous, self._previous_s = stats, now_s
        self._samples.append(sample)
        return sample

    def since(self, time_s: float) -> dict[str, list[Any]]:
        """All samples that ended after `time_s`, oldest first, as one list per field of `Sample`."""
        rows = [asdict(each) for each in tuple(self._samples) if each.time_s > time_s]
        return {field.name: [row[field.name] for row in rows] for field in fields(Sample)}

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            self.sample()


def _make_sample(before: Stats, after: Stats, load: WorkerLoad, progress: ProgressDelta, elapsed_s: float) -> Sample:
    """The difference of two snapshots. A counter that shrank was reset in between: its new value is the difference."""

    def difference(name: str) -> float:
        old, new = getattr(before, name), getattr(after, name)
        return float(new - old if new >= old else new)

    accesses = difference("hits") + difference("late") + difference("misses")
    return Sample(
        time_s=time.time(),
        tok_s=progress.tokens / elapsed_s,
        ttft_s=_mean(progress.ttft_s),
        tpot_s=_mean(progress.tpot_s),
        hit_rate=difference("hits") / accesses if accesses else None,
        bytes_s=difference("bytes_read") / elapsed_s,
        stall_share=min(1.0, difference("stall_s") / elapsed_s),
        running=load.running,
        waiting=load.waiting,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
