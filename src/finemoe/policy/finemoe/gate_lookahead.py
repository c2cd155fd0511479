"""Predictions from the next layers' gates on the current hidden states, calibrated online. Kernels.

A gate d layers ahead selects K of E experts. It changes the probability p that was predicted without it to

    logit(p') = a_d * logit(p) + b_d * [selected] + c_d

with weights learned online by logistic regression, per distance d. As p is an input, what search and gate both know is
not counted twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finemoe.jit import kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.history import Flags, Floats
from finemoe.policy.top_k import top_k_union

_LEAST_PROBABILITY = 1e-4  # probabilities are clipped to this distance from 0 and 1
_LEARNING_RATE = 0.02


class GatePredictions(NamedTuple):
    """What gates predicted for the layers ahead of one request, by distance - 1 and layer; `n` distances."""

    selected: Flags  # [n, L, E]; all false where no gate was evaluated
    prior: Scores  # [n, L, E], the probabilities without the gate


def make_weights(distances: int) -> Scores:
    """`[n, 3]`: initial a, b and c, as for a gate recall of about 0.8. They adapt within a few iterations."""
    return np.tile(np.array([0.8, 2.5, -0.8]), (distances, 1))


def make_gate_predictions(distances: int, layers: int, experts: int) -> GatePredictions:
    """No predictions yet."""
    return GatePredictions(np.zeros((distances, layers, experts), np.bool_), np.zeros((distances, layers, experts)))


@kernel
def logit(probability: float) -> float:
    """`log(p / (1 - p))`, with p clipped away from 0 and 1."""
    p = min(max(probability, _LEAST_PROBABILITY), 1.0 - _LEAST_PROBABILITY)
    return float(np.log(p / (1.0 - p)))


@kernel
def calibrated(weights: Scores, selected: float, prior_logit: float) -> float:
    """`sigmoid(a * prior_logit + b * selected + c)`, with `selected` 1 or 0."""
    return float(1.0 / (1.0 + np.exp(-(weights[0] * prior_logit + weights[1] * selected + weights[2]))))


@kernel
def learn(weights: Scores, selected: Flags, prior: Scores, executed: Flags) -> None:
    """One step of logistic regression on one layer: updates `weights` `[3]`; the others are `[E]`."""
    gradient = np.zeros(3)
    for expert in range(len(prior)):
        prior_logit, chosen = logit(prior[expert]), 1.0 if selected[expert] else 0.0
        error = calibrated(weights, chosen, prior_logit) - executed[expert]
        gradient[0] += error * prior_logit
        gradient[1] += error * chosen
        gradient[2] += error
    weights -= _LEARNING_RATE * gradient


@kernel
def fuse(weights: Scores, selected: Flags, probabilities: Scores) -> None:
    """Updates `probabilities` `[E]` by the gate's selection; 0 stays 0."""
    for expert in range(len(probabilities)):
        if probabilities[expert] > 0.0:
            probabilities[expert] = calibrated(weights, 1.0 if selected[expert] else 0.0, logit(probabilities[expert]))


@kernel
def learn_from_layer(weights: Scores, predictions: GatePredictions, layer: int, executed: Flags) -> None:
    """A layer is routed: learns from the predictions made for it, and drops them.

    Args:
        weights: `[n, 3]`, updated.
        predictions: of the request.
        layer: that was routed.
        executed: `[E]`; all false if not known: then nothing is learned.
    """
    known = executed.any()
    for distance in range(len(weights)):
        selected = predictions.selected[distance, layer]
        if known and selected.any():
            learn(weights[distance], selected, predictions.prior[distance, layer], executed)
        selected[:] = False


@kernel
def apply_gates(
    weights: Scores, predictions: GatePredictions, layer: int, ahead: Floats, active: int, probabilities: Scores
) -> None:
    """Updates the probabilities of the next layers by what their gates select.

    Args:
        weights: `[n, 3]`.
        predictions: of the request; filled in for `learn_from_layer`.
        layer: that was routed.
        ahead: `[m, E]`, outputs of the next m layers' gates on its hidden states; 0 where a gate was not evaluated.
        active: K.
        probabilities: `[L, E]`, updated for the layers ahead.
    """
    for distance in range(min(len(weights), len(ahead))):
        target = layer + 1 + distance
        if target >= len(probabilities) or not ahead[distance].any():
            continue
        selected = predictions.selected[distance, target]
        selected[:] = top_k_union(ahead[distance : distance + 1], active) > 0
        predictions.prior[distance, target] = probabilities[target]
        fuse(weights[distance], selected, probabilities[target])


@kernel
def look_ahead(
    weights: Scores,
    predictions: GatePredictions,
    layer: int,
    executed: Flags,
    ahead: Floats,
    active: int,
    probabilities: Scores,
) -> None:
    """A layer is routed and the next layers' gates are known: `learn_from_layer`, then `apply_gates`."""
    learn_from_layer(weights, predictions, layer, executed)
    apply_gates(weights, predictions, layer, ahead, active, probabilities)
