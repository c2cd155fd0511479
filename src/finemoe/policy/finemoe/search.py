"""Nearest-neighbour search over past iterations, and the expert probabilities that it predicts. Kernels.

For the current iteration t of a request, with layers 0 to n - 1 routed, the score of row s of the `History` is

    S_t(s) = H_t(s) + sum over l < n, e executed in both of w_t(l, e) * w_s(l, e)
    H_t(s) = context * S_{t-1}(prev(s)) + same_token * [s has the same input token]

with the weights w of `history.encode_layer`. The `neighbours` rows of highest score predict, for the layers to come of
this iteration (j = 0) and for the j-th iteration after it,

    u_s = exp(S_t(s) / temperature)                          over those neighbours whose j-th successor s + j is known
    m   = (sum u_s)^2 / sum u_s^2                            effective number of neighbours
    q_j(l, e) = sum(u_s * [e executed in layer l of s + j]) / sum(u_s)
    p_j = (m * q_j + c * frequency) / (m + c)                c = 1 for j = 0, 1 and 2 beyond

so that few or distant neighbours leave the prediction near the request's own frequencies. The idea of a search by token
and by layer trajectory is from the fMoE paper (arXiv 2502.05370); the formulas are our own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finemoe.jit import compiled_as, kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.history import LEVELS, NO_ROW, Flags, Floats, History, Ids, Ints, encode_layer

_BLOCK = 128  # rows that are skipped together if none of them can be a neighbour
_TILE = 4096  # rows whose scores stay in the L1 cache while a layer's columns are added


class Constants(NamedTuple):
    """Constants of the formulas, the same for every budget, link and model.

    Chosen on recorded routing of a model with 24 layers of 32 experts. The time per layer is flat around all of them:
    half or double the value costs 2% at most.
    """

    neighbours: int = 32
    context: float = 0.2  # share of the previous iteration's score that a row inherits
    same_token: float = 1.0  # bonus for the same input token, in layers of full overlap
    temperature: float = 0.5  # of the neighbours' weights, for the current iteration
    later_temperature: float = 1.0  # for the iterations after it
    horizon: int = 5  # how many iterations after it are predicted by neighbours; beyond that, by frequency
    decay: float = 0.95  # weight of a token in a request's frequencies, one token later
    discount: float = 0.4  # value of a use one iteration later (`decode_step.update_scores`)


CONSTANTS = Constants()


class SearchState(NamedTuple):
    """Search state of a running request."""

    scores: Floats  # [S], score of each row
    rows: Ints  # [neighbours], rows of highest score, best first
    top: Floats  # [neighbours], their scores
    frequency: Scores  # [L, E], that of `RequestFrequencies`
    probabilities: Scores  # [horizon + 1, L, E], of each expert in this iteration and in those after it


class Iteration(NamedTuple):
    """The current iteration of a request; layers not routed yet hold the previous iteration's values."""

    gates: Floats  # [L, E]
    executed: Flags  # [L, E]


@kernel
def start_scores(
    history: History, size: int, token: int, constants: Constants, previous: Floats, scores: Floats
) -> None:
    """Fills in `H_t` `[S]`, the scores before any layer is routed; `previous` `[S]`: those of the last iteration."""
    context, same = np.float32(constants.context), np.float32(constants.same_token)
    for row in range(size):
        prev = history.prev[row]
        score = context * previous[prev] if prev != NO_ROW else np.float32(0.0)
        if history.tokens[row] == token:
            score += same
        scores[row] = score


def _add_overlap_loop(history: History, size: int, layer: int, ids: Ids, weights: Ids, scores: Floats) -> None:
    experts = history.columns.shape[1]
    for start in range(0, size, _TILE):
        tile = scores[start : min(size, start + _TILE)]
        for k in range(len(ids)):
            if ids[k] >= experts:
                continue
            weight = np.float32(weights[k]) / np.float32(LEVELS * LEVELS)
            column = history.columns[layer, ids[k], start : start + len(tile)]
            for i in range(len(tile)):
                tile[i] += weight * np.float32(column[i])


@compiled_as(_add_overlap_loop)
def add_overlap(history: History, size: int, layer: int, ids: Ids, weights: Ids, scores: Floats) -> None:
    """Adds to `scores` `[S]` the overlap of one layer with each row, at most 1.

    Args:
        history: the rows.
        size: number of rows in use.
        layer: of the overlap.
        ids: `[K]`, executed experts, see `encode_layer`.
        weights: `[K]`, their weights.
        scores: is updated.
    """
    for expert, weight in zip(ids, weights, strict=True):
        if expert < history.columns.shape[1]:
            scores[:size] += np.float32(weight) / np.float32(LEVELS * LEVELS) * history.columns[layer, expert, :size]


def _nearest_loop(size: int, search: SearchState) -> int:
    scores, rows, top, _, _ = search
    most, count, floor = len(rows), 0, np.float32(-np.inf)
    for start in range(0, size, _BLOCK):
        block = scores[start : min(size, start + _BLOCK)]
        near = np.int32(0)
        for i in range(len(block)):  # without a branch, so that it is vectorised
            near += np.int32(block[i] > floor)
        if near == 0:
            continue
        for i in range(len(block)):
            score = block[i]
            if not score > floor:
                continue
            if count < most:
                place = count
                count += 1
            else:
                place = most - 1
            while place > 0 and top[place - 1] < score:
                top[place], rows[place] = top[place - 1], rows[place - 1]
                place -= 1
            top[place], rows[place] = score, start + i
            if count == most:
                floor = top[most - 1]
    return count


@compiled_as(_nearest_loop)
def nearest(size: int, search: SearchState) -> int:
    """Fills in `rows` and `top`: the rows of highest score (ties: the lowest row). Returns how many there are."""
    order = np.argsort(-search.scores[:size], kind="stable")[: len(search.rows)]
    search.rows[: len(order)] = order
    search.top[: len(order)] = search.scores[order]
    return len(order)


@kernel
def add_row(history: History, row: int, weight: float, first: int, total: Scores) -> None:
    """Adds `weight` to `total` `[L, E]` for every expert that the row executed in layers `first` and up."""
    layers, experts = total.shape
    for layer in range(first, layers):
        for k in range(history.ids.shape[2]):
            expert = history.ids[row, layer, k]
            if expert < experts:
                total[layer, expert] += weight


@kernel
def predict_probabilities(history: History, constants: Constants, count: int, now: int, search: SearchState) -> None:
    """Fills in `p_j` of the module's docstring, from the `count` nearest rows.

    Args:
        history: the rows.
        constants: of the formulas.
        count: number of neighbours.
        now: the last routed layer, or -1; of this iteration, only the layers after it are predicted.
        search: `probabilities` is updated.
    """
    frequency, probabilities = search.frequency, search.probabilities
    successors = search.rows[:count].copy()
    for j in range(len(probabilities)):
        first = now + 1 if j == 0 else 0
        temperature = constants.temperature if j == 0 else constants.later_temperature
        prior_weight = 1.0 if j <= 1 else 2.0
        p = probabilities[j]
        p[first:] = 0.0
        best, total, squares = 0.0, 0.0, 0.0
        for i in range(count):
            if j > 0 and successors[i] != NO_ROW:
                successors[i] = history.next[successors[i]]
            if successors[i] == NO_ROW:
                continue
            if total == 0.0:
                best = search.top[
                    i
                ]  # relative to the best neighbour that has a successor, so that u does not underflow
            u = np.exp((search.top[i] - best) / temperature)
            total += u
            squares += u * u
            add_row(history, successors[i], u, first, p)
        effective = total * total / squares if total > 0.0 else 0.0
        scale = effective / total if total > 0.0 else 0.0
        p[first:] = (scale * p[first:] + prior_weight * frequency[first:]) / (effective + prior_weight)


@kernel
def update_probabilities(history: History, size: int, layer: int, constants: Constants, search: SearchState) -> None:
    """Finds the nearest rows and predicts from them, once `layer` is routed (-1: none yet)."""
    predict_probabilities(history, constants, nearest(size, search), layer, search)


@kernel
def begin_search(
    history: History, size: int, token: int, constants: Constants, search: SearchState, lagging: int
) -> None:
    """An iteration begins.

    Args:
        history: the rows.
        size: number of rows in use.
        token: input token id.
        constants: of the formulas.
        search: is updated.
        lagging: 1 to update the scores only, because newer events are queued and nobody would read the predictions.
    """
    previous = search.scores[:size].copy()
    start_scores(history, size, token, constants, previous, search.scores)
    if not lagging:
        update_probabilities(history, size, -1, constants, search)


@kernel
def extend_search(
    history: History,
    size: int,
    layer: int,
    iteration: Iteration,
    constants: Constants,
    search: SearchState,
    lagging: int,
) -> None:
    """One more layer of the iteration is routed: adds its overlap to the scores.

    Args:
        history: the rows.
        size: number of rows in use.
        layer: that was routed.
        iteration: with that layer filled in.
        constants: of the formulas.
        search: is updated.
        lagging: as in `begin_search`.
    """
    active = history.ids.shape[2]
    ids, weights = np.empty(active, history.ids.dtype), np.empty(active, np.uint8)
    encode_layer(iteration.gates[layer], iteration.executed[layer], ids, weights)
    add_overlap(history, size, layer, ids, weights, search.scores)
    if not lagging:
        update_probabilities(history, size, layer, constants, search)
