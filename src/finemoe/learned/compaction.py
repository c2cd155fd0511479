"""Several files' maps as one: the newest of each, in turn, none of them twice."""

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


def merge(stores: Sequence[Maps], capacity: int | None = None) -> Maps:
    """The newest map of each store, then the second newest of each, and so on.

    Of maps that two stores share, with what came before and after, the newer copy is kept. Within one store nothing is
    dropped: it may have met the same thing twice. Links lead to the copy that was kept.

    Args:
        stores: of one policy and model; at least one.
        capacity: keep so many, the newest; by default all.

    Raises:
        ConfigError: they are of several policies, models or shapes.
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


def _concatenated(stores: Sequence[Maps]) -> StateDict:
    """All rows, one store after the other; links and keys adapted."""
    found: StateDict = {}
    width = max(store.embedding_width for store in stores)
    for name in sorted({name for store in stores for name in store.arrays} & ROW_ARRAYS):
        pieces, offset = [], 0
        for store in stores:
            array = store.arrays.get(name)
            if array is None:  # keys, where only others have any
                array = np.zeros((len(store), width), np.float32)
            if name == "before":
                array = np.where(array == NO_ROW, NO_ROW, array + offset).astype(array.dtype)
            pieces.append(array)
            offset += len(store)
        found[name] = np.concatenate(pieces)
    return found


def _kept_copies(arrays: StateDict, origin: Ints, ages: Ints) -> Ints:
    """`[n]`: for each row the one to keep of it and its copies in other stores."""
    n = len(ages)
    content = _numbered(
        [arrays[name].reshape(n, -1) for name in ("ids", "weights", "maps", "tokens") if name in arrays]
    )
    around = np.full((n + 1, 2), NO_ROW)  # the contents before and after; the last entry is nobody's
    if "before" in arrays:
        follows = np.flatnonzero(arrays["before"] != NO_ROW)
        around[follows, 0] = content[arrays["before"][follows]]
        around[arrays["before"][follows], 1] = content[follows]
    alike = _numbered([content[:, None], around[:n]])
    order = np.lexsort((ages, alike, origin))  # by store, then by what is alike in it, newest first
    starts = np.flatnonzero(
        np.r_[
            True,
            np.diff(alike[order]) != 0,
        ][:n]
        | np.r_[True, np.diff(origin[order]) != 0][:n]
    )
    nth = np.empty(n, np.int64)  # the newest in one store is a copy of the newest in another, and so on
    nth[order] = np.arange(n) - np.repeat(starts, np.diff(np.r_[starts, n]))
    group = _numbered([alike[:, None], nth[:, None]])
    order = np.lexsort((origin, ages, group))
    newest = order[np.r_[True, np.diff(group[order]) != 0][:n]]  # one of each group, by its number
    copies: Ints = newest[group]
    return copies


def _numbered(parts: Sequence[npt.NDArray[Any]]) -> Ints:
    """`[n]`: rows get the same number if they are equal in all parts `[n, ..]`."""
    rows = np.hstack([np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1) for part in parts])
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1]))).ravel()
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _relinked(before: Ints, copies: Ints, kept: Ints) -> npt.NDArray[np.int32]:
    """Links among the kept rows: to the kept copy of the row before, if that is older and nobody else's."""
    place = np.full(len(before), NO_ROW)
    place[kept] = np.arange(len(kept))
    links = np.full(len(kept), NO_ROW, np.int32)
    claims = np.flatnonzero(before[kept] != NO_ROW)
    wanted = copies[before[kept[claims]]]
    valid = (place[wanted] != NO_ROW) & (place[wanted] < claims)
    claims, wanted = claims[valid], wanted[valid]
    own = wanted == before[kept[claims]]
    order = np.lexsort((claims, ~own))  # a row's own successor comes before that of a copy
    targets, winners = np.unique(place[wanted[order]], return_index=True)
    links[claims[order][winners]] = targets
    return links


def _totals(stores: Sequence[Maps], number: int) -> StateDict:
    """What is known of all iterations together."""
    every = [store.arrays for store in stores]
    known = [int(arrays["active"][0]) for arrays in every if arrays["active"][0]]
    totals: StateDict = {"active": np.array([min(known, default=0)])}
    if not stores[0].has_links:
        return totals | {"p": every[0]["p"], "visits": np.sum([arrays["visits"] for arrays in every], axis=0)}
    iterations = np.sum([arrays["iterations"] for arrays in every], axis=0)
    known_by_all = min(len(arrays["lookahead"]) for arrays in every)
    uses = np.sum([arrays["usual"] * arrays["iterations"][:, None] for arrays in every], axis=0)
    return (
        totals
        | {
            "usual": np.divide(uses, iterations[:, None], out=np.zeros_like(uses), where=iterations[:, None] > 0),
            "iterations": iterations,
            "number": np.array([number]),
            "lookahead": np.mean([arrays["lookahead"][:known_by_all] for arrays in every], axis=0),
        }
        | _openings([arrays for arrays in every if "openings" in arrays])
    )


def _openings(every: Sequence[StateDict]) -> StateDict:
    """The newest prompt of each store, then the second newest, as many as a policy remembers; oldest first."""
    every = [arrays for arrays in every if arrays["openings"].shape[1] == every[0]["openings"].shape[1]]
    if not every:
        return {}
    ages = np.concatenate([np.arange(len(arrays["openings"]))[::-1] for arrays in every])
    kept = np.argsort(ages, kind="stable")[:REQUESTS][::-1]
    return {name: np.concatenate([arrays[name] for arrays in every])[kept] for name in ("openings", "opened")}


Floats = npt.NDArray[np.float32]
Likeness = Callable[[Ints, Ints], Floats]  # of rows [a] and rows [b]: [a, b]

_WINDOW = 4096  # maps that each is compared with
_BLOCK = 1024  # of them at once
_WITNESSES = 8  # the most similar ones, remembered
_DISTANCE = 3  # the published policy's d


def prune(maps: Maps, keep: int, *, window: int = _WINDOW, tick: Callable[[], None] = lambda: None) -> Maps:
    """The `keep` least redundant maps, or all if there are no more.

    Args:
        maps: what to choose from.
        keep: how many.
        window: how many newer maps each is compared with.
        tick: called now and then; may raise.
    """
    if len(maps) <= keep:
        return maps
    likeness = _overlap(maps) if maps.has_links else _redundancy(maps)
    kept = np.ones(len(maps), np.bool_)
    families = list(_families(maps))
    family = np.empty(len(maps), np.int64)  # of each row
    place = np.empty(len(maps), np.int64)  # in its family
    witnesses = np.full((len(maps), _WITNESSES), -1)
    scores = np.zeros((len(maps), _WITNESSES), np.float32)
    for number, rows in enumerate(families):
        family[rows], place[rows] = number, np.arange(len(rows))
        _compare(rows, likeness, window, witnesses, scores, tick)
    ages = maps.ages
    heap = [(-float(scores[row, 0]), -int(ages[row]), row, 0) for row in range(len(maps))]
    heapq.heapify(heap)
    left = len(maps)
    while left > keep:
        _, age, row, k = heapq.heappop(heap)
        if left % _BLOCK == 0:
            tick()
        if witnesses[row, k] >= 0 and not kept[witnesses[row, k]]:
            k += 1
            if k == _WITNESSES:  # all of them are gone: look for others
                newer = families[family[row]][place[row] + 1 : place[row] + 1 + window]
                newer = newer[kept[newer]]
                _remember(np.array([row]), newer, likeness(np.array([row]), newer), witnesses, scores)
                k = 0
            heapq.heappush(heap, (-float(scores[row, k]), age, row, k))
            continue
        kept[row] = False
        left -= 1
    return maps.select(np.flatnonzero(kept))


def _families(maps: Maps) -> Iterator[Ints]:
    """Rows that are compared with each other, oldest first."""
    order = np.argsort(-maps.ages, kind="stable")
    if not maps.has_links:
        yield order
        return
    tokens = maps.arrays["tokens"][order]
    by_token = np.argsort(tokens, kind="stable")
    yield from np.split(order[by_token], np.flatnonzero(np.diff(tokens[by_token])) + 1)


def _compare(
    rows: Ints, likeness: Likeness, window: int, witnesses: Ints, scores: Floats, tick: Callable[[], None]
) -> None:
    """Finds the witnesses of a family's rows, block by block."""
    for start in range(0, len(rows), _BLOCK):
        some = rows[start : start + _BLOCK]
        here = np.arange(start, start + len(some))[:, None]
        witnesses[some], scores[some] = -1, 0.0
        for other in range(start, min(len(rows), start + len(some) + window), _BLOCK):
            tick()
            newer = rows[other : other + _BLOCK]
            there = np.arange(other, other + len(newer))
            found = np.where((there > here) & (there <= here + window), likeness(some, newer), -1.0)
            _remember(some, newer, found.astype(np.float32), witnesses, scores, add=True)


def _remember(
    rows: Ints, newer: Ints, likenesses: Floats, witnesses: Ints, scores: Floats, *, add: bool = False
) -> None:
    """Keeps the best of `newer` as witnesses of `rows`, by their likeness `[a, b]`; with `add`, of those known too."""
    who, how = np.broadcast_to(newer, likenesses.shape), likenesses
    if add:
        who, how = np.hstack([witnesses[rows], who]), np.hstack([np.where(witnesses[rows] < 0, -1, scores[rows]), how])
    most = min(_WITNESSES, how.shape[1])
    best = np.argpartition(-how, most - 1, axis=1)[:, :most] if most else np.zeros((len(rows), 0), np.int64)
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(how, best, 1), axis=1, kind="stable"), 1)
    how, who = np.take_along_axis(how, best, 1), np.take_along_axis(who, best, 1)
    witnesses[rows], scores[rows] = -1, 0.0
    witnesses[rows[:, None], np.arange(most)] = np.where(how > 0, who, -1)
    scores[rows[:, None], np.arange(most)] = np.maximum(how, 0)


def _overlap(maps: Maps) -> Likeness:
    """Of a finemoe row with another: the mean over layers of what they share, from 0 to 1."""
    ids, count = maps.arrays["ids"].astype(np.int32), maps.layers * maps.experts
    used, first = ids < maps.experts, (maps.experts * np.arange(maps.layers, dtype=np.int32))[:, None]
    column = np.where(used, ids + first, count).reshape(len(maps), -1)  # nobody's is the last one
    weight = np.where(used, maps.arrays["weights"], 0).reshape(len(maps), -1).astype(np.float32) / LEVELS

    def spread(rows: Ints) -> Floats:
        full = np.zeros((len(rows), count + 1), np.float32)
        full[np.arange(len(rows))[:, None], column[rows]] = weight[rows]
        return full

    def likeness(some: Ints, others: Ints) -> Floats:
        if len(some) == 1:
            common = (spread(some)[0][column[others]] * weight[others]).sum(axis=1)[None]
        else:
            common = spread(some) @ spread(others).T
        return np.asarray(common / maps.layers, np.float32)

    return likeness


def _redundancy(maps: Maps) -> Likeness:
    """Of an expert map with another, as in `MapStore`."""
    arrays: StateDict = maps.arrays
    flat = arrays["maps"].reshape(len(maps), -1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    units = flat / np.where(norms > 0, norms, 1)
    share = np.float32(min(1.0, _DISTANCE / maps.layers))
    tokens, keys = arrays["tokens"], arrays.get("keys")

    def likeness(some: Ints, others: Ints) -> Floats:
        semantic: npt.NDArray[Any] = (
            tokens[some][:, None] == tokens[others] if keys is None else keys[some] @ keys[others].T
        )
        return np.asarray(share * semantic + (1 - share) * (units[some] @ units[others].T), np.float32)

    return likeness
