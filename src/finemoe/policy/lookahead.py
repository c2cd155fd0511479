"""What the next layer's gate makes of this layer's hidden states, and how far that can be trusted. Kernels.

The gate names K of E experts. Of a chance p that was there without it, it makes `logit p' = a * logit p + b * [named] +
c`, learned as it goes by logistic regression: what both the store and the gate know counts once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finemoe.policy.active import likeliest
from finemoe.policy.book import Scores
from finemoe.policy.kernel import kernel
from finemoe.policy.trail import Flags, Floats

_CERTAIN = 1e-4  # chances closer to 0 or 1 are taken for this close
_STEP = 0.02  # of the learning


class Named(NamedTuple):
    """What was named for the next layer of a request."""

    experts: Flags  # [E]; none where no gate was asked
    before: Scores  # [E], the chances without it


def make_weights() -> Scores:
    """`[3]`, a, b and c, before anything was learned: as for a recall of about 0.8. Soon outweighed."""
    return np.array([0.8, 2.5, -0.8])


def make_named(experts: int) -> Named:
    """Of a request of which nothing was asked yet."""
    return Named(np.zeros(experts, np.bool_), np.zeros(experts))


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


@kernel
def look_ahead(weights: Scores, named: Named, executed: Flags, ahead: Floats, active: int, chances: Scores) -> None:
    """A layer is known, and what the gate of the next one says of its hidden states.

    Args:
        weights: `[3]`; learn from what was named of this layer.
        named: of this layer; becomes that of the next one.
        executed: `[E]`, of this layer.
        ahead: `[E]`, of the next one; nothing, or all 0, where its gate was not asked.
        active: K.
        chances: `[E]`, of the next one; are revised.
    """
    if named.experts.any():
        learn(weights, named.experts, named.before, executed)
    named.experts[:] = False
    if ahead.any():
        named.experts[:] = likeliest(ahead.reshape(1, len(ahead)), active) > 0
        named.before[:] = chances
        fuse(weights, named.experts, chances)
