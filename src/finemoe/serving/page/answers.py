"""What `/v1/experts` and `/v1/live` are asked, and the shapes of what they answer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SinceSnapshot(BaseModel):
    """Of `/v1/experts`. Nothing else may be asked."""

    model_config = ConfigDict(extra="forbid")
    since: int | None = Field(None, ge=0, description="`snapshot` of the last answer: tell only rows that differ")


class SinceTime(BaseModel):
    """Of `/v1/live`. Nothing else may be asked."""

    model_config = ConfigDict(extra="forbid")
    since: float = Field(0.0, ge=0, allow_inf_nan=False, description="of the last sample: tell only later ones")


class Experts(BaseModel):
    """Every expert, as the columns of a table: entry `i` of each list is about expert `expert[i]` of `layer[i]`."""

    snapshot: int = Field(description="number of this snapshot; give it as `since` next time")
    since: int | None = Field(description="rows are those that differ from this snapshot; null: all rows are here")
    experts: list[int] = Field(description="how many experts each MoE layer has")
    states: list[str] = Field(description="what the numbers in `state` mean")
    layer: list[int]
    expert: list[int]
    state: list[int]
    pinned: list[int] = Field(description="1: the layer under way needs it and has not used it yet")
    hits: list[int] = Field(description="accesses that found it resident")
    late: list[int] = Field(description="accesses that found it in flight")
    misses: list[int] = Field(description="accesses that found it absent")
    prefetched: list[int] = Field(description="prefetches begun")
    wasted: list[int] = Field(description="prefetches evicted or withdrawn without having been needed")


class Samples(BaseModel):
    """The last ten minutes as the columns of a table, oldest first; null: nothing to be measured in that second."""

    time_s: list[float] = Field(description="end of the interval, since the epoch")
    tok_s: list[float] = Field(description="tokens generated per second")
    ttft_s: list[float | None] = Field(description="time to first token, mean of the answers that began")
    tpot_s: list[float | None] = Field(description="time per further token, mean of the answers that ended")
    hit_rate: list[float | None]
    bytes_s: list[float] = Field(description="bytes of experts moved per second")
    stall_share: list[float] = Field(description="share of the interval in which a layer waited for experts")
    running: list[int] = Field(description="answers under way at its end")
    waiting: list[int] = Field(description="requests in the queue at its end")


class Now(BaseModel):
    """What the server runs, its totals since it started, and its last ten minutes."""

    model: str = Field(description="its name in requests")
    policy: str
    interval_s: float
    layers: int
    experts: int
    slots: int
    resident: int
    expert_bytes: int
    expert_memory_bytes: int
    link_bandwidth_bytes_s: float | None = Field(description="what the link is held to, for experiments")
    hits: int
    late: int
    misses: int
    prefetched: int
    prefetched_used: int
    wasted: int
    bytes_read: int
    stall_s: float
    samples: Samples
