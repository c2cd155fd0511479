"""One layer of a request that decodes while no other runs: all that our own policy makes of it, in one kernel.

The usual case, and beside a small model's layers what a call costs: `Finemoe.routed` does the same step by step for any
number of requests, and is the twin.
"""

from __future__ import annotations

import numpy as np

from finemoe.policy.book import Scores
from finemoe.policy.kernel import kernel
from finemoe.policy.lookahead import look_ahead
from finemoe.policy.neighbours import Constants, extend_search
from finemoe.policy.outlook import appraise
from finemoe.policy.running import State, Usual, use
from finemoe.policy.trail import Floats, Ints, Trail


@kernel
def hear_alone(  # noqa: PLR0917 - called in one place
    usual: Usual, trail: Trail, size: int, state: State, weights: Scores, layer: int, experts: Ints, gates: Floats,
    ahead: Floats, active: int, constants: Constants, worth: Scores, late: int,
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
    use(state.habits, usual, layer, executed.astype(np.float64), 1, constants.fade, 1)
    extend_search(trail, size, layer, state.iteration, constants, state.search, late)
    look_ahead(weights, state.named, layer, executed, ahead, active, state.search.chances[0])
    if not late:
        appraise(layer, constants.discount, state.search.chances, state.search.frequency, worth)
