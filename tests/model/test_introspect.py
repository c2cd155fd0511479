"""`model.finemoe.experts()`: every expert's place and counts, all of one moment."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import finemoe
from finemoe.errors import ConfigError
from finemoe.metrics import ABSENT, IN_USE, RESIDENT
from tests.tiny import Make, answer, eager


def test_counts_and_places_are_those_of_the_stats(offloaded: Any) -> None:
    offloaded.finemoe.watch()
    answer(offloaded, new_tokens=8)
    stats, experts = offloaded.finemoe.stats(), offloaded.finemoe.experts()
    assert experts.experts == (8, 8, 8)
    assert experts.state.shape == experts.hits.shape == (3, 8)
    for name in ("hits", "late", "misses", "prefetched", "wasted"):
        assert getattr(experts, name).sum() == getattr(stats, name), name
    assert (experts.state == RESIDENT).sum() == stats.resident > 0
    assert not experts.pinned.any()


def test_layers_alike_share_what_they_make_of_a_slot(offloaded: Any) -> None:
    answer(offloaded, new_tokens=8)
    layers = offloaded.finemoe._layers
    assert all(layer._views is layers[0]._views for layer in layers)
    places = {offsets_bytes for layer in layers for offsets_bytes in layer.layout.offsets_bytes}
    assert 0 < len(layers[0]._views) <= offloaded.finemoe.stats().slots * len(places)


def test_what_the_layer_under_way_uses_is_in_use(offloaded: Any) -> None:
    offloaded.finemoe.watch()
    seen = []
    inside = offloaded.finemoe._engine.serve

    def serve(event: Any) -> Any:
        for item in inside(event):
            seen.append((event.layer, item[0], offloaded.finemoe.experts()))
            yield item

    offloaded.finemoe._engine.serve = serve
    try:
        answer(offloaded, new_tokens=2)
    finally:
        del offloaded.finemoe._engine.serve
    assert seen
    for at, expert, experts in seen:
        assert experts.state[at, expert] == IN_USE
        assert experts.pinned[at].any() and experts.pinned.sum() == experts.pinned[at].sum()


def test_an_emptied_pool_is_absent_and_a_reset_counts_anew(offloaded: Any) -> None:
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


def test_what_was_not_asked_for_is_not_counted(tiny: Make) -> None:
    with finemoe.load(tiny()) as model:
        answer(model)
        with pytest.raises(ConfigError, match="call watch"):
            model.finemoe.experts()
        assert model.finemoe._engine.cache_manager.expert_counts is None


def test_snapshots_taken_all_the_while_change_no_answer(tiny: Make) -> None:
    folder: Path = tiny()
    with finemoe.load(folder, expert_memory="50%", policy="finemoe", io="buffered") as model:
        model.finemoe.watch()
        done, broken = threading.Event(), []

        def look() -> None:
            while not done.is_set():
                experts = model.finemoe.experts()
                accesses = experts.hits.sum() + experts.late.sum() + experts.misses.sum()
                if (experts.state != ABSENT).sum() > model.finemoe.stats().slots or accesses < 0:
                    broken.append(experts)

        looking = threading.Thread(target=look)
        looking.start()
        try:
            found = answer(model, new_tokens=12)
        finally:
            done.set()
            looking.join()
        assert not broken
        assert found.tolist() == answer(eager(folder), new_tokens=12).tolist()
        model.finemoe.check_integrity()
