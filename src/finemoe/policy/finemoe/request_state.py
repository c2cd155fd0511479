"""A running request, as our own policy sees it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finemoe.jit import kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.gate_lookahead import GatePredictions, make_named
from finemoe.policy.finemoe.history import NO_ROW, Flags, Floats
from finemoe.policy.finemoe.prompt_prior import PromptPrior
from finemoe.policy.finemoe.search import Constants, Iteration, SearchState


class RequestFrequencies(NamedTuple):
    """How often a request uses each expert."""

    used: Scores  # [L, E], tokens that each expert got
    faded: Scores  # [L, E], the same, the older the less
    seen: Scores  # [L], tokens, the older the less
    told: Scores  # [L, E], how often requests like it used each expert
    trust: float  # what that is worth, beside the usual
    frequency: Scores  # [L, E], what follows from all that


class GlobalFrequencies(NamedTuple):
    """How often any iteration uses each expert."""

    share: Scores  # [L, E], of the iterations
    iterations: Scores  # [L], of which that is the mean; of none, a guess


class RequestArrays(NamedTuple):
    """What changes with every layer of a running request; see `RequestState`."""

    frequencies: RequestFrequencies
    search: SearchState
    iteration: Iteration
    named: GatePredictions


@kernel
def use(
    frequencies: RequestFrequencies,
    global_frequencies: GlobalFrequencies,
    layer: int,
    share: Scores,
    tokens: int,
    fade: float,
    alone: int,
) -> None:
    """Tokens of a request ran in a layer. What was expected of it when it began counts for one token more.

    Args:
        share: `[E]`, of the tokens that went to each expert.
        fade: what a token counts one token later.
        alone: 1 if this is an iteration of one token, known for certain, which enters the usual; otherwise 0.
    """
    kept = fade**tokens
    weight = (1.0 - kept) / (1.0 - fade)
    global_frequencies.iterations[layer] += alone
    frequencies.seen[layer] = kept * frequencies.seen[layer] + weight
    for expert in range(len(share)):
        if alone:
            global_frequencies.share[layer, expert] += (
                share[expert] - global_frequencies.share[layer, expert]
            ) / global_frequencies.iterations[layer]
        frequencies.used[layer, expert] += tokens * share[expert]
        frequencies.faded[layer, expert] = kept * frequencies.faded[layer, expert] + weight * share[expert]
        expected = (
            frequencies.trust * frequencies.told[layer, expert]
            + (1.0 - frequencies.trust) * global_frequencies.share[layer, expert]
        )
        frequencies.frequency[layer, expert] = (frequencies.faded[layer, expert] + expected) / (
            frequencies.seen[layer] + 1.0
        )


class RequestState:
    """A running request.

    Args:
        capacity: rows of the store.
        constants: what the formulas leave open.
        usual: what is known of iterations.
        opening: `[D]`, the embedding of its prompt, where known.
        openings: of requests that ended.
        ahead: n, for how many layers ahead gates are asked.

    Attributes:
        habits: how often it uses each expert.
        search: its place among the rows of the store, and the chances of each expert.
        iteration: the one under way.
        known: layers of it of which we know what the request used, none left out.
        last: the number of its last iteration in the store.
        kept_back: iterations that enter the store when it ends: token, gates, executed.
        named: what gates said of the layers ahead.
        state: habits, search, iteration and named.
        tokens: that ran.
    """

    def __init__(
        self,
        capacity: int,
        constants: Constants,
        global_frequencies: GlobalFrequencies,
        opening: Floats | None,
        prompt_prior: PromptPrior,
        ahead: int,
    ) -> None:
        count, (layers, experts) = constants.neighbours, global_frequencies.share.shape
        self.opening = opening
        told, trust = prompt_prior.expect(opening) or (np.zeros((layers, experts)), 0.0)
        self.frequencies = RequestFrequencies(
            np.zeros((layers, experts)), np.zeros((layers, experts)), np.zeros(layers), told, trust,
            trust * told + (1.0 - trust) * global_frequencies.share,
        )  # fmt: skip
        self.search = SearchState(
            np.zeros(capacity, np.float32), np.zeros(count, np.int64), np.zeros(count, np.float32),
            self.frequencies.frequency, np.zeros((constants.horizon + 1, layers, experts)),
        )  # fmt: skip
        self.iteration = Iteration(np.zeros((layers, experts), np.float32), np.zeros((layers, experts), np.bool_))
        self.known = 0
        self.last = NO_ROW
        self.kept_back: list[tuple[int, Floats, Flags]] = []
        self.named = make_named(ahead, layers, experts)
        self.state = RequestArrays(self.frequencies, self.search, self.iteration, self.named)
        self.tokens = 0

    def expect_by_frequency(self, now: int, tokens: int) -> None:
        """Nothing else is known: this iteration's layers after `now` run `tokens` tokens, later iterations one."""
        chances, frequency = self.search.chances, self.search.frequency
        chances[0, now + 1 :] = 1.0 - (1.0 - frequency[now + 1 :]) ** tokens
        chances[1:] = frequency
