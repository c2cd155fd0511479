"""Store of finished iterations: a ring buffer whose rows are linked to the previous and next row of their request.

A row holds, for every layer, which experts one iteration executed and with what weight. Links make what followed an
iteration a lookup, and let the iterations of several requests be interleaved in one ring.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import kernel

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.unsignedinteger]
Ints = npt.NDArray[np.int64]

NO_ROW = -1  # in place of a row
LEVELS = 255  # weights are stored in 255ths


class History(NamedTuple):
    """The ring of `S` rows. Iteration i, counting all that were ever added, is in row `i % S`."""

    ids: Ids  # [S, L, K], executed experts; padded with `E`
    columns: npt.NDArray[np.uint8]  # [L, E, S], weight of each expert in every row, see `encode_layer`
    tokens: npt.NDArray[np.int32]  # [S], input token id
    prev: npt.NDArray[np.int32]  # [S], row of the same request's previous iteration, or `NO_ROW`
    next: npt.NDArray[np.int32]  # [S], row of its next iteration, or `NO_ROW`


def make_history(layers: int, experts: int, active: int, capacity: int) -> History:
    """An empty history of `S = capacity` rows, for up to `K = active` experts per layer."""
    dtype = np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16
    return History(
        np.full((capacity, layers, active), experts, dtype),
        np.zeros((layers, experts, capacity), np.uint8),
        np.full(capacity, -1, np.int32),
        np.full(capacity, NO_ROW, np.int32),
        np.full(capacity, NO_ROW, np.int32),
    )


class HistoryRows(NamedTuple):
    """The `n` rows of a history, oldest first, in the form that is saved to disk."""

    ids: Ids  # [n, L, K], as in `History`
    weights: npt.NDArray[np.uint8]  # [n, L, K], weight of each of `ids`
    tokens: npt.NDArray[np.int32]  # [n]
    prev: npt.NDArray[np.int32]  # [n], index of the previous iteration among these rows, always lower, or `NO_ROW`


def rows_from_history(history: History, num_added: int) -> HistoryRows:
    """The rows of a history to which `num_added` iterations were ever added."""
    capacity, layers, active = history.ids.shape
    experts = history.columns.shape[1]
    size = min(num_added, capacity)
    order = np.arange(num_added - size, num_added) % capacity
    index = np.full(capacity + 1, NO_ROW, np.int32)  # by row; the last entry is for `NO_ROW`
    index[order] = np.arange(size)
    ids, weights = history.ids[order], np.zeros((size, layers, active), np.uint8)
    for layer in range(layers):
        for k in range(active):
            used = np.flatnonzero(ids[:, layer, k] < experts)
            weights[used, layer, k] = history.columns[layer, ids[used, layer, k], order[used]]
    return HistoryRows(ids, weights, history.tokens[order], index[history.prev[order]])


def history_from_rows(rows: HistoryRows, experts: int, capacity: int, num_added: int) -> History:
    """A history of the newest `capacity` rows, the last of which becomes iteration `num_added - 1`."""
    dropped = max(0, len(rows.tokens) - capacity)
    ids, weights, tokens, prev = (array[dropped:] for array in rows)
    (size, layers, active), prev_index = ids.shape, np.where(prev >= dropped, prev - dropped, NO_ROW)
    history = make_history(layers, experts, active, capacity)
    row = np.arange(num_added - size, num_added) % capacity
    history.ids[row], history.tokens[row] = ids, tokens
    linked = np.flatnonzero(prev_index != NO_ROW)
    history.prev[row[linked]] = row[prev_index[linked]]
    history.next[row[prev_index[linked]]] = row[linked]
    for layer in range(layers):
        for k in range(active):
            used = np.flatnonzero(ids[:, layer, k] < experts)
            history.columns[layer, ids[used, layer, k], row[used]] = weights[used, layer, k]
    return history


@kernel
def append(
    history: History, num_added: int, tokens: npt.NDArray[np.int32], ids: Ids, weights: Ids, previous: int
) -> None:
    """Adds `n` successive iterations of one request, overwriting the oldest rows.

    Links to an overwritten row are cut.

    Args:
        history: is updated.
        num_added: how many iterations were ever added before.
        tokens: `[n]`.
        ids: `[n, L, K]`, as in `History`.
        weights: `[n, L, K]`, weight of each of `ids`.
        previous: number of the request's iteration before these, or `NO_ROW`.
    """
    capacity, layers, active = history.ids.shape
    experts = history.columns.shape[1]
    for i in range(len(tokens)):
        row = (num_added + i) % capacity
        if history.prev[row] != NO_ROW:
            history.next[history.prev[row]] = NO_ROW
        if history.next[row] != NO_ROW:
            history.prev[history.next[row]] = NO_ROW
        history.tokens[row] = tokens[i]
        history.next[row] = NO_ROW
        history.prev[row] = NO_ROW
        if previous != NO_ROW and previous > num_added + i - capacity:
            history.prev[row] = previous % capacity
            history.next[previous % capacity] = row
        previous = num_added + i
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
    """Encodes one layer of an iteration as the up to K executed experts of highest gate.

    `w_e = sqrt(gate_e / sum of the K gates)`, in `LEVELS`. So `sum(w_e^2) = 1`, and the overlap of two rows in a layer,
    `sum(w_e * w'_e)`, is at most 1.

    Args:
        gates: `[E]`; if they are 0 for all executed experts, these get equal weights.
        executed: `[E]`.
        ids: `[K]`, filled in, highest gate first; padded with `E`.
        weights: `[K]`, filled in.
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
    """`encode_layer` for `n` iterations: `[n, L, E]` to `[n, L, K]`."""
    for i in range(len(ids)):
        for layer in range(ids.shape[1]):
            encode_layer(gates[i, layer], executed[i, layer], ids[i, layer], weights[i, layer])
