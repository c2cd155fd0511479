"""Query and response schemas of the live page's data. Tables are lists of columns, to keep them small."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SinceSnapshot(BaseModel):
    """Query of `/v1/experts`; unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid")
    since: int | None = Field(None, ge=0, description="`snapshot` of an earlier response: return only changed rows")


class SinceTime(BaseModel):
    """Query of `/v1/live`; unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid")
    since: float = Field(0.0, ge=0, allow_inf_nan=False, description="return only samples that ended later")


class Experts(BaseModel):
    """All experts as columns: entry `i` of each list belongs to expert `expert[i]` of MoE layer `layer[i]`."""

    snapshot: int = Field(description="number of this snapshot; pass it as `since` next time")
    since: int | None = Field(description="snapshot that the rows differ from; null: all rows are included")
    experts: list[int] = Field(description="number of experts of each MoE layer")
    states: list[str] = Field(description="names of the numbers in `state`")
    layer: list[int]
    expert: list[int]
    state: list[int]
    pinned: list[int] = Field(description="1: the current layer needs it and has not used it yet")
    hits: list[int] = Field(description="accesses that found it resident")
    late: list[int] = Field(description="accesses that found it in flight")
    misses: list[int] = Field(description="accesses that found it absent")
    prefetched: list[int] = Field(description="prefetches started")
    wasted: list[int] = Field(description="prefetches evicted or cancelled before they were needed")


class Samples(BaseModel):
    """The last ten minutes as columns, oldest first; null: nothing could be measured in that interval."""

    time_s: list[float] = Field(description="end of the interval, seconds since the epoch")
    tok_s: list[float] = Field(description="tokens generated per second")
    ttft_s: list[float | None] = Field(description="mean time to first token of the answers that got theirs")
    tpot_s: list[float | None] = Field(description="mean time per token after the first of the answers that finished")
    hit_rate: list[float | None]
    bytes_s: list[float] = Field(description="bytes of experts transferred per second")
    stall_share: list[float] = Field(description="share of the interval in which a layer waited for experts")
    running: list[int] = Field(description="answers running at its end")
    waiting: list[int] = Field(description="requests queued at its end")


class Now(BaseModel):
    """The running configuration, totals since the server started, and the last ten minutes."""

    model: str = Field(description="its name in requests")
    policy: str
    interval_s: float
    layers: int
    experts: int
    slots: int
    resident: int
    expert_bytes: int
    expert_memory_bytes: int
    link_bandwidth_bytes_s: float | None = Field(description="limit set by --link-bandwidth, or null")
    hits: int
    late: int
    misses: int
    prefetched: int
    prefetched_used: int
    wasted: int
    bytes_read: int
    stall_s: float
    samples: Samples
