"""`model.finemoe.experts()`: a consistent snapshot of every expert's state and counts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import finemoe
from finemoe.errors import ConfigError
from finemoe.metrics import ABSENT, IN_USE, RESIDENT
from tests.tiny import Make, answer, eager


def test_counts_and_states_agree_with_the_stats(offloaded: Any) -> None:
    offloaded.finemoe.watch()
    answer(offloaded, new_tokens=8)
    stats, experts = offloaded.finemoe.stats(), offloaded.finemoe.experts()
    assert experts.experts == (8, 8, 8)
    assert experts.state.shape == experts.hits.shape == (3, 8)
    for name in ("hits", "late", "misses", "prefetched", "wasted"):
        assert getattr(experts, name).sum() == getattr(stats, name), name
    assert (experts.state == RESIDENT).sum() == stats.resident > 0
    assert not experts.pinned.any()


def test_equal_layers_share_views_of_slots(offloaded: Any) -> None:
    answer(offloaded, new_tokens=8)
    layers = offloaded.finemoe._layers
    assert all(layer._views is layers[0]._views for layer in layers)
    places = {offsets_bytes for layer in layers for offsets_bytes in layer.layout.offsets_bytes}
    assert 0 < len(layers[0]._views) <= offloaded.finemoe.stats().slots * len(places)


def test_experts_of_the_running_layer_are_in_use(offloaded: Any) -> None:
    offloaded.finemoe.watch()
    snapshots = []
    original = offloaded.finemoe._engine.serve

    def serve(event: Any) -> Any:
        for item in original(event):
            snapshots.append((event.layer, item[0], offloaded.finemoe.experts()))
            yield item

    offloaded.finemoe._engine.serve = serve
    try:
        answer(offloaded, new_tokens=2)
    finally:
        del offloaded.finemoe._engine.serve
    assert snapshots
    for layer, expert, experts in snapshots:
        assert experts.state[layer, expert] == IN_USE
        assert experts.pinned[layer].any() and experts.pinned.sum() == experts.pinned[layer].sum()


def test_experts_are_absent_after_evict_all_and_counts_are_zero_after_a_reset(offloaded: Any) -> None:
    offloaded.finemoe.watch()
    answer(offloaded)
    offloaded.finemoe.reset_stats()
    assert not offloaded.finemoe.experts().misses.any()
    offloaded.finemoe.evict_all()
    assert (offloaded.finemoe.experts().state == ABSENT).all()


def test_a_snapshot_does_not_change_afterwards(offloaded: Any) -> None:
    offloaded.finemoe.watch()
    before = offloaded.finemoe.experts()
    answer(offloaded)
    assert not before.state.any() and not before.misses.any()


def test_nothing_is_counted_before_watch(tiny: Make) -> None:
    with finemoe.load(tiny()) as model:
        answer(model)
        with pytest.raises(ConfigError, match="call watch"):
            model.finemoe.experts()
        assert model.finemoe._engine.cache_manager.expert_counts is None


def test_concurrent_snapshots_change_no_answer(tiny: Make) -> None:
    folder: Path = tiny()
    with finemoe.load(folder, expert_memory="50%", policy="finemoe", io="buffered") as model:
        model.finemoe.watch()
        done, inconsistent = threading.Event(), []

        def take_snapshots() -> None:
            while not done.is_set():
                experts = model.finemoe.experts()
                accesses = experts.hits.sum() + experts.late.sum() + experts.misses.sum()
                if (experts.state != ABSENT).sum() > model.finemoe.stats().slots or accesses < 0:
                    inconsistent.append(experts)

        thread = threading.Thread(target=take_snapshots)
        thread.start()
        try:
            found = answer(model, new_tokens=12)
        finally:
            done.set()
            thread.join()
        assert not inconsistent
        assert found.tolist() == answer(eager(folder), new_tokens=12).tolist()
        model.finemoe.check_integrity()
