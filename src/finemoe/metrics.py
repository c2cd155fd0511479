"""Counters of the engine, the `stats()` snapshots made of them, duration statistics, and the --explain table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

_LEAST_S = 1e-9  # a duration that the clock measures as 0 has a logarithm


@dataclass(frozen=True, slots=True)
class Durations:
    """Sums over the durations of one kind of event: count, mean and spread. Immutable; sums add and subtract.

    Attributes:
        logs: sum of the durations' natural logarithms.
        squares: sum of the squares of these logarithms.
    """

    count: int = 0
    total_s: float = 0.0
    logs: float = 0.0
    squares: float = 0.0

    @classmethod
    def one(cls, seconds: float) -> Durations:
        """The sums of a single duration."""
        log = math.log(max(seconds, _LEAST_S))
        return cls(1, seconds, log, log * log)

    def __add__(self, other: Durations) -> Durations:
        return Durations(
            self.count + other.count, self.total_s + other.total_s, self.logs + other.logs, self.squares + other.squares
        )

    def __sub__(self, other: Durations) -> Durations:
        """Remove `other`, whose durations are a part of these."""
        return Durations(
            self.count - other.count, self.total_s - other.total_s, self.logs - other.logs, self.squares - other.squares
        )

    @property
    def mean_s(self) -> float | None:
        """Mean duration; `None` without one."""
        return self.total_s / self.count if self.count else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the logarithm; `None` without a duration."""
        if not self.count:
            return None
        return math.sqrt(max(0.0, self.squares / self.count - (self.logs / self.count) ** 2))


NEVER = Durations()


class Timings:
    """Mutable `Durations`: adds in place, cheaper than a new object for each layer."""

    __slots__ = ("_count", "_logs", "_squares", "_total_s")

    def __init__(self) -> None:
        self.reset()

    @property
    def so_far(self) -> Durations:
        """The sums so far."""
        return Durations(self._count, self._total_s, self._logs, self._squares)

    def add(self, seconds: float) -> None:
        """Add one duration."""
        self._change(1, seconds)

    def take_back(self, seconds: float) -> None:
        """Remove one duration that was added."""
        self._change(-1, seconds)

    def reset(self) -> None:
        """Remove all durations."""
        self._count, self._total_s, self._logs, self._squares = 0, 0.0, 0.0, 0.0

    def _change(self, sign: int, seconds: float) -> None:
        log = math.log(max(seconds, _LEAST_S))
        self._count += sign
        self._total_s += sign * seconds
        self._logs += sign * log
        self._squares += sign * log * log


Source = Literal["demand", "kept", "prefetch", "prefetch-next"]
COUNTS = ("predicted", "hits", "late", "misses", "wasted")


@dataclass(frozen=True)
class ExplainRow:
    """Accesses of one layer, by what loaded their expert. Summed over all rows: the engine's own counters.

    Attributes:
        source: `demand`: a miss loaded the expert, or loads it now; `prefetch`: a prefetch did, for this iteration,
            and this is its first use; `prefetch-next`: the same, for the iteration after; `kept`: a prefetch did, and
            the expert was used before.
        distance: of `prefetch`, how many layers it was ahead of the last layer whose routing was known (before the
            first, layer 0 is 1 ahead); `None` for other sources.
        predicted: prefetches begun.
        hits, late, misses: as in `Counters`.
        wasted: prefetches that were evicted or cancelled without having been needed.
    """

    layer: int
    source: Source
    distance: int | None
    predicted: int
    hits: int
    late: int
    misses: int
    wasted: int

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ExplainRow:
        """The row of a JSON object, as `asdict` makes it."""
        return cls(**raw)

    @property
    def name(self) -> str:
        """The source's name in the table."""
        if self.source == "prefetch":
            return f"prefetched {self.distance} ahead"
        return {"demand": "demand", "kept": "kept after prefetch"}.get(self.source, "prefetched, next token")


def explain_table(rows: Sequence[ExplainRow]) -> str:
    """Two text tables: by source over all layers, and by layer over all sources."""
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
    """Running totals of one engine. An access: one layer of one iteration needs one distinct expert."""

    layer_calls: int = 0
    hits: int = 0  # resident when the routing was known
    late: int = 0  # in flight at that time
    misses: int = 0  # neither
    computed_on_host: int = 0  # misses that the CPU computed instead of loading the expert onto the GPU
    evictions: int = 0
    stall_s: float = 0.0  # time in which a layer waited for experts
    stalled_bytes: int = 0  # bytes moved in that time

    @property
    def accesses(self) -> int:
        return self.hits + self.late + self.misses

    def reset(self) -> None:
        """Set all counters to 0."""
        for field in fields(self):
            setattr(self, field.name, field.default)


def _ratio(part: float, total: float) -> float:
    return part / total if total else 0.0


@dataclass(frozen=True)
class Stats:
    """A snapshot of an offloaded model: its sizes, and the expert pool's counters since loading or `reset_stats`."""

    model: str
    policy: str
    io: str
    link_bandwidth_bytes_s: float | None  # --link-bandwidth throttle, for experiments; None without one
    layers: int
    experts: int
    expert_bytes: int  # all routed experts together, as stored
    expert_dtype: str  # stored dtype or quantization
    lossy: bool  # whether that is finemoe's quantized copy, with other answers than the checkpoint's
    expert_memory_bytes: int  # size of the pool, a hard limit
    slots: int
    resident: int
    layer_calls: int
    hits: int
    late: int
    misses: int
    evictions: int
    prefetched: int  # prefetches begun
    prefetched_used: int  # prefetches whose expert was needed later, complete or not
    wasted: int  # prefetches evicted or cancelled without having been needed
    regretted: int  # misses of experts that a prefetch had evicted
    paused: int  # iterations in which prefetching was throttled, as it did not pay off
    searches: int  # events queued for an asynchronous policy
    searches_late: int  # events dropped, as newer ones had arrived
    bytes_read: int
    stall_s: float
    stalled_bytes: int
    peak_rss_bytes: int
    explained: tuple[ExplainRow, ...] | None = None  # None without --explain
    replayed_routing: str | None = None  # trace whose routing the model is forced to use, for experiments
    device: str = "cpu"  # the pool's devices, separated by commas
    expert_kernel: str = "eager"  # of most layers: "eager", "grouped_mm" or "forward" (the model's own)
    host_memory_bytes: int = 0  # size of the pinned host tier; 0 on the CPU
    disk_bytes: int = 0  # read from disk; `bytes_read` were moved into the pool
    host_computed: int = 0  # misses that the CPU computed instead of copying the expert

    @property
    def accesses(self) -> int:
        return self.hits + self.late + self.misses

    @property
    def hit_rate(self) -> float:
        return _ratio(self.hits, self.accesses)

    @property
    def late_rate(self) -> float:
        return _ratio(self.late, self.accesses)

    @property
    def miss_rate(self) -> float:
        return _ratio(self.misses, self.accesses)

    @property
    def precision(self) -> float | None:
        """Prefetched and used / prefetched; `None` without a prefetch."""
        return self.prefetched_used / self.prefetched if self.prefetched else None

    def as_dict(self) -> dict[str, Any]:
        """All fields and rates, as JSON types."""
        rates: dict[str, float | None] = {
            "hit_rate": self.hit_rate,
            "late_rate": self.late_rate,
            "miss_rate": self.miss_rate,
        }
        rates |= {"precision": self.precision}
        return asdict(self) | {"accesses": self.accesses} | rates


ABSENT, IN_FLIGHT, RESIDENT, IN_USE = range(4)  # values of PerExpert.state


@dataclass(frozen=True, eq=False)
class PerExpert:
    """A snapshot of every expert: its state, and its counts since `watch` or `reset_stats`.

    Arrays are `[L, E]`, where `E` is the largest layer's; entries beyond a layer's own experts are `ABSENT` and 0.
    """

    experts: tuple[int, ...]  # [L], experts of each layer
    state: npt.NDArray[np.uint8]  # ABSENT, IN_FLIGHT, RESIDENT, or IN_USE: resident and pinned by the current layer
    pinned: npt.NDArray[np.bool_]  # needed by the current layer and not used yet; may be in flight
    hits: npt.NDArray[np.int64]
    late: npt.NDArray[np.int64]
    misses: npt.NDArray[np.int64]
    prefetched: npt.NDArray[np.int64]
    wasted: npt.NDArray[np.int64]
