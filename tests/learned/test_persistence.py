"""`MapPersistence`, with several processes that use the same file."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from finemoe.errors import FinemoeWarning
from finemoe.learned import MapPersistence, read_maps
from finemoe.policy import Policy, make_policy
from tests.learned.make import PERSISTENT, SHAPE, make_file
from tests.policy.workload import recorded


class Run:
    """One process, from reading the file to writing it."""

    def __init__(self, path: Path, policy: str) -> None:
        self.persistence = MapPersistence(path, policy, "0123", "a-model", explicit=True)
        self.policy: Policy = make_policy(policy, SHAPE.layers, SHAPE.experts)
        self.persistence.restore(self.policy)

    def learn(self, *seeds: int) -> Run:
        for seed in seeds:
            self.policy.learn(recorded(seed, SHAPE, length=6))
        return self

    def end(self) -> None:
        self.persistence.save(self.policy)


def contents(path: Path) -> list[bytes]:
    """The contents of each map, sorted."""
    maps = read_maps(path)
    names = [name for name in ("ids", "weights", "maps", "tokens") if name in maps.arrays]
    return sorted(b"".join(maps.arrays[name][i].tobytes() for name in names) for i in range(len(maps)))


def learned_in_turn(path: Path, policy: str, seeds: Sequence[int]) -> Path:
    for seed in seeds:
        Run(path, policy).learn(seed).end()
    return path


@pytest.mark.parametrize("policy", PERSISTENT)
@pytest.mark.parametrize("before", [(), (5,)], ids=["from nothing", "from a file"])
def test_maps_of_concurrent_processes_are_all_kept(tmp_path: Path, policy: str, before: Sequence[int]) -> None:
    path, alone = tmp_path / "maps", tmp_path / "alone"
    learned_in_turn(path, policy, before)
    first, second, third = Run(path, policy).learn(1), Run(path, policy).learn(2), Run(path, policy).learn(3)
    for run in (first, third, second):
        run.end()
    assert contents(path) == contents(learned_in_turn(alone, policy, [*before, 1, 2, 3]))
    counts = "iterations" if policy == "finemoe" else "visits"  # nothing is counted twice or lost
    np.testing.assert_allclose(read_maps(path).arrays[counts], read_maps(alone).arrays[counts], rtol=1e-6)


def test_simultaneous_writes_are_serialized(tmp_path: Path) -> None:
    path = tmp_path / "maps"
    runs = [Run(path, "finemoe").learn(seed) for seed in range(8)]
    threads = [threading.Thread(target=run.end) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(path) == contents(learned_in_turn(tmp_path / "alone", "finemoe", range(8)))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["alone", "maps"]


def test_a_file_damaged_in_the_meantime_is_replaced(tmp_path: Path) -> None:
    path = learned_in_turn(tmp_path / "maps", "finemoe", [0])
    run = Run(path, "finemoe").learn(1)
    path.write_bytes(path.read_bytes()[:-3])
    run.end()
    assert contents(path) == contents(learned_in_turn(tmp_path / "alone", "finemoe", [0, 1]))


def test_a_file_replaced_by_another_models_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "maps"
    run = Run(path, "finemoe").learn(1)
    theirs = make_file(path, model="4567").read_bytes()
    with pytest.warns(FinemoeWarning, match=r"maps has become a file of other maps, .*; what was learned is lost"):
        run.end()
    assert path.read_bytes() == theirs
