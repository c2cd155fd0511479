"""Which finished iterations the one under way resembles, and what these say of it and of those to come. Kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.policy.book import Scores
from finemoe.policy.kernel import compiled_as, kernel
from finemoe.policy.trail import LEVELS, NOBODY, Floats, Ids, Ints, Trail, imprint

_BLOCK = 64  # rows that are passed over together if none of them is near


class Constants(NamedTuple):
    """What the formulas leave open: the same for every budget, link and model."""

    neighbours: int = 32  # rows that count
    context: float = 0.2  # what a row inherits of the likeness of the one before it
    same_token: float = 2.0  # what the same input token is worth, in layers of full overlap
    sharpness: float = 0.5  # temperature of the neighbours' weights, for the iteration under way
    later: float = 1.0  # and for the iterations after it
    horizon: int = 5  # how many of those are told one by one; after them, by frequency
    fade: float = 0.95  # what an iteration counts for a request's frequencies one iteration later
    discount: float = 0.4  # what a use is worth one iteration later


class Search(NamedTuple):
    """A running request's place among the rows."""

    scores: Floats  # [S], how much each row resembles the iteration under way
    rows: Ints  # [neighbours], the nearest, best first
    top: Floats  # [neighbours], their scores


@kernel
def carry(trail: Trail, size: int, token: int, constants: Constants, previous: Floats, scores: Floats) -> None:
    """An iteration begins: `scores` `[S]` without any layer, out of the `previous` `[S]` of the request.

    `H_t(s) = context * S_{t-1}(before(s)) + same_token * [the same input token]`.
    """
    context, same = np.float32(constants.context), np.float32(constants.same_token)
    for row in range(size):
        before = trail.before[row]
        score = context * previous[before] if before != NOBODY else np.float32(0.0)
        if trail.tokens[row] == token:
            score += same
        scores[row] = score


def _overlap_loop(trail: Trail, size: int, layer: int, ids: Ids, weights: Ids, scores: Floats) -> None:
    experts = trail.columns.shape[1]
    for k in range(len(ids)):
        if ids[k] >= experts:
            continue
        weight, column = np.float32(weights[k]) / np.float32(LEVELS * LEVELS), trail.columns[layer, ids[k]]
        for row in range(size):
            scores[row] += weight * np.float32(column[row])


@compiled_as(_overlap_loop)
def overlap(trail: Trail, size: int, layer: int, ids: Ids, weights: Ids, scores: Floats) -> None:
    """Adds to `scores` `[S]` what `layer` has in common with each row; a full overlap is 1.

    Args:
        ids: `[K]`, as in `Trail`.
        weights: `[K]`, as in `Trail`.
    """
    for expert, weight in zip(ids, weights, strict=True):
        if expert < trail.columns.shape[1]:
            scores[:size] += np.float32(weight) / np.float32(LEVELS * LEVELS) * trail.columns[layer, expert, :size]


def _nearest_loop(size: int, search: Search) -> int:
    scores, rows, top = search
    most, count = len(rows), 0
    for start in range(0, size, _BLOCK):
        end = min(size, start + _BLOCK)
        if count == most:
            near = 0
            for row in range(start, end):
                near += scores[row] > top[most - 1]
            if near == 0:
                continue
        for row in range(start, end):
            score = scores[row]
            if count < most:
                place = count
                count += 1
            elif score > top[most - 1]:
                place = most - 1
            else:
                continue
            while place > 0 and top[place - 1] < score:
                top[place], rows[place] = top[place - 1], rows[place - 1]
                place -= 1
            top[place], rows[place] = score, row
    return count


@compiled_as(_nearest_loop)
def nearest(size: int, search: Search) -> int:
    """Fills in the rows of the highest scores (ties: the lowest row). Returns how many there are."""
    order = np.argsort(-search.scores[:size], kind="stable")[: len(search.rows)]
    search.rows[: len(order)] = order
    search.top[: len(order)] = search.scores[order]
    return len(order)


@kernel
def expect(
    trail: Trail, constants: Constants, count: int, now: int, search: Search, frequency: Scores, chances: Scores
) -> None:
    """What `count` neighbours say of this iteration and the next ones, shrunk towards the request's own frequencies.

    With `u = softmax(score / temperature)` over the rows whose j-th successor is known, `m = 1 / sum(u^2)` of them
    in effect: `p_j = (m * sum(u_s * [e in (s + j)(l)]) + c * frequency) / (m + c)`, c = 1, from j = 2 on 2.

    Args:
        now: the last layer that is known, or -1.
        frequency: `[L, E]`.
        chances: `[horizon + 1, L, E]`, filled in; of this iteration, [0], only the layers after `now`.
    """
    horizon, layers, experts = chances.shape
    active = trail.ids.shape[2]
    at = search.rows[:count].copy()
    for j in range(horizon):
        first = now + 1 if j == 0 else 0
        temperature = constants.sharpness if j == 0 else constants.later
        prior = 1.0 if j <= 1 else 2.0
        told = chances[j]
        told[first:] = 0.0
        best, total, squares = 0.0, 0.0, 0.0
        for i in range(count):
            if j > 0 and at[i] != NOBODY:
                at[i] = trail.after[at[i]]
            row = at[i]
            if row == NOBODY:
                continue
            if total == 0.0:
                best = search.top[i]  # of those that know; far from it all would be 0
            u = np.exp((search.top[i] - best) / temperature)
            total += u
            squares += u * u
            for layer in range(first, layers):
                for k in range(active):
                    expert = trail.ids[row, layer, k]
                    if expert < experts:
                        told[layer, expert] += u
        effective = total * total / squares if total > 0.0 else 0.0
        share = effective / total if total > 0.0 else 0.0
        for layer in range(first, layers):
            for expert in range(experts):
                told[layer, expert] = (share * told[layer, expert] + prior * frequency[layer, expert]) / (
                    effective + prior
                )


@kernel
def begin_search(
    trail: Trail, size: int, token: int, constants: Constants, search: Search, frequency: Scores, chances: Scores
) -> None:
    """An iteration begins: `carry`, and what is expected of it."""
    previous = search.scores[:size].copy()
    carry(trail, size, token, constants, previous, search.scores)
    expect(trail, constants, nearest(size, search), -1, search, frequency, chances)


@kernel
def extend_search(
    trail: Trail, size: int, layer: int, gates: Floats, executed: npt.NDArray[np.bool_], constants: Constants,
    search: Search, frequency: Scores, chances: Scores,
) -> None:  # fmt: skip
    """One more layer is known, `gates` and `executed` `[E]`: `overlap`, and what is expected now."""
    active = trail.ids.shape[2]
    ids, weights = np.empty(active, trail.ids.dtype), np.empty(active, np.uint8)
    imprint(gates, executed, ids, weights)
    overlap(trail, size, layer, ids, weights, search.scores)
    expect(trail, constants, nearest(size, search), layer, search, frequency, chances)
