"""Shared stores: publications are merged and bounded, and damaged files are skipped."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finemoe.errors import ConfigError, MapsError
from finemoe.learned import (
    FolderMaps,
    LocalMaps,
    Maps,
    SharedMaps,
    Version,
    merge,
    new_maps,
    num_updates,
    with_new_totals,
)
from finemoe.policy import make_policy
from tests.learned.make import PERSISTENT, SHAPE, make_maps
from tests.policy.workload import recorded

Open = Callable[[int], SharedMaps]  # another process's view of the same store


@pytest.fixture(params=["local", "disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    if request.param == "local":
        stores: dict[int, LocalMaps] = {}
        return lambda limit: stores.setdefault(0, LocalMaps(limit))
    url = str(tmp_path / "maps") if request.param == "disk" else f"memory://{uuid.uuid4()}"
    return lambda limit: FolderMaps(url, "0123", "finemoe", limit)


def pull(store: SharedMaps, since: Version | None = None) -> tuple[Version, Maps]:
    pulled = store.pull(since)
    assert pulled is not None and pulled.maps is not None
    return pulled.version, pulled.maps


def same(one: Maps, other: Maps) -> bool:
    return one.arrays.keys() == other.arrays.keys() and all(
        np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays
    )


def test_published_maps_are_pulled_by_others(store: Open) -> None:
    here, there = store(100), store(100)
    empty = here.pull()
    assert empty is not None and empty.maps is None
    assert here.pull(empty.version) is None
    mine, yours = make_maps(seeds=(0,)), make_maps(seeds=(1, 2))
    assert here.publish(mine).follows(empty.version)
    version, maps = pull(there)
    assert len(maps) == len(mine)
    assert there.pull(version) is None
    assert there.publish(yours).follows(version), "no other process has published"
    version, both = pull(here)
    assert len(both) == len(mine) + len(yours)
    assert both.arrays["iterations"][0] == mine.arrays["iterations"][0] + yours.arrays["iterations"][0]
    assert here.pull(version) is None


def test_a_store_is_bounded_and_keeps_the_newest(store: Open) -> None:
    here = store(7)
    for seed in range(4):
        here.publish(make_maps(seeds=(seed,)))
    _, maps = pull(here)
    assert len(maps) == 7
    last = make_maps(seeds=(3,)).arrays["ids"][-1]
    assert any(np.array_equal(row, last) for row in maps.arrays["ids"])


def test_maps_of_another_model_are_refused(store: Open) -> None:
    here = store(100)
    here.publish(make_maps(seeds=(0,)))
    with pytest.raises(MapsError):
        here.publish(make_maps(seeds=(1,), model="4567"))


def test_damaged_and_other_files_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = str(tmp_path / "maps")
    whole, damaged = FolderMaps(url, "0123", "finemoe"), FolderMaps(url, "0123", "finemoe")
    whole.publish(make_maps(seeds=(0,)))
    damaged.publish(make_maps(seeds=(1, 2)))
    folder = tmp_path / "maps" / "0123-finemoe"
    (folder / "notes.txt").write_text("not ours")
    victim = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content)
    caplog.set_level(logging.WARNING)
    reader = FolderMaps(url, "0123", "finemoe")
    version, maps = pull(reader)
    assert len(maps) == len(make_maps(seeds=(0,)))
    assert reader.pull(version) is None
    (record,) = caplog.records
    assert "damaged" in record.getMessage() and victim.name in record.getMessage()
    assert "\n" not in record.getMessage()


def test_surplus_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.learned.shared_folder._MOST_FILES", 3)
    for seed in range(5):
        FolderMaps(str(tmp_path), "0123", "finemoe").publish(make_maps(seeds=(seed,)))
    _, maps = pull(FolderMaps(str(tmp_path), "0123", "finemoe"))
    assert len(maps) == 3 * len(make_maps(seeds=(0,)))
    assert len(list((tmp_path / "0123-finemoe").iterdir())) == 3


def test_unknown_storage_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^--shared-maps: can't use 'nowhere://maps' \("):
        FolderMaps("nowhere://maps", "0123", "finemoe")


@pytest.mark.parametrize("name", PERSISTENT)
def test_new_maps_are_what_was_learned_since_and_counted_once(name: str) -> None:
    policy = make_policy(name, SHAPE.layers, SHAPE.experts)

    def known() -> Maps:
        return Maps(name, "0123", "a-model", SHAPE.layers, SHAPE.experts, policy.state_dict())

    policy.learn(recorded(0, SHAPE, length=6))
    before = known()
    assert new_maps(before, None) is before
    assert new_maps(before, before) is None
    policy.learn(recorded(1, SHAPE, length=5))
    now = known()
    added = new_maps(now, before)
    assert added is not None and len(added) == len(now) - len(before)
    again = merge([before, added])
    assert len(again) == len(now) and num_updates(again) == len(now)
    assert len(merge([again, with_new_totals(now, now)])) == len(now)
    totals = merge([before, with_new_totals(now, before)]).arrays
    for total in {"usual", "iterations", "visits"} & set(totals):
        np.testing.assert_allclose(totals[total], now.arrays[total], atol=1e-12)
        np.testing.assert_allclose(again.arrays[total], now.arrays[total], atol=1e-12)


def test_prompts_are_published_once(tmp_path: Path) -> None:
    before = make_maps(seeds=(0,))
    width = np.arange(4, dtype=np.float32)
    usage = np.ones((1, SHAPE.layers, SHAPE.experts), np.float32)
    now = make_maps(seeds=(0, 1))
    before.arrays.update(openings=width[None], opened=usage)
    now.arrays.update(openings=np.stack([width, width + 1]), opened=np.concatenate([usage, usage / 2]))
    added = new_maps(now, before)
    assert added is not None and np.array_equal(added.arrays["openings"], [width + 1])
    assert np.array_equal(added.arrays["opened"], usage / 2)
    nothing = with_new_totals(now, now)
    assert nothing.arrays["openings"].shape == (0, 4)
    FolderMaps(str(tmp_path), "0123", "finemoe").publish(nothing)
    _, maps = pull(FolderMaps(str(tmp_path), "0123", "finemoe"))
    assert same(maps, nothing)
