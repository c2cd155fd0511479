"""Finished iterations, each linked to the one before it and the one after it: what followed is a lookup."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import kernel

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.unsignedinteger]
Ints = npt.NDArray[np.int64]

NO_ROW = -1  # instead of a row
LEVELS = 255  # an expert's weight in a row is a share of so much


class History(NamedTuple):
    """The rows of a ring of `S`. An expert's weight is the root of its share of the gate, in `LEVELS`."""

    ids: Ids  # [S, L, K], what each row used; `E` where it used fewer
    columns: npt.NDArray[np.uint8]  # [L, E, S], each expert's weight in every row
    tokens: npt.NDArray[np.int32]  # [S], the input token
    before: npt.NDArray[np.int32]  # [S], the row of the same request's iteration before, or `NO_ROW`
    after: npt.NDArray[np.int32]  # [S], of the one after


def make_history(layers: int, experts: int, active: int, capacity: int) -> History:
    """Without a row."""
    dtype = np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16
    return History(
        np.full((capacity, layers, active), experts, dtype),
        np.zeros((layers, experts, capacity), np.uint8),
        np.full(capacity, -1, np.int32),
        np.full(capacity, NO_ROW, np.int32),
        np.full(capacity, NO_ROW, np.int32),
    )


class HistoryRows(NamedTuple):
    """The rows of a trail, `n` of them, oldest first: what is kept of it."""

    ids: Ids  # [n, L, K], as in `History`
    weights: npt.NDArray[np.uint8]  # [n, L, K], of each in `LEVELS`
    tokens: npt.NDArray[np.int32]  # [n]
    before: npt.NDArray[np.int32]  # [n], the place among these of the iteration before, always lower, or `NO_ROW`


def rows_of(history: History, number: int) -> HistoryRows:
    """What a trail holds after `number` iterations were ever taken in."""
    capacity, layers, active = history.ids.shape
    experts = history.columns.shape[1]
    size = min(number, capacity)
    order = np.arange(number - size, number) % capacity
    place = np.full(capacity + 1, NO_ROW, np.int32)  # the last entry is nobody's
    place[order] = np.arange(size)
    ids, weights = history.ids[order], np.zeros((size, layers, active), np.uint8)
    for layer in range(layers):
        for k in range(active):
            there = np.flatnonzero(ids[:, layer, k] < experts)
            weights[there, layer, k] = history.columns[layer, ids[there, layer, k], order[there]]
    return HistoryRows(ids, weights, history.tokens[order], place[history.before[order]])


def history_of(rows: HistoryRows, experts: int, capacity: int, number: int) -> History:
    """A trail of the newest `capacity` rows, the last of which is the iteration `number - 1` that was taken in."""
    left_out = max(0, len(rows.tokens) - capacity)
    ids, weights, tokens, before = (array[left_out:] for array in rows)
    (size, layers, active), place = ids.shape, np.where(before >= left_out, before - left_out, NO_ROW)
    history = make_history(layers, experts, active, capacity)
    at = np.arange(number - size, number) % capacity
    history.ids[at], history.tokens[at] = ids, tokens
    follows = np.flatnonzero(place != NO_ROW)
    history.before[at[follows]] = at[place[follows]]
    history.after[at[place[follows]]] = at[follows]
    for layer in range(layers):
        for k in range(active):
            there = np.flatnonzero(ids[:, layer, k] < experts)
            history.columns[layer, ids[there, layer, k], at[there]] = weights[there, layer, k]
    return history


@kernel
def append(history: History, number: int, tokens: npt.NDArray[np.int32], ids: Ids, weights: Ids, previous: int) -> None:
    """Takes in `n` successive iterations of a request; the oldest rows make room.

    A row whose neighbour was overwritten has none any more.

    Args:
        trail: is changed.
        number: how many iterations were ever taken in: iteration i lies in row `i % S`.
        tokens: `[n]`.
        ids: `[n, L, K]`, as in `History`.
        weights: `[n, L, K]`, as in `History`.
        previous: the number of the iteration before them, or `NO_ROW`.
    """
    capacity, layers, active = history.ids.shape
    experts = history.columns.shape[1]
    for i in range(len(tokens)):
        row = (number + i) % capacity
        if history.before[row] != NO_ROW:
            history.after[history.before[row]] = NO_ROW
        if history.after[row] != NO_ROW:
            history.before[history.after[row]] = NO_ROW
        history.tokens[row] = tokens[i]
        history.after[row] = NO_ROW
        history.before[row] = NO_ROW
        if previous != NO_ROW and previous > number + i - capacity:
            history.before[row] = previous % capacity
            history.after[previous % capacity] = row
        previous = number + i
        for layer in range(layers):
            for k in range(active):
                old = history.ids[row, layer, k]
                if old < experts:
                    history.columns[layer, old, row] = 0
            for k in range(active):
                new = ids[i, layer, k]
                history.ids[row, layer, k] = new
                if new < experts:
                    history.columns[layer, new, row] = weights[i, layer, k]


@kernel
def encode_layer(gates: Floats, executed: Flags, ids: Ids, weights: Ids) -> None:
    """One layer of a row: the likeliest of the executed experts, as many as there is room for.

    Args:
        gates: `[E]`; if those executed have none, they count alike.
        executed: `[E]`.
        ids: `[K]`, filled in, as in `History`.
        weights: `[K]`, filled in, as in `History`.
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
def encode_layers(gates: Floats, executed: Flags, ids: Ids, weights: Ids) -> None:
    """`encode_layer` of `n` iterations: `[n, L, E]` to `[n, L, K]`."""
    for i in range(len(ids)):
        for layer in range(ids.shape[1]):
            encode_layer(gates[i, layer], executed[i, layer], ids[i, layer], weights[i, layer])
