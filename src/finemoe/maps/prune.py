"""Fewer maps that say nearly the same: the most redundant go first.

How redundant a map is: how much it has in common with the most similar *newer* map that is kept, among the `_WINDOW`
next newer ones of its kind. So what stands for a dropped map is there in the end, and newer.

- Maps of `finemoe`: of the same input token; the overlap of the two rows, 1 if they used the same experts with the same
  weights in all layers.
- Maps of `expert-map`: of any token; the published store's redundancy, `(d / L) * semantic + ((L - d) / L) *
  trajectory`, cosines both (without embeddings the former is 1 for the same token), d = 3.

Maps that nothing newer resembles go last, the oldest first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.maps.maps import Ints, Maps
from finemoe.policy.base import Knowledge
from finemoe.policy.trail import LEVELS

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
    likeness = _overlap(maps) if maps.linked else _redundancy(maps)
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
    return maps.only(np.flatnonzero(kept))


def _families(maps: Maps) -> Iterator[Ints]:
    """Rows that are compared with each other, oldest first."""
    order = np.argsort(-maps.ages, kind="stable")
    if not maps.linked:
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
    arrays: Knowledge = maps.arrays
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
