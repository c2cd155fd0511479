"""Hits and misses by source and by expert add up to the engine's counters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.metrics import ExplainRow, explain_table
from finemoe.policy import CacheManager, make_policy
from finemoe.policy import accounting as expert_counts
from finemoe.policy.accounting import HITS, LATE, MISSES, SourceCounts
from finemoe.policy.cache_state import PREFETCHED, PREFETCHED_USED, WASTED
from finemoe.sim.workload import TraceView, make_schedule
from finemoe.trace import open_trace
from finemoe.types import DECODE, ExpertId, Routed, Step
from tests.sim.traces import EXPERTS, LAYERS, make_trace
from tests.sim.virtual_link import EngineDriver, VirtualLink


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


def total(rows: tuple[ExplainRow, ...], count: str) -> int:
    return sum(getattr(row, count) for row in rows)


@pytest.mark.parametrize("policy", ["lfru", "deepspeed", "moe-infinity", "expert-map", "finemoe"])
@settings(max_examples=12)
@given(
    st.integers(0, 5), st.integers(3, LAYERS * EXPERTS), st.sampled_from([0.07, 0.3, 1.0, 4.1]),
    st.sampled_from([0, 5]), st.integers(1, 3), st.sampled_from([0, 70]),
)  # fmt: skip
def test_sums_equal_the_engines_counters(
    folder: Path, policy: str, seed: int, capacity: int, link_ratio: float, chunks: int, interleave: int, prompt: int
) -> None:
    path = folder / f"walk-{seed}-4-12-{prompt}.safetensors"
    with make_trace(folder, seed, prompt=prompt) if not path.exists() else open_trace(path) as trace:
        schedule, view = make_schedule(trace, range(4), interleave), TraceView(trace)
        link = VirtualLink(link_ratio, chunks)
        driver = EngineDriver.make(schedule, make_policy(policy, LAYERS, EXPERTS), capacity, link)
        driver.engine.cache_manager.source_counts = SourceCounts(LAYERS, EXPERTS)
        driver.engine.cache_manager.enable_expert_counts()
        driver.run(schedule, view)
    rows, counters = driver.engine.cache_manager.source_counts.rows(), driver.engine.counters
    assert (total(rows, "hits"), total(rows, "late"), total(rows, "misses")) == (
        counters.hits, counters.late, counters.misses,
    )  # fmt: skip
    counters_ = driver.engine.cache_manager.cache.counters
    assert (total(rows, "predicted"), total(rows, "wasted")) == (counters_[PREFETCHED], counters_[WASTED])
    assert driver.engine.cache_manager.expert_counts is not None
    counts = driver.engine.cache_manager.expert_counts.counts
    assert counts[[HITS, LATE, MISSES]].sum(axis=1).tolist() == [counters.hits, counters.late, counters.misses]
    assert counts[[expert_counts.PREFETCHED, expert_counts.WASTED]].sum(axis=1).tolist() == [
        counters_[PREFETCHED],
        counters_[WASTED],
    ]
    by_layer = [sum(getattr(row, count) for row in rows if row.layer == 0) for count in ("hits", "misses", "wasted")]
    assert counts[[HITS, MISSES, expert_counts.WASTED], :EXPERTS].sum(axis=1).tolist() == by_layer
    prefetches = tuple(row for row in rows if row.source.startswith("prefetch"))
    assert total(prefetches, "hits") + total(prefetches, "late") == counters_[PREFETCHED_USED]
    unused_prefetch = int(driver.engine.cache_manager.cache.unused_prefetch.sum())
    assert counters_[PREFETCHED] == counters_[PREFETCHED_USED] + counters_[WASTED] + unused_prefetch
    assert total(rows, "misses") == total(tuple(row for row in rows if row.source == "demand"), "misses")
    for row in prefetches:  # per source, used and wasted prefetches do not exceed predictions
        assert row.hits + row.late + row.wasted <= row.predicted
        assert row.distance is None or 1 <= row.distance <= row.layer + 1


def make(prefetch_priority: dict[tuple[int, int], float]) -> CacheManager:
    policy = make_policy("lru", 3, 4)
    for place, value in prefetch_priority.items():
        policy.prefetch_priority[place] = value
    return CacheManager(3, 4, 6, policy, explain=True)


def begin(cache_manager: CacheManager) -> None:
    cache_manager.begin([Step(0, DECODE, [1])])  # type: ignore[arg-type] # not read


def test_accesses_are_attributed_to_how_the_expert_was_loaded() -> None:
    cache_manager = make({(2, 1): 3.0, (0, 2): 2.0})
    assert cache_manager.source_counts is not None
    begin(cache_manager)
    cache_manager.routed(Routed(0, [0]))
    cache_manager.landed(ExpertId(0, 0))
    cache_manager.used(ExpertId(0, 0))
    for expected in (ExpertId(2, 1), ExpertId(0, 2)):  # two layers ahead; the next iteration's
        fetch = cache_manager.prefetch()
        assert fetch is not None and fetch.expert == expected
    cache_manager.landed(ExpertId(2, 1))
    cache_manager.routed(Routed(2, [1]))
    cache_manager.used(ExpertId(2, 1))
    begin(cache_manager)
    cache_manager.routed(Routed(0, [0, 2]))
    cache_manager.routed(Routed(2, [1]))
    assert cache_manager.source_counts.rows() == (
        ExplainRow(0, "demand", None, predicted=0, hits=1, late=0, misses=1, wasted=0),
        ExplainRow(0, "prefetch-next", None, predicted=1, hits=0, late=1, misses=0, wasted=0),
        ExplainRow(2, "kept", None, predicted=0, hits=1, late=0, misses=0, wasted=0),
        ExplainRow(2, "prefetch", 2, predicted=1, hits=1, late=0, misses=0, wasted=0),
    )


def test_a_cancelled_prefetch_is_wasted() -> None:
    cache_manager = make({(0, 0): 1.0})
    assert cache_manager.source_counts is not None
    begin(cache_manager)
    assert cache_manager.prefetch() is not None
    cache_manager.failed(ExpertId(0, 0))
    assert cache_manager.source_counts.rows() == (ExplainRow(0, "prefetch", 1, 1, 0, 0, 0, 1),)


def test_counts_are_kept_per_expert() -> None:
    cache_manager = make({(2, 1): 3.0, (0, 2): 2.0})
    cache_manager.enable_expert_counts()
    begin(cache_manager)
    cache_manager.routed(Routed(0, [0]))
    cache_manager.landed(ExpertId(0, 0))
    cache_manager.used(ExpertId(0, 0))
    assert cache_manager.prefetch() is not None  # (2, 1): completes in time
    cache_manager.landed(ExpertId(2, 1))
    assert cache_manager.prefetch() is not None  # (0, 2): fails
    cache_manager.failed(ExpertId(0, 2))
    cache_manager.routed(Routed(2, [1]))
    begin(cache_manager)
    cache_manager.routed(Routed(0, [0]))
    assert cache_manager.expert_counts is not None
    expected = np.zeros((5, 12))
    expected[[HITS, MISSES], 0] = 1
    expected[[HITS, expert_counts.PREFETCHED], 9] = 1
    expected[[expert_counts.PREFETCHED, expert_counts.WASTED], 2] = 1
    assert np.array_equal(cache_manager.expert_counts.counts, expected)


def test_accounting_is_off_by_default() -> None:
    cache_manager = CacheManager(3, 4, 6, make_policy("lru", 3, 4))
    assert cache_manager.source_counts is None
    assert cache_manager.expert_counts is None


def test_explain_table_sums_by_source_and_by_layer() -> None:
    rows = (
        ExplainRow(0, "demand", None, 0, 5, 0, 2, 0),
        ExplainRow(0, "prefetch", 1, 4, 2, 1, 0, 1),
        ExplainRow(1, "prefetch", 1, 3, 3, 0, 0, 0),
        ExplainRow(1, "prefetch-next", None, 1, 0, 0, 0, 1),
    )
    lines = [line.split() for line in explain_table(rows).splitlines()]
    assert ["prefetched", "1", "ahead", "7", "5", "1", "0", "1"] in lines
    assert ["layer", "0", "4", "7", "1", "2", "1"] in lines
    assert explain_table(()).startswith("experts from")
