"""What happened, counted. One dataclass, passed in by its owner; never a global."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

_LEAST_S = 1e-9  # what a clock may call 0 has a logarithm


@dataclass(frozen=True, slots=True)
class Durations:
    """Of the same thing: how often it happened, how long that took in all, and how much it varied. Never changes.

    Attributes:
        logs: sum of the durations' logarithms.
        squares: sum of the squares of these.
    """

    count: int = 0
    total_s: float = 0.0
    logs: float = 0.0
    squares: float = 0.0

    @classmethod
    def one(cls, seconds: float) -> Durations:
        """Of what happened once."""
        log = math.log(max(seconds, _LEAST_S))
        return cls(1, seconds, log, log * log)

    def __add__(self, other: Durations) -> Durations:
        return Durations(
            self.count + other.count, self.total_s + other.total_s, self.logs + other.logs, self.squares + other.squares
        )

    def __sub__(self, other: Durations) -> Durations:
        """Without the others, which are among these."""
        return Durations(
            self.count - other.count, self.total_s - other.total_s, self.logs - other.logs, self.squares - other.squares
        )

    @property
    def mean_s(self) -> float | None:
        return self.total_s / self.count if self.count else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the logarithm."""
        if not self.count:
            return None
        return math.sqrt(max(0.0, self.squares / self.count - (self.logs / self.count) ** 2))


NEVER = Durations()


class Timings:
    """Durations that grow in place: cheaper than a new object for each, where a model's layers are timed."""

    __slots__ = ("_count", "_logs", "_squares", "_total_s")

    def __init__(self) -> None:
        self.reset()

    @property
    def so_far(self) -> Durations:
        return Durations(self._count, self._total_s, self._logs, self._squares)

    def add(self, seconds: float) -> None:
        """It happened once more."""
        self._change(1, seconds)

    def take_back(self, seconds: float) -> None:
        """One that was added did not count."""
        self._change(-1, seconds)

    def reset(self) -> None:
        """It has not happened yet."""
        self._count, self._total_s, self._logs, self._squares = 0, 0.0, 0.0, 0.0

    def _change(self, times: int, seconds: float) -> None:
        log = math.log(max(seconds, _LEAST_S))
        self._count += times
        self._total_s += times * seconds
        self._logs += times * log
        self._squares += times * log * log


Source = Literal["demand", "kept", "prefetch", "prefetch-next"]
COUNTS = ("predicted", "hits", "late", "misses", "wasted")


@dataclass(frozen=True)
class ExplainRow:
    """Counts of one layer and one source; the sums over all of them are the engine's own counters.

    `demand`: a miss had brought the expert in, or brings it in now. `kept`: a prefetch had, and it was used before.
    `prefetch`: a prefetch that this was the first use of, `distance` layers ahead of the layer whose gate had spoken
    last (before the first gate, layer 0 is 1 ahead). `prefetch-next`: the same, for the iteration after.
    """

    layer: int
    source: Source
    distance: int | None
    predicted: int  # prefetches begun
    hits: int
    late: int
    misses: int
    wasted: int  # prefetched, and evicted or withdrawn without having been needed

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ExplainRow:
        return cls(**raw)

    @property
    def name(self) -> str:
        """Of the source, for people."""
        if self.source == "prefetch":
            return f"prefetched {self.distance} ahead"
        return {"demand": "demand", "kept": "kept after prefetch"}.get(self.source, "prefetched, next token")


def explain_table(rows: Sequence[ExplainRow]) -> str:
    """Two tables: by source over all layers, and by layer over all sources."""
    order = {"demand": 0, "kept": 1, "prefetch": 2, "prefetch-next": 3}
    ranked = sorted(rows, key=lambda row: (order[row.source], row.distance or 0))
    by_source = _summed(ranked, lambda row: row.name)
    by_layer = _summed(sorted(rows, key=lambda row: row.layer), lambda row: f"layer {row.layer}")
    return "\n".join([*_lines("experts from", by_source), "", *_lines("in", by_layer)])


def _summed(rows: Sequence[ExplainRow], name: Callable[[ExplainRow], str]) -> dict[str, list[int]]:
    sums: dict[str, list[int]] = {}
    for row in rows:
        own = sums.setdefault(name(row), [0] * len(COUNTS))
        for column, count in enumerate(COUNTS):
            own[column] += getattr(row, count)
    return sums


def _lines(title: str, sums: dict[str, list[int]]) -> list[str]:
    width = max(len(title), *map(len, sums), 0) if sums else len(title)
    head = title.ljust(width) + "".join(count.rjust(11) for count in COUNTS)
    return [head, *(name.ljust(width) + "".join(f"{n:11}" for n in counts) for name, counts in sums.items())]


@dataclass
class Counters:
    """Running totals of one engine. An access is one distinct expert needed by one layer of one iteration."""

    layer_calls: int = 0
    hits: int = 0  # resident when the routing was known
    late: int = 0  # in flight then; waited for the remainder
    misses: int = 0  # neither
    computed_on_host: int = 0  # of these, computed by the host where they are
    evictions: int = 0
    stall_s: float = 0.0  # time that a layer waited for experts
    stalled_bytes: int = 0  # moved while a layer waited

    @property
    def accesses(self) -> int:
        return self.hits + self.late + self.misses

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, field.default)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class Stats:
    """A snapshot of an offloaded model: its sizes, and what its expert pool did since it was loaded or reset."""

    model: str
    policy: str
    io: str
    link_bandwidth_bytes_s: float | None  # what the link is held to, for experiments; None where it is not
    layers: int
    experts: int
    expert_bytes: int  # all routed experts together, as they are stored
    expert_dtype: str  # what they are stored as
    lossy: bool  # whether that is our copy, in fewer bits than the checkpoint's: answers differ from its own
    expert_memory_bytes: int  # the pool, a hard limit
    slots: int
    resident: int
    layer_calls: int
    hits: int
    late: int
    misses: int
    evictions: int
    prefetched: int  # fetches begun before they were needed
    prefetched_used: int  # of these, needed later, complete or not
    wasted: int  # of these, evicted or withdrawn without having been needed
    regretted: int  # misses of experts that had made room for a prefetch
    paused: int  # iterations without prefetches, as these did not pay
    searches: int  # events that a policy's scores were asked of, where it runs beside the model
    searches_late: int  # of these, dropped: newer events had come
    bytes_read: int
    stall_s: float
    stalled_bytes: int
    peak_rss_bytes: int
    explained: tuple[ExplainRow, ...] | None = None  # None where it was not asked for
    replayed_routing: str | None = None  # the trace that was forced onto the model, for experiments
    device: str = "cpu"  # where the pool is; several are separated by commas
    expert_kernel: str = "eager"  # whose arithmetic most layers run with; "forward" is the modules' own
    host_memory_bytes: int = 0  # pinned memory between disk and devices; 0 on the CPU
    disk_bytes: int = 0  # read from the disk; bytes_read is what moved into the pool
    host_computed: int = 0  # misses that the CPU computed instead of copying them

    @property
    def accesses(self) -> int:
        return self.hits + self.late + self.misses

    @property
    def hit_rate(self) -> float:
        return _share(self.hits, self.accesses)

    @property
    def late_rate(self) -> float:
        return _share(self.late, self.accesses)

    @property
    def miss_rate(self) -> float:
        return _share(self.misses, self.accesses)

    @property
    def precision(self) -> float | None:
        """Prefetched and used / prefetched; `None` without a prefetch."""
        return self.prefetched_used / self.prefetched if self.prefetched else None

    def as_dict(self) -> dict[str, Any]:
        """All fields and rates, ready for JSON."""
        rates: dict[str, float | None] = {
            "hit_rate": self.hit_rate,
            "late_rate": self.late_rate,
            "miss_rate": self.miss_rate,
        }
        rates |= {"precision": self.precision}
        return asdict(self) | {"accesses": self.accesses} | rates


ABSENT, IN_FLIGHT, RESIDENT, IN_USE = range(4)  # of PerExpert.state


@dataclass(frozen=True, eq=False)
class PerExpert:
    """A snapshot of every expert: where it is now, and its counts since `watch` or `reset_stats`. Arrays `[L, E]`.

    `E` is the largest of any layer; `experts` says how many each has, and what lies beyond is absent and 0.
    """

    experts: tuple[int, ...]  # of each layer
    state: npt.NDArray[np.uint8]  # see above; in use: resident, and pinned by the layer under way
    pinned: npt.NDArray[np.bool_]  # needed by the layer under way, and not used yet; may be in flight
    hits: npt.NDArray[np.int64]
    late: npt.NDArray[np.int64]
    misses: npt.NDArray[np.int64]
    prefetched: npt.NDArray[np.int64]
    wasted: npt.NDArray[np.int64]
