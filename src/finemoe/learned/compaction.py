"""Merging several `Maps` into one without duplicates, and pruning of redundant maps."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.errors import ConfigError
from finemoe.learned.maps import ROW_ARRAYS, Ints, Maps
from finemoe.policy.base import StateDict
from finemoe.policy.finemoe.history import LEVELS, NO_ROW
from finemoe.policy.finemoe.prompt_prior import REQUESTS

Floats = npt.NDArray[np.float32]
Similarity = Callable[[Ints, Ints], Floats]  # rows [a], rows [b] -> similarities [a, b], from 0 to 1

_WINDOW = 4096  # newer maps that each map is compared with
_BLOCK = 1024  # maps compared at once
_NEAREST = 8  # most similar newer maps that are stored for each map
_DISTANCE = 3  # d in the redundancy of expert maps


def merge(stores: Sequence[Maps], capacity: int | None = None) -> Maps:
    """Merges maps: the newest of each store, then the second newest of each, and so on.

    If two stores have the same map, with equal predecessor and successor, only the newer copy is kept. Equal maps
    within one store are all kept: they were observed repeatedly. Links lead to the copies that are kept.

    Args:
        stores: of one policy and model; at least one.
        capacity: keep the newest so many; by default all.

    Raises:
        ConfigError: the stores are of several policies, models or shapes.
    """
    first = stores[0]
    for other in stores[1:]:
        if difference := first.incompatibility(other):
            raise ConfigError(f"maps of {first.name} and {other.name} can't be merged: they differ in {difference}")
    arrays = _concatenated(stores)
    origin = np.repeat(np.arange(len(stores)), [len(store) for store in stores])
    ages = np.concatenate([store.ages for store in stores])
    copies = _kept_copies(arrays, origin, ages)
    kept = np.unique(copies)
    kept = kept[np.lexsort((origin[kept], ages[kept]))][:capacity][::-1]  # oldest first
    merged = {name: array[kept] for name, array in arrays.items()}
    if "before" in arrays:
        merged["before"] = _relinked(arrays["before"], copies, kept)
    else:
        merged["born"] = np.arange(1, len(kept) + 1)
    return replace(first, arrays=merged | _totals(stores, len(kept)))


def prune(maps: Maps, keep: int, *, window: int = _WINDOW, tick: Callable[[], None] = lambda: None) -> Maps:
    """Drops the most redundant maps, one after the other, until `keep` are left.

    The redundancy of a map is its similarity to the most similar newer map that is still kept: for maps with links,
    the mean overlap per layer, among maps of the same input token; for the others, the redundancy score of
    `ExpertMapStore`. Ties: the oldest is dropped first.

    Args:
        maps: to prune; returned as they are if there are no more than `keep`.
        keep: how many.
        window: how many newer maps each map is compared with.
        tick: called regularly, e.g. to check for interrupts; may raise.
    """
    if len(maps) <= keep:
        return maps
    similarity = _overlap(maps) if maps.has_links else _redundancy(maps)
    kept = np.ones(len(maps), np.bool_)
    groups = list(_groups(maps))
    group = np.empty(len(maps), np.int64)  # of each row
    place = np.empty(len(maps), np.int64)  # of each row in its group
    nearest = np.full((len(maps), _NEAREST), -1)
    scores = np.zeros((len(maps), _NEAREST), np.float32)
    for number, rows in enumerate(groups):
        group[rows], place[rows] = number, np.arange(len(rows))
        _compare(rows, similarity, window, nearest, scores, tick)
    ages = maps.ages
    heap = [(-float(scores[row, 0]), -int(ages[row]), row, 0) for row in range(len(maps))]
    heapq.heapify(heap)
    left = len(maps)
    while left > keep:
        _, age, row, k = heapq.heappop(heap)
        if left % _BLOCK == 0:
            tick()
        if nearest[row, k] >= 0 and not kept[nearest[row, k]]:
            k += 1
            if k == _NEAREST:  # all of them were dropped: search again
                newer = groups[group[row]][place[row] + 1 : place[row] + 1 + window]
                newer = newer[kept[newer]]
                _store_nearest(np.array([row]), newer, similarity(np.array([row]), newer), nearest, scores)
                k = 0
            heapq.heappush(heap, (-float(scores[row, k]), age, row, k))
            continue
        kept[row] = False
        left -= 1
    return maps.select(np.flatnonzero(kept))


def _concatenated(stores: Sequence[Maps]) -> StateDict:
    """The row arrays of all stores, one after the other; links are shifted, missing keys are zero."""
    arrays: StateDict = {}
    width = max(store.embedding_width for store in stores)
    for name in sorted({name for store in stores for name in store.arrays} & ROW_ARRAYS):
        pieces, offset = [], 0
        for store in stores:
            array = store.arrays.get(name)
            if array is None:  # keys, which only other stores have
                array = np.zeros((len(store), width), np.float32)
            if name == "before":
                array = np.where(array == NO_ROW, NO_ROW, array + offset).astype(array.dtype)
            pieces.append(array)
            offset += len(store)
        arrays[name] = np.concatenate(pieces)
    return arrays


def _kept_copies(arrays: StateDict, origin: Ints, ages: Ints) -> Ints:
    """`[n]`: for each row, which row to keep of it and its copies in other stores: the newest.

    Args:
        arrays: of all rows.
        origin: `[n]`, store of each row.
        ages: `[n]`, age of each row within its store.
    """
    n = len(ages)
    content = _row_ids([arrays[name].reshape(n, -1) for name in ("ids", "weights", "maps", "tokens") if name in arrays])
    around = np.full((n + 1, 2), NO_ROW)  # contents before and after; the last entry is for `NO_ROW`
    if "before" in arrays:
        follows = np.flatnonzero(arrays["before"] != NO_ROW)
        around[follows, 0] = content[arrays["before"][follows]]
        around[arrays["before"][follows], 1] = content[follows]
    same = _row_ids([content[:, None], around[:n]])
    order = np.lexsort((ages, same, origin))  # by store, then by content, newest first
    starts = np.flatnonzero(np.r_[True, (np.diff(same[order]) != 0) | (np.diff(origin[order]) != 0)][:n])
    nth = np.empty(n, np.int64)  # the n-th newest in one store is a copy of the n-th newest in another
    nth[order] = np.arange(n) - np.repeat(starts, np.diff(np.r_[starts, n]))
    copy_group = _row_ids([same[:, None], nth[:, None]])
    order = np.lexsort((origin, ages, copy_group))
    newest = order[np.r_[True, np.diff(copy_group[order]) != 0][:n]]  # one per group
    copies: Ints = newest[copy_group]
    return copies


def _row_ids(parts: Sequence[npt.NDArray[Any]]) -> Ints:
    """`[n]`: a number per row, equal for rows that are equal in all parts `[n, ..]`."""
    rows = np.hstack([np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1) for part in parts])
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1]))).ravel()
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _relinked(before: Ints, copies: Ints, kept: Ints) -> npt.NDArray[np.int32]:
    """`before` of the kept rows: the kept copy of the previous row, if it is older and not linked to already."""
    new_row = np.full(len(before), NO_ROW)
    new_row[kept] = np.arange(len(kept))
    links = np.full(len(kept), NO_ROW, np.int32)
    claims = np.flatnonzero(before[kept] != NO_ROW)
    previous = copies[before[kept[claims]]]
    valid = (new_row[previous] != NO_ROW) & (new_row[previous] < claims)
    claims, previous = claims[valid], previous[valid]
    own = previous == before[kept[claims]]
    order = np.lexsort((claims, ~own))  # a row keeps its own successor rather than a copy's
    targets, winners = np.unique(new_row[previous[order]], return_index=True)
    links[claims[order][winners]] = targets
    return links


def _totals(stores: Sequence[Maps], number: int) -> StateDict:
    """The arrays that are totals over all iterations, of all stores together; `number` is the number of maps."""
    every = [store.arrays for store in stores]
    known = [int(arrays["active"][0]) for arrays in every if arrays["active"][0]]
    totals: StateDict = {"active": np.array([min(known, default=0)])}
    if not stores[0].has_links:
        return totals | {"p": every[0]["p"], "visits": np.sum([arrays["visits"] for arrays in every], axis=0)}
    iterations = np.sum([arrays["iterations"] for arrays in every], axis=0)
    shortest = min(len(arrays["lookahead"]) for arrays in every)
    uses = np.sum([arrays["usual"] * arrays["iterations"][:, None] for arrays in every], axis=0)
    return (
        totals
        | {
            "usual": np.divide(uses, iterations[:, None], out=np.zeros_like(uses), where=iterations[:, None] > 0),
            "iterations": iterations,
            "number": np.array([number]),
            "lookahead": np.mean([arrays["lookahead"][:shortest] for arrays in every], axis=0),
        }
        | _merged_prompts([arrays for arrays in every if "openings" in arrays])
    )


def _merged_prompts(every: Sequence[StateDict]) -> StateDict:
    """The arrays of the `PromptPrior`: the newest prompt of each store, then the second newest, oldest first."""
    every = [arrays for arrays in every if arrays["openings"].shape[1] == every[0]["openings"].shape[1]]
    if not every:
        return {}
    ages = np.concatenate([np.arange(len(arrays["openings"]))[::-1] for arrays in every])
    kept = np.argsort(ages, kind="stable")[:REQUESTS][::-1]
    return {name: np.concatenate([arrays[name] for arrays in every])[kept] for name in ("openings", "opened")}


def _groups(maps: Maps) -> Iterator[Ints]:
    """Groups of rows that are compared with each other, oldest first: by input token, or all rows without links."""
    order = np.argsort(-maps.ages, kind="stable")
    if not maps.has_links:
        yield order
        return
    tokens = maps.arrays["tokens"][order]
    by_token = np.argsort(tokens, kind="stable")
    yield from np.split(order[by_token], np.flatnonzero(np.diff(tokens[by_token])) + 1)


def _compare(
    rows: Ints, similarity: Similarity, window: int, nearest: Ints, scores: Floats, tick: Callable[[], None]
) -> None:
    """Finds the nearest newer rows of each row of a group, block by block."""
    for start in range(0, len(rows), _BLOCK):
        some = rows[start : start + _BLOCK]
        here = np.arange(start, start + len(some))[:, None]
        nearest[some], scores[some] = -1, 0.0
        for other in range(start, min(len(rows), start + len(some) + window), _BLOCK):
            tick()
            newer = rows[other : other + _BLOCK]
            there = np.arange(other, other + len(newer))
            found = np.where((there > here) & (there <= here + window), similarity(some, newer), -1.0)
            _store_nearest(some, newer, found.astype(np.float32), nearest, scores, add=True)


def _store_nearest(
    rows: Ints, newer: Ints, similarities: Floats, nearest: Ints, scores: Floats, *, add: bool = False
) -> None:
    """Stores the `_NEAREST` most similar of `newer` for each of `rows`; with `add`, keeps better ones stored before.

    Args:
        rows: `[a]`.
        newer: `[b]`.
        similarities: `[a, b]`.
        nearest: `[n, _NEAREST]`, updated: row numbers, best first, or -1.
        scores: `[n, _NEAREST]`, updated: their similarities.
        add: see above.
    """
    candidates, values = np.broadcast_to(newer, similarities.shape), similarities
    if add:
        candidates = np.hstack([nearest[rows], candidates])
        values = np.hstack([np.where(nearest[rows] < 0, -1, scores[rows]), values])
    most = min(_NEAREST, values.shape[1])
    best = np.argpartition(-values, most - 1, axis=1)[:, :most] if most else np.zeros((len(rows), 0), np.int64)
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(values, best, 1), axis=1, kind="stable"), 1)
    values, candidates = np.take_along_axis(values, best, 1), np.take_along_axis(candidates, best, 1)
    nearest[rows], scores[rows] = -1, 0.0
    nearest[rows[:, None], np.arange(most)] = np.where(values > 0, candidates, -1)
    scores[rows[:, None], np.arange(most)] = np.maximum(values, 0)


def _overlap(maps: Maps) -> Similarity:
    """Similarity of maps with links: the mean over layers of `sum(w_e * w'_e)`, see `history.encode_layer`."""
    ids, count = maps.arrays["ids"].astype(np.int32), maps.layers * maps.experts
    used, first = ids < maps.experts, (maps.experts * np.arange(maps.layers, dtype=np.int32))[:, None]
    column = np.where(used, ids + first, count).reshape(len(maps), -1)  # padding goes to the last one
    weight = np.where(used, maps.arrays["weights"], 0).reshape(len(maps), -1).astype(np.float32) / LEVELS

    def dense(rows: Ints) -> Floats:
        full = np.zeros((len(rows), count + 1), np.float32)
        full[np.arange(len(rows))[:, None], column[rows]] = weight[rows]
        return full

    def similarity(some: Ints, others: Ints) -> Floats:
        if len(some) == 1:
            common = (dense(some)[0][column[others]] * weight[others]).sum(axis=1)[None]
        else:
            common = dense(some) @ dense(others).T
        return np.asarray(common / maps.layers, np.float32)

    return similarity


def _redundancy(maps: Maps) -> Similarity:
    """Similarity of maps without links: the redundancy score of `ExpertMapStore`."""
    arrays: StateDict = maps.arrays
    flat = arrays["maps"].reshape(len(maps), -1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    units = flat / np.where(norms > 0, norms, 1)
    share = np.float32(min(1.0, _DISTANCE / maps.layers))
    tokens, keys = arrays["tokens"], arrays.get("keys")

    def similarity(some: Ints, others: Ints) -> Floats:
        semantic: npt.NDArray[Any] = (
            tokens[some][:, None] == tokens[others] if keys is None else keys[some] @ keys[others].T
        )
        return np.asarray(share * semantic + (1 - share) * (units[some] @ units[others].T), np.float32)

    return similarity
