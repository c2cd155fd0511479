"""State of a running request: expert frequencies, search state, gate predictions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finemoe.jit import kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.gate_lookahead import GatePredictions, make_gate_predictions
from finemoe.policy.finemoe.history import NO_ROW, Flags, Floats
from finemoe.policy.finemoe.prompt_prior import PromptPrior
from finemoe.policy.finemoe.search import Constants, Iteration, SearchState


class RequestFrequencies(NamedTuple):
    """How often a request uses each expert; see `update_frequencies`."""

    uses: Scores  # [L, E], tokens sent to each expert
    decayed_uses: Scores  # [L, E], the same, decayed per token
    decayed_tokens: Scores  # [L], tokens, decayed per token
    prompt_share: Scores  # [L, E], share of tokens that requests with similar prompts sent to each expert
    prompt_trust: float  # weight of `prompt_share` in the prior, from 0 to 1; the rest are the global frequencies
    frequency: Scores  # [L, E], estimated probability that a token of the request uses each expert


class GlobalFrequencies(NamedTuple):
    """How often iterations of all requests use each expert."""

    share: Scores  # [L, E], of the iterations; before the first, `1 / E`
    iterations: Scores  # [L], number of iterations that `share` is the mean of


class RequestArrays(NamedTuple):
    """The arrays of a `RequestState`, for kernels."""

    frequencies: RequestFrequencies
    search: SearchState
    iteration: Iteration
    gate_predictions: GatePredictions


@kernel
def update_frequencies(
    frequencies: RequestFrequencies,
    global_frequencies: GlobalFrequencies,
    layer: int,
    share: Scores,
    tokens: int,
    decay: float,
    exact: int,
) -> None:
    """A layer has run for some tokens of a request.

    With n and N the decayed uses of an expert and the decayed tokens, each multiplied by `decay` per token:

        frequency = (n + prior) / (N + 1)
        prior = prompt_trust * prompt_share + (1 - prompt_trust) * global share

    so the prior counts as one token.

    Args:
        frequencies: of the request, updated.
        global_frequencies: updated if `exact`.
        layer: that has run.
        share: `[E]`, share of the tokens sent to each expert.
        tokens: number of tokens.
        decay: per token.
        exact: 1 for an iteration of one token whose experts are known exactly, which counts for the global frequencies;
            otherwise 0.
    """
    kept = decay**tokens
    weight = (1.0 - kept) / (1.0 - decay)
    global_frequencies.iterations[layer] += exact
    frequencies.decayed_tokens[layer] = kept * frequencies.decayed_tokens[layer] + weight
    for expert in range(len(share)):
        if exact:
            global_frequencies.share[layer, expert] += (
                share[expert] - global_frequencies.share[layer, expert]
            ) / global_frequencies.iterations[layer]
        frequencies.uses[layer, expert] += tokens * share[expert]
        frequencies.decayed_uses[layer, expert] = (
            kept * frequencies.decayed_uses[layer, expert] + weight * share[expert]
        )
        prior = (
            frequencies.prompt_trust * frequencies.prompt_share[layer, expert]
            + (1.0 - frequencies.prompt_trust) * global_frequencies.share[layer, expert]
        )
        frequencies.frequency[layer, expert] = (frequencies.decayed_uses[layer, expert] + prior) / (
            frequencies.decayed_tokens[layer] + 1.0
        )


class RequestState:
    """State of a running request.

    Args:
        capacity: `S`, rows of the history.
        constants: of the formulas.
        global_frequencies: of all iterations so far.
        prompt_embedding: `[D]`, mean of its prompt's token embeddings, if known.
        prompt_prior: prior from earlier prompts.
        distances: for how many layers ahead gates are evaluated.

    Attributes:
        prompt_embedding: as given.
        frequencies: how often it uses each expert.
        search: its search state.
        iteration: the current iteration.
        num_routed: layers of the iteration whose executed experts are known, none left out.
        last_iteration: number of its last iteration in the history, or `NO_ROW`.
        deferred: iterations that enter the history when the request ends: token, gates, executed.
        gate_predictions: experts that gates selected for layers ahead.
        arrays: frequencies, search, iteration and gate predictions, for kernels.
        tokens: number of tokens that ran.
    """

    def __init__(
        self,
        capacity: int,
        constants: Constants,
        global_frequencies: GlobalFrequencies,
        prompt_embedding: Floats | None,
        prompt_prior: PromptPrior,
        distances: int,
    ) -> None:
        count, (layers, experts) = constants.neighbours, global_frequencies.share.shape
        self.prompt_embedding = prompt_embedding
        share, trust = prompt_prior.predict(prompt_embedding) or (np.zeros((layers, experts)), 0.0)
        self.frequencies = RequestFrequencies(
            np.zeros((layers, experts)), np.zeros((layers, experts)), np.zeros(layers), share, trust,
            trust * share + (1.0 - trust) * global_frequencies.share,
        )  # fmt: skip
        self.search = SearchState(
            np.zeros(capacity, np.float32), np.zeros(count, np.int64), np.zeros(count, np.float32),
            self.frequencies.frequency, np.zeros((constants.horizon + 1, layers, experts)),
        )  # fmt: skip
        self.iteration = Iteration(np.zeros((layers, experts), np.float32), np.zeros((layers, experts), np.bool_))
        self.num_routed = 0
        self.last_iteration = NO_ROW
        self.deferred: list[tuple[int, Floats, Flags]] = []
        self.gate_predictions = make_gate_predictions(distances, layers, experts)
        self.arrays = RequestArrays(self.frequencies, self.search, self.iteration, self.gate_predictions)
        self.tokens = 0

    def predict_by_frequency(self, now: int, tokens: int) -> None:
        """Predicts without neighbours: this iteration's layers after `now` run `tokens` tokens, later iterations one.

        With f the frequency: `p_0 = 1 - (1 - f)^tokens`, `p_j = f`.
        """
        probabilities, frequency = self.search.probabilities, self.search.frequency
        probabilities[0, now + 1 :] = 1.0 - (1.0 - frequency[now + 1 :]) ** tokens
        probabilities[1:] = frequency
