"""Finished iterations, each linked to the one before it and the one after it: what followed is a lookup."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.policy.kernel import kernel

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.unsignedinteger]
Ints = npt.NDArray[np.int64]

NOBODY = -1  # instead of a row
LEVELS = 255  # an expert's weight in a row is a share of so much


class Trail(NamedTuple):
    """The rows of a ring of `S`. An expert's weight is the root of its share of the gate, in `LEVELS`."""

    ids: Ids  # [S, L, K], what each row used; `E` where it used fewer
    columns: npt.NDArray[np.uint8]  # [L, E, S], each expert's weight in every row
    tokens: npt.NDArray[np.int32]  # [S], the input token
    before: npt.NDArray[np.int32]  # [S], the row of the same request's iteration before, or `NOBODY`
    after: npt.NDArray[np.int32]  # [S], of the one after


def make_trail(layers: int, experts: int, active: int, capacity: int) -> Trail:
    """Without a row."""
    dtype = np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16
    return Trail(
        np.full((capacity, layers, active), experts, dtype),
        np.zeros((layers, experts, capacity), np.uint8),
        np.full(capacity, -1, np.int32),
        np.full(capacity, NOBODY, np.int32),
        np.full(capacity, NOBODY, np.int32),
    )


class Rows(NamedTuple):
    """The rows of a trail, `n` of them, oldest first: what is kept of it."""

    ids: Ids  # [n, L, K], as in `Trail`
    weights: npt.NDArray[np.uint8]  # [n, L, K], of each in `LEVELS`
    tokens: npt.NDArray[np.int32]  # [n]
    before: npt.NDArray[np.int32]  # [n], the place among these of the iteration before, always lower, or `NOBODY`


def rows_of(trail: Trail, number: int) -> Rows:
    """What a trail holds after `number` iterations were ever taken in."""
    capacity, layers, active = trail.ids.shape
    experts = trail.columns.shape[1]
    size = min(number, capacity)
    order = np.arange(number - size, number) % capacity
    place = np.full(capacity + 1, NOBODY, np.int32)  # the last entry is nobody's
    place[order] = np.arange(size)
    ids, weights = trail.ids[order], np.zeros((size, layers, active), np.uint8)
    for layer in range(layers):
        for k in range(active):
            there = np.flatnonzero(ids[:, layer, k] < experts)
            weights[there, layer, k] = trail.columns[layer, ids[there, layer, k], order[there]]
    return Rows(ids, weights, trail.tokens[order], place[trail.before[order]])


def trail_of(rows: Rows, experts: int, capacity: int, number: int) -> Trail:
    """A trail of the newest `capacity` rows, the last of which is the iteration `number - 1` that was taken in."""
    left_out = max(0, len(rows.tokens) - capacity)
    ids, weights, tokens, before = (array[left_out:] for array in rows)
    (size, layers, active), place = ids.shape, np.where(before >= left_out, before - left_out, NOBODY)
    trail = make_trail(layers, experts, active, capacity)
    at = np.arange(number - size, number) % capacity
    trail.ids[at], trail.tokens[at] = ids, tokens
    follows = np.flatnonzero(place != NOBODY)
    trail.before[at[follows]] = at[place[follows]]
    trail.after[at[place[follows]]] = at[follows]
    for layer in range(layers):
        for k in range(active):
            there = np.flatnonzero(ids[:, layer, k] < experts)
            trail.columns[layer, ids[there, layer, k], at[there]] = weights[there, layer, k]
    return trail


@kernel
def append(trail: Trail, number: int, tokens: npt.NDArray[np.int32], ids: Ids, weights: Ids, previous: int) -> None:
    """Takes in `n` successive iterations of a request; the oldest rows make room.

    A row whose neighbour was overwritten has none any more.

    Args:
        trail: is changed.
        number: how many iterations were ever taken in: iteration i lies in row `i % S`.
        tokens: `[n]`.
        ids: `[n, L, K]`, as in `Trail`.
        weights: `[n, L, K]`, as in `Trail`.
        previous: the number of the iteration before them, or `NOBODY`.
    """
    capacity, layers, active = trail.ids.shape
    experts = trail.columns.shape[1]
    for i in range(len(tokens)):
        row = (number + i) % capacity
        if trail.before[row] != NOBODY:
            trail.after[trail.before[row]] = NOBODY
        if trail.after[row] != NOBODY:
            trail.before[trail.after[row]] = NOBODY
        trail.tokens[row] = tokens[i]
        trail.after[row] = NOBODY
        trail.before[row] = NOBODY
        if previous != NOBODY and previous > number + i - capacity:
            trail.before[row] = previous % capacity
            trail.after[previous % capacity] = row
        previous = number + i
        for layer in range(layers):
            for k in range(active):
                old = trail.ids[row, layer, k]
                if old < experts:
                    trail.columns[layer, old, row] = 0
            for k in range(active):
                new = ids[i, layer, k]
                trail.ids[row, layer, k] = new
                if new < experts:
                    trail.columns[layer, new, row] = weights[i, layer, k]


@kernel
def imprint(gates: Floats, executed: Flags, ids: Ids, weights: Ids) -> None:
    """One layer of a row: the likeliest of the executed experts, as many as there is room for.

    Args:
        gates: `[E]`; if those executed have none, they count alike.
        executed: `[E]`.
        ids: `[K]`, filled in, as in `Trail`.
        weights: `[K]`, filled in, as in `Trail`.
    """
    experts = len(gates)
    rest, total, count = executed.copy(), 0.0, 0
    for k in range(len(ids)):
        best = experts
        for expert in range(experts):
            if rest[expert] and (best == experts or gates[expert] > gates[best]):
                best = expert
        ids[k] = best
        if best < experts:
            rest[best] = False
            total += gates[best]
            count += 1
    for k in range(len(ids)):
        share = 0.0
        if k < count:
            share = gates[ids[k]] / total if total > 0.0 else 1.0 / count
        weights[k] = int(np.rint(LEVELS * np.sqrt(share)))


@kernel
def imprint_all(gates: Floats, executed: Flags, ids: Ids, weights: Ids) -> None:
    """`imprint` of `n` iterations: `[n, L, E]` to `[n, L, K]`."""
    for i in range(len(ids)):
        for layer in range(ids.shape[1]):
            imprint(gates[i, layer], executed[i, layer], ids[i, layer], weights[i, layer])
