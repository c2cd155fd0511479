"""What an expert is worth: its chances to be needed, discounted by how long that takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.active import likeliest
from finemoe.policy.book import Scores
from finemoe.policy.kernel import Jit, interpreted, kernel
from finemoe.policy.trail import Floats

Flags = npt.NDArray[np.bool_]


@kernel
def appraise(now: int, discount: float, chances: Scores, frequency: Scores, value: Scores) -> None:
    """The discounted chance of each expert's next use, once layer `now` is known (-1: none yet).

    An expert of a layer d layers ahead, this iteration's or the next one's, is worth `g^(d / L) * h`, with
    `h = p_0 + (1 - p_0) * g * (p_1 + (1 - p_1) * g * ..)` over the iterations from that one on, g the discount. After
    the last one that is told, uses come at the request's frequency: `h = f / (1 - g * (1 - f))`.

    Args:
        chances: `[horizon + 1, L, E]`, of this iteration and those after it.
        frequency: `[L, E]`.
        value: `[L, E]`, filled in.
    """
    told, layers, experts = chances.shape
    for layer in range(layers):
        passed = layer <= now
        ahead = layer - now + (layers if passed else 0)
        nearness = discount ** (ahead / layers)
        for expert in range(experts):
            f = frequency[layer, expert]
            h = f / (1.0 - discount * (1.0 - f))
            for j in range(told - 1, 0 if passed else -1, -1):
                p = chances[j, layer, expert]
                h = p + (1.0 - p) * discount * h
            value[layer, expert] = nearness * h


_CERTAIN = 1e-4  # chances closer to 0 or 1 are taken for this close
_STEP = 0.02  # of the learning


@kernel
def logit(chance: float) -> float:
    """`log(p / (1 - p))`, of none that is certain."""
    p = min(max(chance, _CERTAIN), 1.0 - _CERTAIN)
    return float(np.log(p / (1.0 - p)))


@kernel
def revise(weights: Scores, named: float, before: float) -> float:
    """`sigmoid(a * before + b * named + c)`, of a logit `before`, and 1 for an expert that was named, otherwise 0."""
    return float(1.0 / (1.0 + np.exp(-(weights[0] * before + weights[1] * named + weights[2]))))


@kernel
def learn(weights: Scores, named: Flags, chances: Scores, executed: Flags) -> None:
    """One step of logistic regression; all `[E]`."""
    step = np.zeros(3)
    for expert in range(len(chances)):
        before, told = logit(chances[expert]), 1.0 if named[expert] else 0.0
        error = revise(weights, told, before) - executed[expert]
        step[0] += error * before
        step[1] += error * told
        step[2] += error
    weights -= _STEP * step


@kernel
def fuse(weights: Scores, named: Flags, chances: Scores) -> None:
    """Revises chances `[E]`. What is impossible stays so."""
    for expert in range(len(chances)):
        if chances[expert] > 0.0:
            chances[expert] = revise(weights, 1.0 if named[expert] else 0.0, logit(chances[expert]))


class Lookahead:
    """What the next layer's gate names, given this layer's hidden states, and how far that can be trusted.

    The gate names K of E experts. Of a chance p that was there without it, it makes
    `logit p' = a * logit p + b * [named] + c`, learned as it goes by logistic regression: what both the store and the
    gate know counts once.

    Args:
        jit: compiles its arithmetic.

    Attributes:
        weights: `[3]`, a, b and c.
    """

    def __init__(self, jit: Jit[Any] = interpreted) -> None:
        self.weights: Scores = np.array([0.8, 2.5, -0.8])  # as for a recall of about 0.8; soon outweighed
        self._likeliest, self._learn, self._fuse = jit(likeliest), jit(learn), jit(fuse)

    def name(self, ahead: Floats, active: int) -> Flags:
        """The `active` likeliest of `[E]`."""
        named: Flags = self._likeliest(ahead[None], active) > 0
        return named

    def judge(self, named: Flags, before: Scores, executed: Flags) -> None:
        """What was named, of the chances `before`, turned out like this; all `[E]`."""
        self._learn(self.weights, named, before, executed)

    def fuse(self, named: Flags, chances: Scores) -> None:
        """Changes chances `[E]` in the light of what was named."""
        self._fuse(self.weights, named, chances)
