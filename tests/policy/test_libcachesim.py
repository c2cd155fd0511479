"""Eviction against libCacheSim, access by access; as there, every access is a separate event."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.policy import CacheManager, compute_future
from finemoe.policy.base import Policy
from finemoe.policy.belady import Belady
from finemoe.policy.lru_lfu import LFU, LRU
from finemoe.types import ExpertId, Routed

libcachesim = pytest.importorskip("libcachesim")

TRACE = Path(__file__).parents[3] / "shared" / "data" / "routing" / "gpt-oss-20b" / "routing.npz"
LAYERS, EXPERTS, ACCESSES = 24, 32, 20_000
Accesses = Sequence[int]  # flat indices


class InCacheLFU(LFU):
    """LFU by libCacheSim's rules: counts are reset on eviction, and ties go to the least recently used.

    `lfu` keeps its counts on eviction, and breaks ties by index.
    """

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts, decay=1.0)
        self.touched = np.zeros((layers, experts))

    def routed(self, event: Routed) -> None:
        self.retention_priority[:] = self.ranking.frequency  # as `lfu` sets it
        super().routed(event)
        self.touched[event.layer, list(event.experts)] = self.touched.max() + 1
        assert np.array_equal(self.retention_priority, self.ranking.frequency)
        self.retention_priority[:] = self.ranking.frequency + self.touched / (1 << 30)

    def forget(self, expert: ExpertId) -> None:
        self.ranking.frequency[expert] = 0.0


def ours(policy: Policy, accesses: Accesses, capacity: int, experts: int) -> list[bool]:
    """Whether each access is a hit."""
    cache_manager = CacheManager(policy.layers, experts, capacity, policy)
    hits = []
    for access in accesses:
        expert = ExpertId(*divmod(access, experts))
        hits.append(cache_manager.is_resident(expert))
        for fetch in cache_manager.routed(Routed(expert.layer, (expert.expert,))).fetches:
            if fetch.victim is not None and isinstance(policy, InCacheLFU):
                policy.forget(fetch.victim)
            cache_manager.landed(fetch.expert)
        cache_manager.used(expert)
    return hits


def theirs(cache: Any, accesses: Accesses) -> list[bool]:
    next_seen: dict[int, int] = {}
    next_use = [1 << 62] * len(accesses)
    for now in reversed(range(len(accesses))):
        next_use[now] = next_seen.get(accesses[now], 1 << 62)
        next_seen[accesses[now]] = now
    return [
        cache.get(libcachesim.Request(obj_id=access, obj_size=1, next_access_vtime=then, clock_time=now))
        for now, (access, then) in enumerate(zip(accesses, next_use, strict=True))
    ]


def belady(accesses: Accesses, layers: int, experts: int) -> Policy:
    return Belady(
        layers, experts, compute_future(layers, experts, np.arange(len(accesses) + 1), np.array(accesses, np.int64))
    )


Make = Callable[[Accesses, int, int], Policy]
pairs = pytest.mark.parametrize(
    ("make", "reference"),
    [
        (lambda _, layers, experts: LRU(layers, experts), "LRU"),
        (lambda _, layers, experts: InCacheLFU(layers, experts), "LFU"),
        (belady, "Belady"),
    ],
    ids=["lru", "lfu", "belady"],
)


@pairs
@given(st.lists(st.integers(0, 3 * 5 - 1), max_size=120), st.integers(1, 15))
def test_hits_agree_on_generated_accesses(make: Make, reference: str, accesses: list[int], capacity: int) -> None:
    hits = ours(make(accesses, 3, 5), accesses, capacity, 5)
    assert hits == theirs(getattr(libcachesim, reference)(capacity), accesses)


@pairs
@pytest.mark.parametrize("share", [0.15, 0.25, 0.5])
def test_hits_agree_on_recorded_accesses(make: Make, reference: str, share: float) -> None:
    if not TRACE.is_file():
        pytest.skip("the recorded traces are not available")
    with np.load(TRACE) as trace:
        routing, offsets = trace["expert_ids"], trace["offsets"]
    tokens = [routing[start : start + 70] for start in offsets[:-1:140]]
    flat = np.sort(np.concatenate(tokens).astype(np.int64), axis=-1) + EXPERTS * np.arange(LAYERS)[:, None]
    accesses = flat.reshape(-1)[:ACCESSES].tolist()
    assert len(accesses) == ACCESSES
    capacity = int(share * LAYERS * EXPERTS)
    hits = ours(make(accesses, LAYERS, EXPERTS), accesses, capacity, EXPERTS)
    assert hits == theirs(getattr(libcachesim, reference)(capacity), accesses)
    assert 0.05 < np.mean(hits) < 0.999
