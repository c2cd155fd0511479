"""Hit rates on recorded routing (gpt-oss-20b, decode, on demand). Skipped without the trace in shared/data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finemoe.policy import make_cache_manager
from finemoe.sim.speed_forecast import LOCAL_HITS
from finemoe.types import ExpertId, Routed

TRACE = Path(__file__).parents[3] / "shared" / "data" / "routing" / "gpt-oss-20b" / "routing.npz"
LAYERS, EXPERTS, ACTIVE = 24, 32, 4
REQUESTS, TOKENS = 6, 200


def hit_rate(policy: str, share: float) -> float:
    """Over the first tokens of a few requests, one after another."""
    cache_manager = make_cache_manager(policy, LAYERS, EXPERTS, int(share * LAYERS * EXPERTS))
    with np.load(TRACE) as trace:
        routing, offsets = trace["expert_ids"], trace["offsets"]
    chosen = np.random.default_rng(0).permutation(len(offsets) - 1)[:REQUESTS]
    hits = accesses = 0
    for request in chosen:
        for token in routing[offsets[request] : min(offsets[request + 1], offsets[request] + TOKENS)]:
            for layer, active in enumerate(token):
                experts = [ExpertId(layer, int(expert)) for expert in sorted(active)]
                hits += sum(cache_manager.is_resident(expert) for expert in experts)
                accesses += ACTIVE
                for fetch in cache_manager.routed(Routed(layer, tuple(e.expert for e in experts))).fetches:
                    cache_manager.landed(fetch.expert)
                for expert in experts:
                    cache_manager.used(expert)
    return hits / accesses


@pytest.fixture(scope="module", autouse=True)
def _require_trace() -> None:
    if not TRACE.is_file():
        pytest.skip("the recorded traces are not available")


# expected values: an independent study of the same trace, over more requests
@pytest.mark.parametrize(
    ("policy", "share", "expected"),
    [("lru", 0.25, 0.608), ("lfu", 0.25, 0.66), ("lfru", 0.25, 0.66), ("lru", 0.5, 0.903), ("lfru", 0.5, 0.919)],
)
def test_hit_rate_matches_an_independent_study(policy: str, share: float, expected: float) -> None:
    assert hit_rate(policy, share) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("share", "expected"), LOCAL_HITS[1:-1])
def test_cost_model_uses_measured_hit_rates(share: float, expected: float) -> None:
    assert hit_rate("lfru", share) == pytest.approx(expected, abs=0.02)
