"""Counters, snapshots and duration statistics."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from finemoe.metrics import NEVER, Counters, Durations, Stats

STATS = Stats(
    model="m", policy="lru", io="direct", link_bandwidth_bytes_s=None, layers=2, experts=16, expert_bytes=1600,
    expert_dtype="bfloat16", lossy=False, expert_memory_bytes=400, slots=4, resident=4, layer_calls=5, hits=6, late=1,
    misses=3, evictions=2, prefetched=4, prefetched_used=3, wasted=1, regretted=1, paused=0, searches=0,
    searches_late=0, bytes_read=300, stall_s=0.5, stalled_bytes=200, peak_rss_bytes=10_000,
)  # fmt: skip

TIMES_S = [0.5, 2.0, 0.25, 1.0]


def test_rates_are_shares_of_all_accesses() -> None:
    assert STATS.accesses == 10
    assert (STATS.hit_rate, STATS.late_rate, STATS.miss_rate) == (0.6, 0.1, 0.3)


def test_rates_without_accesses_are_zero() -> None:
    idle = replace(STATS, hits=0, late=0, misses=0)
    assert (idle.hit_rate, idle.late_rate, idle.miss_rate) == (0, 0, 0)


def test_precision_is_the_used_share_of_prefetches() -> None:
    assert STATS.precision == 0.75
    assert replace(STATS, prefetched=0).precision is None


def test_a_snapshot_can_be_written_as_json() -> None:
    table = STATS.as_dict()
    assert json.loads(json.dumps(table)) == table
    assert set(table) == {f.name for f in fields(Stats)} | {
        "accesses",
        "hit_rate",
        "late_rate",
        "miss_rate",
        "precision",
    }


@pytest.mark.parametrize("name", [field.name for field in fields(Counters)])
def test_reset_sets_every_counter_to_zero(name: str) -> None:
    counters = Counters()
    setattr(counters, name, 7)
    counters.reset()
    assert counters == Counters()


def durations(times_s: list[float]) -> Durations:
    return sum(map(Durations.one, times_s), NEVER)


def test_mean_and_spread_of_durations() -> None:
    assert durations(TIMES_S).count == 4
    assert durations(TIMES_S).mean_s == pytest.approx(np.mean(TIMES_S))
    assert durations(TIMES_S).spread == pytest.approx(np.log(TIMES_S).std())


def test_durations_can_be_subtracted() -> None:
    left = durations(TIMES_S) - durations(TIMES_S[1:3])
    assert asdict(left) == pytest.approx(asdict(durations([0.5, 1.0])))


def test_without_durations_there_is_no_mean_and_no_spread() -> None:
    assert NEVER.mean_s is NEVER.spread is None


def test_a_duration_of_zero_is_counted() -> None:
    assert durations([0.0, 0.0]).mean_s == 0
    assert math.isfinite(durations([0.0, 1.0]).spread or math.inf)
