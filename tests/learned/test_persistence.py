"""The file that a policy's maps are kept in, and several processes that keep theirs in one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from finemoe.errors import FinemoeWarning
from finemoe.learned import MapPersistence, read_maps
from finemoe.policy import Policy, make_policy
from tests.learned.make import REMEMBERING, SHAPE, make_file
from tests.policy.workload import recorded


class Run:
    """One process: from reading the file to writing it."""

    def __init__(self, path: Path, policy: str) -> None:
        self.keeper = MapPersistence(path, policy, "0123", "a-model", chosen=True)
        self.policy: Policy = make_policy(policy, SHAPE.layers, SHAPE.experts)
        self.keeper.restore(self.policy)

    def learn(self, *seeds: int) -> Run:
        for seed in seeds:
            self.policy.learn(recorded(seed, SHAPE, length=6))
        return self

    def end(self) -> None:
        self.keeper.keep(self.policy)


def contents(path: Path) -> list[bytes]:
    """Each map, without its place among the others."""
    maps = read_maps(path)
    names = [name for name in ("ids", "weights", "maps", "tokens") if name in maps.arrays]
    return sorted(b"".join(maps.arrays[name][i].tobytes() for name in names) for i in range(len(maps)))


def learned_in_turn(path: Path, policy: str, seeds: Sequence[int]) -> Path:
    for seed in seeds:
        Run(path, policy).learn(seed).end()
    return path


@pytest.mark.parametrize("policy", REMEMBERING)
@pytest.mark.parametrize("before", [(), (5,)], ids=["from nothing", "from a file"])
def test_processes_that_end_together_keep_what_each_has_learned(
    tmp_path: Path, policy: str, before: Sequence[int]
) -> None:
    path, alone = tmp_path / "maps", tmp_path / "alone"
    learned_in_turn(path, policy, before)
    first, second, third = Run(path, policy).learn(1), Run(path, policy).learn(2), Run(path, policy).learn(3)
    for run in (first, third, second):
        run.end()
    assert contents(path) == contents(learned_in_turn(alone, policy, [*before, 1, 2, 3]))
    counts = "iterations" if policy == "finemoe" else "visits"  # nothing is counted twice, nothing lost
    np.testing.assert_allclose(read_maps(path).arrays[counts], read_maps(alone).arrays[counts], rtol=1e-6)


def test_processes_that_write_at_the_same_moment_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "maps"
    runs = [Run(path, "finemoe").learn(seed) for seed in range(8)]
    threads = [threading.Thread(target=run.end) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(path) == contents(learned_in_turn(tmp_path / "alone", "finemoe", range(8)))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["alone", "maps"]


def test_a_file_that_is_damaged_in_the_meantime_is_replaced(tmp_path: Path) -> None:
    path = learned_in_turn(tmp_path / "maps", "finemoe", [0])
    run = Run(path, "finemoe").learn(1)
    path.write_bytes(path.read_bytes()[:-3])
    run.end()
    assert contents(path) == contents(learned_in_turn(tmp_path / "alone", "finemoe", [0, 1]))


def test_a_file_that_becomes_another_models_in_the_meantime_stays(tmp_path: Path) -> None:
    path = tmp_path / "maps"
    run = Run(path, "finemoe").learn(1)
    theirs = make_file(path, model="4567").read_bytes()
    with pytest.warns(FinemoeWarning, match=r"maps has become a file of other maps, .*; what was learned is lost"):
        run.end()
    assert path.read_bytes() == theirs
