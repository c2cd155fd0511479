"""What the next layers' gates make of this layer's hidden states, and how far that can be trusted. Kernels.

A gate names K of E experts. Of a chance p that was there without it, it makes `logit p' = a * logit p + b * [named] +
c`, learned as it goes by logistic regression, for each number of layers ahead: what both the store and the gate know
counts once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finemoe.jit import kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.history import Flags, Floats
from finemoe.policy.top_k import likeliest

_CERTAIN = 1e-4  # chances closer to 0 or 1 are taken for this close
_STEP = 0.02  # of the learning


class GatePredictions(NamedTuple):
    """What gates named for layers ahead of a request: by how many layers ahead, less one, and by layer."""

    experts: Flags  # [n, L, E]; none where no gate was asked
    before: Scores  # [n, L, E], the chances without it


def make_weights(distances: int) -> Scores:
    """`[n, 3]`, a, b and c, before anything was learned: as for a recall of about 0.8. Soon outweighed."""
    return np.tile(np.array([0.8, 2.5, -0.8]), (distances, 1))


def make_named(distances: int, layers: int, experts: int) -> GatePredictions:
    """Of a request of which nothing was asked yet."""
    return GatePredictions(np.zeros((distances, layers, experts), np.bool_), np.zeros((distances, layers, experts)))


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
def settle(weights: Scores, named: GatePredictions, layer: int, executed: Flags) -> None:
    """A layer is known: learns from what was named of it.

    Args:
        weights: `[n, 3]`.
        named: of the request; that of this layer is forgotten.
        layer: the one that is known.
        executed: `[E]`; of none, nothing is learned.
    """
    known = executed.any()
    for distance in range(len(weights)):
        experts = named.experts[distance, layer]
        if known and experts.any():
            learn(weights[distance], experts, named.before[distance, layer], executed)
        experts[:] = False


@kernel
def anticipate(
    weights: Scores, named: GatePredictions, layer: int, ahead: Floats, active: int, chances: Scores
) -> None:
    """Revises the chances of the next layers by what their gates say of this layer's hidden states.

    Args:
        weights: `[n, 3]`.
        named: of the request; becomes what these gates name.
        layer: the one that is known.
        ahead: `[m, E]`, of the layers after it; 0 where a gate was not asked.
        active: K.
        chances: `[L, E]`; those of the layers ahead are revised.
    """
    for distance in range(min(len(weights), len(ahead))):
        target = layer + 1 + distance
        if target >= len(chances) or not ahead[distance].any():
            continue
        experts = named.experts[distance, target]
        experts[:] = likeliest(ahead[distance : distance + 1], active) > 0
        named.before[distance, target] = chances[target]
        fuse(weights[distance], experts, chances[target])


@kernel
def look_ahead(
    weights: Scores, named: GatePredictions, layer: int, executed: Flags, ahead: Floats, active: int, chances: Scores
) -> None:
    """A layer is known, and what the gates of the next ones say of its hidden states: `settle`, then `anticipate`."""
    settle(weights, named, layer, executed)
    anticipate(weights, named, layer, ahead, active, chances)
