"""Fused kernel for single-request decoding.

The common case, where call overhead beside a small model's layers counts. `FinemoePolicy.routed` is the reference: it
does the same step by step for any number of requests.
"""

from __future__ import annotations

import numpy as np

from finemoe.jit import kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.gate_lookahead import look_ahead
from finemoe.policy.finemoe.history import Floats, History, Ints
from finemoe.policy.finemoe.request_state import GlobalFrequencies, RequestArrays, use
from finemoe.policy.finemoe.search import Constants, extend_search


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


@kernel
def decode_step_kernel(  # noqa: PLR0917 - called in one place
    global_frequencies: GlobalFrequencies, history: History, size: int, state: RequestArrays, weights: Scores,
    layer: int, experts: Ints, gates: Floats, ahead: Floats, active: int, constants: Constants, retention_priority: Scores,
    late: int,
) -> None:  # fmt: skip
    """The layers before it are known, and now this one.

    Args:
        usual: of all iterations; takes in this layer.
        trail: the store, with at least one row taken in.
        size: of the store.
        state: of the request; takes in this layer.
        weights: `[n, 3]`, of lookahead.
        layer: that is known.
        experts: that it executes.
        gates: `[E]`; 0 where nothing is known.
        ahead: `[m, E]`, what the gates of the next layers say; may be empty.
        active: K.
        constants: what the formulas leave open.
        worth: `[L, E]`, filled in.
        late: 1 if nobody will look at what follows, which then is left out; otherwise 0.
    """
    executed = state.iteration.executed[layer]
    executed[:] = False
    for expert in experts:
        executed[expert] = True
    state.iteration.gates[layer] = gates
    use(state.frequencies, global_frequencies, layer, executed.astype(np.float64), 1, constants.fade, 1)
    extend_search(history, size, layer, state.iteration, constants, state.search, late)
    look_ahead(weights, state.named, layer, executed, ahead, active, state.search.chances[0])
    if not late:
        appraise(layer, constants.discount, state.search.chances, state.search.frequency, retention_priority)
