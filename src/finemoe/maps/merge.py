"""Several files' maps as one: the newest of each, in turn, none of them twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.errors import ConfigError
from finemoe.maps.maps import ROW_ARRAYS, Ints, Maps
from finemoe.policy.base import Knowledge
from finemoe.policy.openings import REQUESTS
from finemoe.policy.trail import NOBODY


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
        if difference := first.difference(other):
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


def _concatenated(stores: Sequence[Maps]) -> Knowledge:
    """All rows, one store after the other; links and keys adapted."""
    found: Knowledge = {}
    width = max(store.width for store in stores)
    for name in sorted({name for store in stores for name in store.arrays} & ROW_ARRAYS):
        pieces, offset = [], 0
        for store in stores:
            array = store.arrays.get(name)
            if array is None:  # keys, where only others have any
                array = np.zeros((len(store), width), np.float32)
            if name == "before":
                array = np.where(array == NOBODY, NOBODY, array + offset).astype(array.dtype)
            pieces.append(array)
            offset += len(store)
        found[name] = np.concatenate(pieces)
    return found


def _kept_copies(arrays: Knowledge, origin: Ints, ages: Ints) -> Ints:
    """`[n]`: for each row the one to keep of it and its copies in other stores."""
    n = len(ages)
    content = _numbered(
        [arrays[name].reshape(n, -1) for name in ("ids", "weights", "maps", "tokens") if name in arrays]
    )
    around = np.full((n + 1, 2), NOBODY)  # the contents before and after; the last entry is nobody's
    if "before" in arrays:
        follows = np.flatnonzero(arrays["before"] != NOBODY)
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
    place = np.full(len(before), NOBODY)
    place[kept] = np.arange(len(kept))
    links = np.full(len(kept), NOBODY, np.int32)
    claims = np.flatnonzero(before[kept] != NOBODY)
    wanted = copies[before[kept[claims]]]
    valid = (place[wanted] != NOBODY) & (place[wanted] < claims)
    claims, wanted = claims[valid], wanted[valid]
    own = wanted == before[kept[claims]]
    order = np.lexsort((claims, ~own))  # a row's own successor comes before that of a copy
    targets, winners = np.unique(place[wanted[order]], return_index=True)
    links[claims[order][winners]] = targets
    return links


def _totals(stores: Sequence[Maps], number: int) -> Knowledge:
    """What is known of all iterations together."""
    every = [store.arrays for store in stores]
    known = [int(arrays["active"][0]) for arrays in every if arrays["active"][0]]
    totals: Knowledge = {"active": np.array([min(known, default=0)])}
    if not stores[0].linked:
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


def _openings(every: Sequence[Knowledge]) -> Knowledge:
    """The newest prompt of each store, then the second newest, as many as a policy remembers; oldest first."""
    every = [arrays for arrays in every if arrays["openings"].shape[1] == every[0]["openings"].shape[1]]
    if not every:
        return {}
    ages = np.concatenate([np.arange(len(arrays["openings"]))[::-1] for arrays in every])
    kept = np.argsort(ages, kind="stable")[:REQUESTS][::-1]
    return {name: np.concatenate([arrays[name] for arrays in every])[kept] for name in ("openings", "opened")}
