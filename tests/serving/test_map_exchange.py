"""Exchange of maps between servers, with policies but no model; a failing store is one warning."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.learned import LocalMaps, Maps, Pulled, Version
from finemoe.policy import make_policy
from finemoe.serving.map_exchange import MapExchange
from tests.learned.make import SHAPE, make_maps
from tests.policy.workload import recorded


class FakeModel:
    """The map methods of `ModelHandle`, over a policy without a model."""

    def __init__(self, *seeds: int) -> None:
        self.policy = make_policy("finemoe", SHAPE.layers, SHAPE.experts)
        self.learn(*seeds)

    def learn(self, *seeds: int) -> None:
        for seed in seeds:
            self.policy.learn(recorded(seed, SHAPE, length=6))

    @property
    def num_updates(self) -> int:
        return self.policy.num_updates

    def learned(self) -> Maps | None:
        arrays = self.policy.state_dict()
        return Maps("finemoe", "0123", "a-model", SHAPE.layers, SHAPE.experts, arrays) if arrays else None

    def check_maps(self, maps: Maps) -> None:
        assert maps.model == "0123"

    def end_requests(self) -> None:
        self.policy.begin(())

    def load_maps(self, maps: Maps, num_updates: int) -> bool:
        if self.policy.num_updates != num_updates:
            return False
        self.policy.load_state_dict(maps.arrays)
        return True


class FakeRunner:
    """A worker that is always idle, or never."""

    def __init__(self, *, idle: bool = True) -> None:
        self.idle = idle

    def run_when_idle(self, call: Callable[[], object], timeout_s: float) -> bool:
        if self.idle:
            call()
        return self.idle


class FailingStore(LocalMaps):
    """A store that can fail and be replaced."""

    failing = False

    def publish(self, maps: Maps) -> Version:
        if self.failing:
            raise TimeoutError("no\nanswer")
        return super().publish(maps)

    def pull(self, since: Version | None = None) -> Pulled | None:
        if self.failing:
            raise TimeoutError("no\nanswer")
        return super().pull(since)


def make_exchange(model: FakeModel, store: LocalMaps, *, idle: bool = True) -> MapExchange:
    return MapExchange(model, FakeRunner(idle=idle), store, every_s=60.0, idle_timeout_s=0.0)


def iterations(model: FakeModel) -> float:
    return float(model.policy.state_dict()["iterations"][0])


def test_all_servers_get_all_maps_once() -> None:
    store, models = LocalMaps(), [FakeModel(0), FakeModel(1, 2), FakeModel()]
    exchanges = [make_exchange(model, store) for model in models]
    for _ in range(3):
        for exchange in exchanges:
            exchange.exchange()
    own = len(make_maps(seeds=(0,)))
    assert [model.num_updates for model in models] == [3 * own] * 3
    assert [iterations(model) for model in models] == [3.0 * own] * 3
    models[2].learn(3)
    for _ in range(4):
        for exchange in exchanges:
            exchange.exchange()
    assert [model.num_updates for model in models] == [4 * own] * 3
    assert [iterations(model) for model in models] == [4.0 * own] * 3


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=10))
def test_all_servers_converge_in_any_order(turns: list[tuple[int, bool]]) -> None:
    store, models = LocalMaps(), [FakeModel(), FakeModel(), FakeModel()]
    exchanges = [make_exchange(model, store) for model in models]
    for seed, (who, learns) in enumerate(turns):
        if learns:
            models[who].learn(seed)
        else:
            exchanges[who].exchange()
    for exchange in 3 * exchanges:
        exchange.exchange()
    expected = sum(len(make_maps(seeds=(seed,))) for seed, (_, learns) in enumerate(turns) if learns)
    assert [model.num_updates for model in models] == [expected] * 3
    if expected:
        assert [iterations(model) for model in models] == [expected] * 3


def test_a_new_server_starts_warm_and_publishes_the_rest_at_close() -> None:
    store, old, new = LocalMaps(), FakeModel(0, 1), FakeModel()
    make_exchange(old, store).exchange()
    exchange = make_exchange(new, store)
    exchange.start()
    assert new.num_updates == old.num_updates
    new.learn(2)
    exchange.close()
    pulled = store.pull()
    assert pulled is not None and pulled.maps is not None and len(pulled.maps) == new.num_updates


def test_a_server_that_is_never_idle_publishes_but_does_not_load() -> None:
    store, busy = LocalMaps(), FakeModel(0)
    store.publish(make_maps(seeds=(1,)))
    exchange = make_exchange(busy, store, idle=False)
    for _ in range(2):
        exchange.exchange()
    assert busy.num_updates == len(make_maps(seeds=(0,)))
    pulled = store.pull()
    assert pulled is not None and pulled.maps is not None and len(pulled.maps) == 2 * busy.num_updates


def test_updates_during_a_merge_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = LocalMaps(), FakeModel(0)
    store.publish(make_maps(seeds=(1,)))
    exchange = make_exchange(model, store)
    load_maps = model.load_maps

    def late(maps: Maps, num_updates: int) -> bool:
        model.learn(2)
        monkeypatch.undo()
        return load_maps(maps, num_updates)

    monkeypatch.setattr(model, "load_maps", late)
    exchange.exchange()
    exchange.exchange()
    assert iterations(model) == model.num_updates == 3 * len(make_maps(seeds=(0,)))


def test_an_outage_is_one_warning_and_a_lost_store_gets_everything_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    store, model = FailingStore(), FakeModel(0)
    exchange = make_exchange(model, store)
    exchange.exchange()
    store.failing = True
    for seed in (1, 2):
        model.learn(seed)
        exchange.exchange()
    (record,) = caplog.records
    assert record.getMessage() == ("maps can't be shared (TimeoutError: no answer); going on without, and trying again")
    store.__init__()  # type: ignore[misc] # restarts empty
    store.failing = False
    other = FakeModel(5)
    make_exchange(other, store).exchange()
    for _ in range(3):
        exchange.exchange()
    pulled = store.pull()
    assert pulled is not None and pulled.maps is not None
    assert len(pulled.maps) == model.num_updates == 4 * len(make_maps(seeds=(0,)))
    assert [each.getMessage() for each in caplog.records[1:]] == ["maps are shared again"]
