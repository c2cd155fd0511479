"""Merging and pruning of maps: what is kept, and the links."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.errors import ConfigError
from finemoe.learned import Maps, merge, prune
from finemoe.learned.compaction import _overlap
from finemoe.learned.file import check_arrays
from finemoe.policy import make_policy
from finemoe.policy.finemoe.history import NO_ROW
from tests.learned.make import PERSISTENT, SHAPE, make_maps

Seeds = st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True)


def contents(maps: Maps) -> list[bytes]:
    """The contents of each map, without its links."""
    names = ("ids", "weights", "tokens") if maps.has_links else ("maps", "tokens")
    return [b"".join(maps.arrays[name][row].tobytes() for name in names) for row in range(len(maps))]


def follows(maps: Maps) -> set[tuple[bytes, bytes]]:
    rows = contents(maps)
    return {(rows[before], rows[row]) for row, before in enumerate(maps.arrays["before"]) if before != NO_ROW}


def check_valid(maps: Maps) -> None:
    assert check_arrays(maps.arrays, maps.layers, maps.experts) is None
    policy = make_policy(maps.policy, maps.layers, maps.experts)
    policy.load_state_dict(maps.arrays)
    assert len(policy.state_dict()["tokens"]) == len(maps)


@pytest.mark.parametrize("policy", PERSISTENT)
@given(st.lists(Seeds, min_size=2, max_size=4), st.sampled_from([None, 1, 5, 100]))
def test_a_merge_has_every_map_once(policy: str, parts: list[list[int]], capacity: int | None) -> None:
    stores = [make_maps(policy, seeds) for seeds in parts]
    merged = merge(stores, capacity)
    check_valid(merged)
    everything = {row for store in stores for row in contents(store)}
    found = contents(merged)
    assert len(set(found)) == len(found)
    assert set(found) <= everything
    assert len(found) == min(len(everything), capacity or len(everything))
    if merged.has_links:
        links = {link for store in stores for link in follows(store)}
        assert follows(merged) <= links
        if capacity is None:
            assert len(follows(merged)) == len(links)


def test_the_newest_of_each_store_are_kept() -> None:
    one, other = make_maps(seeds=(0, 1, 2)), make_maps(seeds=(3,))
    merged = merge([one, other], 4)
    assert contents(merged) == [contents(other)[-2], contents(one)[-2], contents(other)[-1], contents(one)[-1]]
    assert merged.arrays["before"].tolist() == [NO_ROW, NO_ROW, 0, 1]
    assert merge([one, other]).arrays["iterations"].tolist() == [20.0] * 3


def test_equal_maps_within_one_store_are_kept() -> None:
    twice = make_maps(seeds=(0, 0))
    assert len(merge([twice, make_maps(seeds=(1,))])) == 15
    assert len(merge([twice, make_maps(seeds=(0,))])) == 10


def test_stores_of_other_models_policies_or_shapes_are_not_merged() -> None:
    for other in (make_maps(model="4567"), make_maps("expert-map")):
        with pytest.raises(ConfigError, match=r"differ in (model|policy)"):
            merge([make_maps(), other])


@pytest.mark.parametrize("policy", PERSISTENT)
@given(st.integers(0, 99), st.integers(1, 40), st.sampled_from([1, 3, 100]))
def test_pruning_keeps_the_given_number(policy: str, seed: int, keep: int, window: int) -> None:
    maps = make_maps(policy, (seed, seed, seed + 1), length=12)
    pruned = prune(maps, keep, window=window)
    check_valid(pruned)
    assert len(pruned) == min(keep, len(maps))
    if pruned.has_links:
        assert follows(pruned) <= follows(maps)


def test_of_equal_maps_the_newest_is_kept() -> None:
    maps = make_maps(seeds=(0, 1, 0, 0))
    pruned = prune(maps, 10)
    assert set(contents(pruned)) == set(contents(maps))
    assert contents(pruned)[-5:] == contents(maps)[-5:]
    assert pruned.arrays["before"].tolist() == [NO_ROW, 0, 1, 2, 3, NO_ROW, 5, 6, 7, 8]


@given(st.integers(0, 30), st.integers(1, 30))
def test_pruning_matches_its_definition(seed: int, keep: int) -> None:
    """Dropping one map after the other by the full similarity matrix; few nearest maps are stored per row."""
    maps = make_maps(seeds=(seed, seed + 1, seed), length=14)
    n, tokens = len(maps), maps.arrays["tokens"]
    common = _overlap(maps)(np.arange(n), np.arange(n))
    common[tokens[:, None] != tokens] = 0.0
    kept = list(range(n))
    while len(kept) > keep:
        redundancy = [max((common[row, other] for other in kept if other > row), default=0.0) for row in kept]
        kept.pop(int(np.argmax(np.asarray(redundancy, np.float32))))
    assert contents(prune(maps, keep)) == contents(maps.select(kept))


def test_overlap_is_one_for_equal_and_zero_for_disjoint_maps() -> None:
    maps = make_maps(seeds=(0,))
    maps.arrays["ids"][0], maps.arrays["weights"][0] = [1, 6], [255, 0]
    maps.arrays["ids"][1], maps.arrays["weights"][1] = [5, 0], [255, 0]
    similarity = _overlap(maps)
    np.testing.assert_allclose(similarity(np.arange(2), np.arange(2)), np.eye(2))
    np.testing.assert_allclose(similarity(np.array([0]), np.arange(2)), [[1, 0]])
    assert SHAPE.experts == 6
