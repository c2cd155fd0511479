"""What happened, counted. One dataclass, passed in by its owner; never a global."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.explain import Explained


@dataclass
class Counters:
    """Running totals of one engine. An access is one distinct expert needed by one layer of one iteration."""

    layer_calls: int = 0
    hits: int = 0  # resident when the routing was known
    late: int = 0  # in flight then; waited for the remainder
    misses: int = 0  # neither
    elsewhere: int = 0  # of these, computed by the host where they are
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
    explained: tuple[Explained, ...] | None = None  # None where it was not asked for
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
