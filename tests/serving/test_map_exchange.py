"""What a server tells others and takes in from them, over policies without a model; whatever fails is one warning."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.learned import LocalMaps, Maps, Pulled, Version
from finemoe.policy import make_policy
from finemoe.serving.map_exchange import Sharing
from tests.learned.make import SHAPE, make_maps
from tests.policy.workload import recorded


class Learner:
    """A policy, as a loaded model shows it."""

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


class Rests:
    """A worker without a job, or always with one."""

    def __init__(self, *, ever: bool = True) -> None:
        self.ever = ever

    def run_when_idle(self, call: Callable[[], object], timeout_s: float) -> bool:
        if self.ever:
            call()
        return self.ever


class Broken(LocalMaps):
    """A store that can be broken, and made anew."""

    broken = False

    def publish(self, maps: Maps) -> Version:
        if self.broken:
            raise TimeoutError("nobody\nanswers")
        return super().publish(maps)

    def pull(self, since: Version | None = None) -> Pulled | None:
        if self.broken:
            raise TimeoutError("nobody\nanswers")
        return super().pull(since)


def make_sharing(learner: Learner, store: LocalMaps, *, rests: bool = True) -> Sharing:
    return Sharing(learner, Rests(ever=rests), store, every_s=60.0, patience_s=0.0)


def iterations(learner: Learner) -> float:
    return float(learner.policy.state_dict()["iterations"][0])


def test_everybody_knows_everything_once() -> None:
    store, learners = LocalMaps(), [Learner(0), Learner(1, 2), Learner()]
    sharings = [make_sharing(learner, store) for learner in learners]
    for _ in range(3):
        for sharing in sharings:
            sharing.exchange()
    own = len(make_maps(seeds=(0,)))
    assert [learner.num_updates for learner in learners] == [3 * own] * 3
    assert [iterations(learner) for learner in learners] == [3.0 * own] * 3
    learners[2].learn(3)
    for _ in range(4):
        for sharing in sharings:
            sharing.exchange()
    assert [learner.num_updates for learner in learners] == [4 * own] * 3
    assert [iterations(learner) for learner in learners] == [4.0 * own] * 3


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=10))
def test_whatever_the_order_all_know_the_same_in_the_end(turns: list[tuple[int, bool]]) -> None:
    store, learners = LocalMaps(), [Learner(), Learner(), Learner()]
    sharings = [make_sharing(learner, store) for learner in learners]
    for seed, (who, learns) in enumerate(turns):
        if learns:
            learners[who].learn(seed)
        else:
            sharings[who].exchange()
    for sharing in 3 * sharings:
        sharing.exchange()
    expected = sum(len(make_maps(seeds=(seed,))) for seed, (_, learns) in enumerate(turns) if learns)
    assert [learner.num_updates for learner in learners] == [expected] * 3
    if expected:
        assert [iterations(learner) for learner in learners] == [expected] * 3


def test_a_new_server_starts_warm_and_tells_what_is_left_at_its_end() -> None:
    store, old, new = LocalMaps(), Learner(0, 1), Learner()
    make_sharing(old, store).exchange()
    sharing = make_sharing(new, store)
    sharing.start()
    assert new.num_updates == old.num_updates
    new.learn(2)
    sharing.close()
    pulled = store.pull()
    assert pulled is not None and pulled.maps is not None and len(pulled.maps) == new.num_updates


def test_a_server_that_never_rests_tells_others_and_learns_from_none() -> None:
    store, busy = LocalMaps(), Learner(0)
    store.publish(make_maps(seeds=(1,)))
    sharing = make_sharing(busy, store, rests=False)
    for _ in range(2):
        sharing.exchange()
    assert busy.num_updates == len(make_maps(seeds=(0,)))
    pulled = store.pull()
    assert pulled is not None and pulled.maps is not None and len(pulled.maps) == 2 * busy.num_updates


def test_what_is_learned_while_maps_are_merged_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    store, learner = LocalMaps(), Learner(0)
    store.publish(make_maps(seeds=(1,)))
    sharing = make_sharing(learner, store)
    load_maps = learner.load_maps

    def late(maps: Maps, num_updates: int) -> bool:
        learner.learn(2)
        monkeypatch.undo()
        return load_maps(maps, num_updates)

    monkeypatch.setattr(learner, "load_maps", late)
    sharing.exchange()
    sharing.exchange()
    assert iterations(learner) == learner.num_updates == 3 * len(make_maps(seeds=(0,)))


def test_an_outage_is_one_warning_and_a_lost_store_is_told_anew(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    store, learner = Broken(), Learner(0)
    sharing = make_sharing(learner, store)
    sharing.exchange()
    store.broken = True
    for seed in (1, 2):
        learner.learn(seed)
        sharing.exchange()
    (record,) = caplog.records
    assert record.getMessage() == (
        "maps can't be shared (TimeoutError: nobody answers); going on without, and trying again"
    )
    store.__init__()  # type: ignore[misc] # it starts anew, empty
    store.broken = False
    other = Learner(5)
    make_sharing(other, store).exchange()
    for _ in range(3):
        sharing.exchange()
    pulled = store.pull()
    assert pulled is not None and pulled.maps is not None
    assert len(pulled.maps) == learner.num_updates == 4 * len(make_maps(seeds=(0,)))
    assert [each.getMessage() for each in caplog.records[1:]] == ["maps are shared again"]
