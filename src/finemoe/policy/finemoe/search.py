"""Which finished iterations the one under way resembles, and what these say of it and of those to come. Kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finemoe.jit import compiled_as, kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.history import LEVELS, NO_ROW, Flags, Floats, History, Ids, Ints, encode_layer

_BLOCK = 128  # rows that are passed over together if none of them is near
_TILE = 4096  # rows whose scores stay in the first-level cache while a layer's columns are added


class Constants(NamedTuple):
    """What the formulas leave open: the same for every budget, link and model.

    Chosen on recorded routing of a model of 24 layers of 32 experts. The time per layer is flat around all of them:
    half or double costs 2% at most.
    """

    neighbours: int = 32  # rows that count
    context: float = 0.2  # what a row inherits of the likeness of the one before it
    same_token: float = 1.0  # what the same input token is worth, in layers of full overlap
    sharpness: float = 0.5  # temperature of the neighbours' weights, for the iteration under way
    later: float = 1.0  # and for the iterations after it
    horizon: int = 5  # how many of those are told one by one; after them, by frequency
    fade: float = 0.95  # what an iteration counts for a request's frequencies one iteration later
    discount: float = 0.4  # what a use is worth one iteration later


CONSTANTS = Constants()


class SearchState(NamedTuple):
    """A running request among the rows, and what follows for it."""

    scores: Floats  # [S], how much each row resembles the iteration under way
    rows: Ints  # [neighbours], the nearest, best first
    top: Floats  # [neighbours], their scores
    frequency: Scores  # [L, E], how often the request used each expert lately
    chances: Scores  # [horizon + 1, L, E], of each expert in this iteration and those after it


class Iteration(NamedTuple):
    """The one under way of a request, as far as it is known."""

    gates: Floats  # [L, E]
    executed: Flags  # [L, E]


@kernel
def carry(history: History, size: int, token: int, constants: Constants, previous: Floats, scores: Floats) -> None:
    """An iteration begins: `scores` `[S]` without any layer, out of the `previous` `[S]` of the request.

    `H_t(s) = context * S_{t-1}(before(s)) + same_token * [the same input token]`.
    """
    context, same = np.float32(constants.context), np.float32(constants.same_token)
    for row in range(size):
        before = history.before[row]
        score = context * previous[before] if before != NO_ROW else np.float32(0.0)
        if history.tokens[row] == token:
            score += same
        scores[row] = score


def _overlap_loop(history: History, size: int, layer: int, ids: Ids, weights: Ids, scores: Floats) -> None:
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


@compiled_as(_overlap_loop)
def overlap(history: History, size: int, layer: int, ids: Ids, weights: Ids, scores: Floats) -> None:
    """Adds to `scores` `[S]` what `layer` has in common with each row; a full overlap is 1.

    Args:
        ids: `[K]`, as in `History`.
        weights: `[K]`, as in `History`.
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
        for i in range(len(block)):  # without a branch, so that it becomes a few wide instructions
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
    """Fills in the rows of the highest scores (ties: the lowest row). Returns how many there are."""
    order = np.argsort(-search.scores[:size], kind="stable")[: len(search.rows)]
    search.rows[: len(order)] = order
    search.top[: len(order)] = search.scores[order]
    return len(order)


@kernel
def add_row(history: History, row: int, weight: float, first: int, told: Scores) -> None:
    """Adds `weight` to what the row used, in `told` `[L, E]`, from layer `first` on."""
    layers, experts = told.shape
    for layer in range(first, layers):
        for k in range(history.ids.shape[2]):
            expert = history.ids[row, layer, k]
            if expert < experts:
                told[layer, expert] += weight


@kernel
def expect(history: History, constants: Constants, count: int, now: int, search: SearchState) -> None:
    """What `count` neighbours say of this iteration and the next ones, shrunk towards the request's own frequencies.

    With `u_s = exp(S(s) / temperature)` over the rows s whose j-th successor is known, scaled to a sum of 1, and
    `m = 1 / sum(u^2)` of them in effect:
    `p_j = (m * sum(u_s * [e in the successor]) + c * frequency) / (m + c)`, c = 1, and 2 from j = 2 on.

    Args:
        now: the last layer that is known, or -1. Of this iteration only the chances of the layers after it are told.
    """
    frequency, chances = search.frequency, search.chances
    at = search.rows[:count].copy()
    for j in range(len(chances)):
        first = now + 1 if j == 0 else 0
        temperature = constants.sharpness if j == 0 else constants.later
        prior = 1.0 if j <= 1 else 2.0
        told = chances[j]
        told[first:] = 0.0
        best, total, squares = 0.0, 0.0, 0.0
        for i in range(count):
            if j > 0 and at[i] != NO_ROW:
                at[i] = history.after[at[i]]
            if at[i] == NO_ROW:
                continue
            if total == 0.0:
                best = search.top[i]  # so that the best of those that know weighs 1, and not next to nothing
            u = np.exp((search.top[i] - best) / temperature)
            total += u
            squares += u * u
            add_row(history, at[i], u, first, told)
        effective = total * total / squares if total > 0.0 else 0.0
        share = effective / total if total > 0.0 else 0.0
        told[first:] = (share * told[first:] + prior * frequency[first:]) / (effective + prior)


@kernel
def conclude(history: History, size: int, layer: int, constants: Constants, search: SearchState) -> None:
    """What the nearest rows say, once `layer` is known (-1: none yet)."""
    expect(history, constants, nearest(size, search), layer, search)


@kernel
def begin_search(history: History, size: int, token: int, constants: Constants, search: SearchState, late: int) -> None:
    """An iteration begins with this input token: what each row's score starts from. `late`: as in `extend_search`."""
    previous = search.scores[:size].copy()
    carry(history, size, token, constants, previous, search.scores)
    if not late:
        conclude(history, size, -1, constants, search)


@kernel
def extend_search(
    history: History, size: int, layer: int, iteration: Iteration, constants: Constants, search: SearchState, late: int
) -> None:
    """One more layer is known: adds what each row has in common with it.

    Args:
        late: 1 if nobody will look at what follows, which then is left out; otherwise 0.
    """
    active = history.ids.shape[2]
    ids, weights = np.empty(active, history.ids.dtype), np.empty(active, np.uint8)
    encode_layer(iteration.gates[layer], iteration.executed[layer], ids, weights)
    overlap(history, size, layer, ids, weights, search.scores)
    if not late:
        conclude(history, size, layer, constants, search)
