"""Counters and snapshots: one meaning each, and no division by zero."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from finemoe.metrics import Counters, Stats

STATS = Stats(
    model="m", policy="lru", io="direct", link_bandwidth_bytes_s=None, layers=2, experts=16, expert_bytes=1600,
    expert_dtype="bfloat16", lossy=False, expert_memory_bytes=400, slots=4, resident=4, layer_calls=5, hits=6, late=1,
    misses=3, evictions=2, prefetched=4, prefetched_used=3, wasted=1, regretted=1, paused=0, searches=0,
    searches_late=0, bytes_read=300, stall_s=0.5, stalled_bytes=200, peak_rss_bytes=10_000,
)  # fmt: skip


def test_rates_are_shares_of_all_accesses() -> None:
    assert STATS.accesses == 10
    assert (STATS.hit_rate, STATS.late_rate, STATS.miss_rate) == (0.6, 0.1, 0.3)


def test_rates_without_accesses_are_zero() -> None:
    idle = replace(STATS, hits=0, late=0, misses=0)
    assert (idle.hit_rate, idle.late_rate, idle.miss_rate) == (0, 0, 0)


def test_precision_is_of_what_was_prefetched() -> None:
    assert STATS.precision == 0.75
    assert replace(STATS, prefetched=0).precision is None


def test_a_snapshot_is_ready_for_json() -> None:
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
def test_reset_starts_every_counter_anew(name: str) -> None:
    counters = Counters()
    setattr(counters, name, 7)
    counters.reset()
    assert counters == Counters()
