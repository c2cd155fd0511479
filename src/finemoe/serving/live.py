"""The last ten minutes of a server, second by second."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from finemoe.metrics import PerExpert, Stats
from finemoe.serving.scheduler.job import Load


class Taken(NamedTuple):
    """What came since the last `take`."""

    tokens: int
    ttft_s: tuple[float, ...]  # of the answers whose first token came
    tpot_s: tuple[float, ...]  # of the answers that ended after more than one token


class Progress:
    """Tokens as they come, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = 0
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []

    def token(self, count: int = 1) -> None:
        """So many tokens of an answer came."""
        with self._lock:
            self._tokens += count

    def first_token(self, ttft_s: float) -> None:
        """An answer's first token came, this long after its request."""
        with self._lock:
            self._ttft_s.append(ttft_s)

    def finished(self, tpot_s: float) -> None:
        """An answer of more than one token ended; each after the first took this long, on average."""
        with self._lock:
            self._tpot_s.append(tpot_s)

    def take(self) -> Taken:
        """What came since the last call; belongs to one consumer."""
        with self._lock:
            taken = Taken(self._tokens, tuple(self._ttft_s), tuple(self._tpot_s))
            self._tokens, self._ttft_s, self._tpot_s = 0, [], []
        return taken


INTERVAL_S = 1.0
KEPT = 600  # samples: ten minutes


class Offloaded(Protocol):
    """What is looked at of an offloaded model: `model.finemoe`."""

    def watch(self) -> None: ...

    def experts(self) -> PerExpert: ...

    def stats(self) -> Stats: ...


@dataclass(frozen=True)
class LiveSource:
    """Where live state comes from.

    Attributes:
        offload: `model.finemoe`.
        progress: the server tells it of tokens and times.
        load: the worker's.
        name: of the model, in requests; `None`: its own.
    """

    offload: Offloaded
    progress: Progress
    load: Callable[[], Load]
    name: str | None = None


@dataclass(frozen=True)
class Sample:
    """One interval. `None`: nothing happened that could be measured."""

    time_s: float  # when it ended, since the epoch
    tok_s: float
    ttft_s: float | None  # mean over the answers whose first token came
    tpot_s: float | None  # mean over the answers that ended
    hit_rate: float | None
    bytes_s: float  # of experts moved
    stall_share: float  # of the interval, the part in which a layer waited for experts
    running: int
    waiting: int


class Live:
    """Samples a server once a second on a thread of its own.

    Args:
        source: what is sampled.
        clock: seconds, for the length of an interval.
    """

    def __init__(self, source: LiveSource, clock: Callable[[], float] = time.perf_counter) -> None:
        self._source = source
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: Stats = source.offload.stats()
        self._before_s = clock()

    def start(self) -> None:
        """Begin to sample."""
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="finemoe-live", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def sample(self) -> Sample:
        """What happened since the last sample, kept as the newest."""
        stats, load, taken, now_s = (
            self._source.offload.stats(),
            self._source.load(),
            self._source.progress.take(),
            self._clock(),
        )
        found = _difference(self._before, stats, load, taken, max(now_s - self._before_s, 1e-9))
        self._before, self._before_s = stats, now_s
        self._samples.append(found)
        return found

    def since(self, time_s: float) -> dict[str, list[Any]]:
        """All samples that ended after `time_s`, oldest first, as one list for each field of `Sample`."""
        kept = [asdict(each) for each in tuple(self._samples) if each.time_s > time_s]
        return {field.name: [each[field.name] for each in kept] for field in fields(Sample)}

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            self.sample()


def _difference(before: Stats, after: Stats, load: Load, taken: Taken, elapsed_s: float) -> Sample:
    """A sample from two snapshots; of what was reset in between, all is new."""

    def came(name: str) -> float:
        then, now = getattr(before, name), getattr(after, name)
        return float(now - then if now >= then else now)

    accesses = came("hits") + came("late") + came("misses")
    return Sample(
        time_s=time.time(),
        tok_s=taken.tokens / elapsed_s,
        ttft_s=_mean(taken.ttft_s),
        tpot_s=_mean(taken.tpot_s),
        hit_rate=came("hits") / accesses if accesses else None,
        bytes_s=came("bytes_read") / elapsed_s,
        stall_share=min(1.0, came("stall_s") / elapsed_s),
        running=load.running,
        waiting=load.waiting,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
