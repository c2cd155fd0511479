"""Fused kernel for single-request decoding, and the scoring of experts.

One request that decodes is the common case, and with a small model the overhead of several calls per layer would be
noticeable. `FinemoePolicy.routed` is the reference: it does the same step by step for any number of requests.
"""

from __future__ import annotations

import numpy as np

from finemoe.jit import kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.gate_lookahead import look_ahead
from finemoe.policy.finemoe.history import Floats, History, Ints
from finemoe.policy.finemoe.request_state import GlobalFrequencies, RequestArrays, update_frequencies
from finemoe.policy.finemoe.search import Constants, extend_search


@kernel
def update_scores(now: int, discount: float, probabilities: Scores, frequency: Scores, scores: Scores) -> None:
    """The discounted probability of each expert's next use, once layer `now` is routed (-1: none yet).

    With g the discount per iteration, f the frequency and `p_j` the probability of a use j iterations from now, the
    score of an expert whose layer runs next d layers from now is

        V = g^(d / L) * h_i,   h_j = p_j + (1 - p_j) * g * h_{j+1},   h_{horizon+1} = f / (1 - g * (1 - f))

    with i = 0 if its layer is still to run in this iteration, otherwise 1. The last term is the value of uses at a
    constant rate f.

    Args:
        now: the last routed layer.
        discount: g.
        probabilities: `[horizon + 1, L, E]`, `p_j`.
        frequency: `[L, E]`.
        scores: `[L, E]`, filled in.
    """
    iterations, layers, experts = probabilities.shape
    for layer in range(layers):
        passed = layer <= now
        distance = layer - now + (layers if passed else 0)
        nearness = discount ** (distance / layers)
        for expert in range(experts):
            f = frequency[layer, expert]
            h = f / (1.0 - discount * (1.0 - f))
            for j in range(iterations - 1, 0 if passed else -1, -1):
                p = probabilities[j, layer, expert]
                h = p + (1.0 - p) * discount * h
            scores[layer, expert] = nearness * h


@kernel
def decode_step_kernel(  # noqa: PLR0917 - called in one place
    global_frequencies: GlobalFrequencies, history: History, size: int, request: RequestArrays, weights: Scores,
    layer: int, experts: Ints, gates: Floats, ahead: Floats, active: int, constants: Constants,
    retention_priority: Scores, lagging: int,
) -> None:  # fmt: skip
    """All updates after one layer of the only running request, which decodes; all layers before it are known.

    Args:
        global_frequencies: updated.
        history: with at least one row.
        size: number of rows in use.
        request: its state, updated.
        weights: `[n, 3]`, of gate lookahead, updated.
        layer: that was routed.
        experts: that it executes.
        gates: `[E]`; 0 if not known.
        ahead: `[m, E]`, outputs of the next layers' gates; may be empty.
        active: K.
        constants: of the formulas.
        retention_priority: `[L, E]`, filled in.
        lagging: 1 to skip all predictions, because newer events are queued; otherwise 0.
    """
    executed = request.iteration.executed[layer]
    executed[:] = False
    for expert in experts:
        executed[expert] = True
    request.iteration.gates[layer] = gates
    update_frequencies(
        request.frequencies, global_frequencies, layer, executed.astype(np.float64), 1, constants.decay, 1
    )
    extend_search(history, size, layer, request.iteration, constants, request.search, lagging)
    probabilities = request.search.probabilities
    look_ahead(weights, request.gate_predictions, layer, executed, ahead, active, probabilities[0])
    if not lagging:
        update_scores(layer, constants.discount, probabilities, request.search.frequency, retention_priority)
