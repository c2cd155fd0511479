"""finemoe's own policy: predicts what follows from what followed similar past iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.jit import Jit, interpreted
from finemoe.policy.base import Policy, StateDict
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.decode_step import decode_step_kernel, update_scores
from finemoe.policy.finemoe.gate_lookahead import look_ahead, make_weights
from finemoe.policy.finemoe.history import (
    NO_ROW,
    Flags,
    Floats,
    History,
    HistoryRows,
    append,
    encode_layers,
    history_from_rows,
    make_history,
    rows_from_history,
)
from finemoe.policy.finemoe.prompt_prior import PromptPrior
from finemoe.policy.finemoe.request_state import GlobalFrequencies, RequestState, update_frequencies
from finemoe.policy.finemoe.search import CONSTANTS, Constants, begin_search, extend_search
from finemoe.policy.top_k import TopKEstimator
from finemoe.types import DECODE, PREFILL, Recorded, Routed, Step

STORE_BYTES = 128 << 20  # default size of the history's columns
_MOST_ROWS = 1 << 17  # the time of a search is proportional to the rows


class FinemoePolicy(Policy):
    """Prefetches and retains the experts whose next use is likely and near, judged by similar past iterations.

    Source: fMoE (arXiv 2502.05370) for the idea that the current iteration resembles stored ones, found by token and by
    layer trajectory; the rest is ours. The formulas are in the modules named here:

    - `history`: a row is a finished decode iteration: its experts in each layer, weighted by the root of the gate. A
      request's own iterations are added at once.
    - `search`: a row's score is its overlap in the layers routed so far, a share of the previous row's score in the
      previous iteration, and a bonus for the same input token. The nearest rows predict the layers to come, the rows
      after them the next tokens; both are shrunk towards the request's frequencies (`request_state`).
    - `decode_step`: the score of an expert is the discounted probability of its next use. It serves as retention and as
      prefetch priority, so one scale decides what to evict, what to prefetch, and whether a prefetch may evict its
      victim. Link speed and cache size do not enter.
    - `gate_lookahead`: if the next layers' gates were evaluated, they change those layers' probabilities.
    - `prompt_prior`: a request's frequencies start from those of requests with similar prompts (without embeddings:
      from the global ones), weighted as one token; so a prompt's first layers are predicted before any gate runs.

    Details:

    - Neighbours whose j-th successor is not known are left out of `p_j`.
    - Prompts are not rows. Of several tokens only the mean of the gates is known; it updates the frequencies, as so
      many tokens. During a prompt of T tokens, the layers to come are predicted by `1 - (1 - f)^T`. Before anything is
      known of a layer, all of its experts are equally likely: a first prompt needs most of them.
    - Several running requests: each has its own search; `1 - prod(1 - p)` over them. Of the experts that they needed
      together, each is taken to have used its K likeliest; without gates that is not known, and only frequencies are
      updated.
    - `switch` compares whole transfers. Comparing with the remainder of the one in flight changes the time per layer by
      less than 0.1% at every link speed tried.
    - For decoded tokens the input token id replaces the semantic embedding; embeddings are used for prompts only.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `S`; by default as many rows as `STORE_BYTES` of columns hold, and `_MOST_ROWS` at most.
        active: K; by default estimated from events.
        lookahead: for how many layers ahead gates are used.
        constants: of the formulas.
        without: parts to leave out, for ablations. `prefetch`: eviction only. `own`: a request's iterations are added
            when it ends, not at once. `neighbours`: only the nearest row. `successors`: frequencies instead of
            successors. `context`, `tokens`: no share of the previous score, no bonus for the token. `lookahead`,
            `prompts`: gates ahead, prompt embeddings are not used. `pause`: prefetching is never throttled.
        jit: compiles the kernels.
    """

    uses = frozenset({"gates", "lookahead"})
    prefetches = True
    is_persistent = True
    compiles = True
    runs_async = True
    parts = ("prefetch", "own", "neighbours", "successors", "context", "tokens", "lookahead", "prompts", "pause")
    settings = ("capacity", "lookahead")
    margin = 0.05
    switch = 1.25

    def __init__(
        self,
        layers: int,
        experts: int,
        capacity: int | None = None,
        active: int | None = None,
        lookahead: int = 1,
        *,
        constants: Constants = CONSTANTS,
        without: frozenset[str] = frozenset(),
        jit: Jit[Any] = interpreted,
    ) -> None:
        super().__init__(layers, experts)
        self.without = without
        if "prefetch" not in without:
            self.prefetch_priority = self.retention_priority  # the same array
        self.throttles_prefetch = "pause" not in without
        self.lookahead = lookahead
        self.capacity = capacity or max(1, min(_MOST_ROWS, STORE_BYTES // (layers * experts)))
        self.active = TopKEstimator(active)
        self.constants = constants._replace(  # noqa: SLF001 - public in named tuples
            neighbours=1 if "neighbours" in without else constants.neighbours,
            horizon=0 if "successors" in without else constants.horizon,
            context=0.0 if "context" in without else constants.context,
            same_token=0.0 if "tokens" in without else constants.same_token,
        )
        self.num_added = 0  # iterations ever added to the history
        self.history: History | None = None  # made with the first iteration, when K is known
        self.prompt_prior = PromptPrior(layers, experts)
        self._gate_weights: Scores = make_weights(self.lookahead)
        self._global_frequencies = GlobalFrequencies(np.full((layers, experts), 1.0 / experts), np.zeros(layers))
        self._running: dict[int, RequestState] = {}
        self._steps: tuple[Step, ...] = ()
        self._update_frequencies, self._append, self._encode_layers = map(
            jit, (update_frequencies, append, encode_layers)
        )
        self._begin_search, self._extend_search = jit(begin_search), jit(extend_search)
        self._look_ahead, self._update_scores_kernel = jit(look_ahead), jit(update_scores)
        self._decode_step = jit(decode_step_kernel)
        self._no_gates = np.zeros(experts, np.float32)
        self._no_lookahead = np.zeros((0, experts), np.float32)

    @property
    def size(self) -> int:
        """Number of rows in use."""
        return min(self.num_added, self.capacity)

    @property
    def num_updates(self) -> int:
        return self.num_added

    def state_dict(self) -> StateDict:
        """The `HistoryRows` and the totals.

        `ids`, `weights`, `tokens`, `before` (`HistoryRows.prev`); `usual` `[L, E]` and `iterations` `[L]`, the
        `GlobalFrequencies`; `number` `[1]`, iterations ever added; `active` `[1]`, K; `lookahead` `[3 n]`, the weights
        of gate lookahead; `openings` and `opened`, the `PromptPrior`, if there are embeddings.
        """
        if self.history is None:
            return {}
        rows = rows_from_history(self.history, self.num_added)
        return {
            "ids": rows.ids,
            "weights": rows.weights,
            "tokens": rows.tokens,
            "before": rows.prev,
            "usual": self._global_frequencies.share.copy(),
            "iterations": self._global_frequencies.iterations.copy(),
            "number": np.array([self.num_added]),
            "active": np.array([self.active.count]),
            "lookahead": self._gate_weights.flatten(),
        } | self.prompt_prior.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        if not state_dict:
            return
        rows = HistoryRows(state_dict["ids"], state_dict["weights"], state_dict["tokens"], state_dict["before"])
        # a full ring continues at the same row, so that rows of equal score keep their order
        self.num_added = int(state_dict["number"][0]) if len(rows.tokens) >= self.capacity else len(rows.tokens)
        self.history = history_from_rows(rows, self.experts, self.capacity, self.num_added)
        self._global_frequencies.share[:] = state_dict["usual"]
        self._global_frequencies.iterations[:] = state_dict["iterations"]
        self.active.observe_count(int(state_dict["active"][0]))
        weights = state_dict["lookahead"].reshape(-1, 3)[: self.lookahead]
        self._gate_weights[: len(weights)] = weights
        self.prompt_prior.load_state_dict(state_dict)
        self._running, self._steps = {}, ()

    def learn(self, recorded: Recorded) -> None:
        decode = recorded.phases == DECODE
        executed = recorded.executed[decode]
        self.active.observe_count(int(executed.sum(axis=2).min(initial=self.experts)))
        share, iterations = self._global_frequencies
        iterations[:] += len(executed)
        share[:] += (executed.sum(axis=0) - len(executed) * share) / np.maximum(1, iterations)[:, None]
        self._add_iterations(recorded.token_ids[decode], recorded.gates[decode], executed, NO_ROW)
        if recorded.embeddings is not None and len(executed) < len(decode) and not decode[0]:
            self.prompt_prior.add(recorded.embeddings[0], executed.mean(axis=0) if len(executed) else share)

    def begin(self, steps: Sequence[Step]) -> None:
        previous = self._running
        self._steps, self._running = tuple(steps), {}
        for step in steps:
            request = previous.pop(step.request, None)
            if request is None:
                embedding = step.embedding if step.phase == PREFILL and "prompts" not in self.without else None
                request = RequestState(
                    self.capacity,
                    self.constants,
                    self._global_frequencies,
                    embedding,
                    self.prompt_prior,
                    self.lookahead,
                )
            self._running[step.request] = request
            request.num_routed = 0
            request.gate_predictions.selected[:] = False
        for ended in previous.values():
            self._finish(ended)
        for step, request in self._each():
            if _decodes(step) and self.history is not None:
                token = int(step.token_ids[0])
                self._begin_search(self.history, self.size, token, self.constants, request.search, int(self.lagging))
            else:
                request.predict_by_frequency(-1, len(step.token_ids))
        self._update_scores(-1)

    def routed(self, event: Routed) -> None:
        self.active.observe(event)
        if len(self._steps) == 1 and self._routed_single(event):
            return
        layer, count = event.layer, len(self._running)
        gates = event.gates if event.gates is not None and len(event.gates) == count else None
        lookahead = event.lookahead if event.lookahead is not None and len(event.lookahead) == count else None
        needed = np.zeros(self.experts, np.bool_)
        needed[np.asarray(event.experts, np.int64)] = True
        for b, (step, request) in enumerate(self._each()):
            own_gates = None if gates is None else gates[b]
            executed = self._executed(needed, own_gates, step)
            self._count_uses(layer, request, step, needed, own_gates, executed)
            if executed is not None and _decodes(step) and request.num_routed == layer:
                request.num_routed += 1
                request.iteration.executed[layer] = executed
                request.iteration.gates[layer] = 0.0 if own_gates is None else own_gates
            if request.num_routed == layer + 1 and self.history is not None:
                iteration, search, lagging = request.iteration, request.search, int(self.lagging)
                self._extend_search(self.history, self.size, layer, iteration, self.constants, search, lagging)
            else:
                request.predict_by_frequency(layer, len(step.token_ids))
            if lookahead is not None and _decodes(step):
                self._apply_lookahead(layer, request, executed, lookahead[b])
        self._update_scores(layer)

    def end(self) -> None:
        for step, request in self._each():
            if request.num_routed < self.layers:
                continue
            token, (gates, executed) = int(step.token_ids[0]), request.iteration
            if "own" not in self.without:
                self._add_iterations(np.array([token], np.int32), gates[None], executed[None], request.last_iteration)
                request.last_iteration = self.num_added - 1
            else:
                request.deferred.append((token, gates.copy(), executed.copy()))

    def expected(self, layer: int) -> Scores | None:
        probabilities = [request.search.probabilities[0, layer] for request in self._running.values()]
        return 1.0 - np.prod([1.0 - own for own in probabilities], axis=0) if probabilities else None

    def _routed_single(self, event: Routed) -> bool:
        """Handles the event in one kernel if the only request decodes and no layer was left out; else returns false."""
        (step,), (request,), layer = self._steps, self._running.values(), event.layer
        if self.history is None or request.num_routed != layer or not _decodes(step):
            return False
        gates = event.gates[0] if event.gates is not None and len(event.gates) == 1 else self._no_gates
        ahead = self._no_lookahead
        if event.lookahead is not None and len(event.lookahead) == 1 and not self.lagging:
            ahead = ahead if "lookahead" in self.without else event.lookahead[0]
        self._decode_step(
            self._global_frequencies, self.history, self.size, request.arrays, self._gate_weights, layer,
            np.array(event.experts, np.int64), gates, ahead, self.active.count, self.constants, self.retention_priority,
            int(self.lagging),
        )  # fmt: skip
        request.num_routed += 1
        request.tokens += layer == self.layers - 1
        return True

    def _each(self) -> list[tuple[Step, RequestState]]:
        return list(zip(self._steps, self._running.values(), strict=True))

    def _executed(self, needed: Flags, gates: Floats | None, step: Step) -> Flags | None:
        """`[E]`: which of the experts that all requests needed one request used; `None` if not known."""
        if len(self._running) == 1:
            return needed
        if gates is None or not _decodes(step):
            return None
        order = np.argsort(np.where(needed, -gates, np.inf), kind="stable")[: self.active.count]
        executed = np.zeros(self.experts, np.bool_)
        executed[order] = True
        return executed & needed & (gates > 0)

    def _count_uses(
        self, layer: int, request: RequestState, step: Step, needed: Flags, gates: Floats | None, executed: Flags | None
    ) -> None:
        """Updates the frequencies, the request's and the global ones."""
        tokens, exact = len(step.token_ids), executed is not None and _decodes(step)
        if executed is not None and exact:
            share = executed.astype(np.float64)
        elif gates is not None and gates.any():
            share = np.minimum(1.0, self.active.count * gates.astype(np.float64) / gates.sum())
        else:
            share = needed.astype(np.float64)
        self._update_frequencies(
            request.frequencies, self._global_frequencies, layer, share, tokens, self.constants.decay, int(exact)
        )
        if layer == self.layers - 1:
            request.tokens += tokens

    def _apply_lookahead(self, layer: int, request: RequestState, executed: Flags | None, ahead: Floats) -> None:
        """Updates the next layers' probabilities by their gates `[n, E]`, and learns from this layer's outcome."""
        if "lookahead" in self.without:
            return
        known = np.zeros(self.experts, np.bool_) if executed is None else executed
        used = ahead[:0] if self.lagging else ahead
        probabilities = request.search.probabilities[0]
        self._look_ahead(
            self._gate_weights, request.gate_predictions, layer, known, used, self.active.count, probabilities
        )

    def _update_scores(self, now: int) -> None:
        """Updates the priorities once layer `now` is routed; with several requests, any of them may need an expert."""
        running = [request.search for request in self._running.values()]
        if not running or self.lagging:
            return
        probabilities, frequency = running[0].probabilities, running[0].frequency
        if len(running) > 1:
            probabilities = 1.0 - np.prod([1.0 - search.probabilities for search in running], axis=0)
            frequency = 1.0 - np.prod([1.0 - search.frequency for search in running], axis=0)
        self._update_scores_kernel(now, self.constants.discount, probabilities, frequency, self.retention_priority)

    def _finish(self, ended: RequestState) -> None:
        """Learns from a request that has ended: its prompt, and the iterations that were deferred until now."""
        if ended.prompt_embedding is not None and ended.tokens:
            self.prompt_prior.add(ended.prompt_embedding, ended.frequencies.uses / ended.tokens)
        if ended.deferred:
            tokens, gates, executed = zip(*ended.deferred, strict=True)
            self._add_iterations(np.array(tokens, np.int32), np.stack(gates), np.stack(executed), NO_ROW)

    def _add_iterations(self, tokens: npt.NDArray[np.int32], gates: Floats, executed: Flags, previous: int) -> None:
        """Adds successive iterations `[n]` of a request; `previous` is the number of the one before them."""
        if self.history is None:
            active = int(executed.sum(axis=2).max(initial=1))
            self.history = make_history(self.layers, self.experts, active, self.capacity)
        shape = (len(tokens), *self.history.ids.shape[1:])
        ids, weights = np.empty(shape, self.history.ids.dtype), np.empty(shape, np.uint8)
        self._encode_layers(gates, executed, ids, weights)
        self._append(self.history, self.num_added, tokens, ids, weights, previous)
        rows = np.arange(self.num_added, self.num_added + len(tokens)) % self.capacity
        for request in self._running.values():
            request.search.scores[rows] = 0.0
        self.num_added += len(tokens)


def _decodes(step: Step) -> bool:
    return step.phase == DECODE and len(step.token_ids) == 1
