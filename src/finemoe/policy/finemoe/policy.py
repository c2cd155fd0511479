"""Our own policy: what followed iterations like this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.jit import Jit, interpreted
from finemoe.policy.base import Policy, StateDict
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.decode_step import appraise, decode_step_kernel
from finemoe.policy.finemoe.gate_lookahead import look_ahead, make_weights
from finemoe.policy.finemoe.history import (
    NO_ROW,
    Flags,
    Floats,
    History,
    HistoryRows,
    append,
    encode_layers,
    history_of,
    make_history,
    rows_of,
)
from finemoe.policy.finemoe.prompt_prior import PromptPrior
from finemoe.policy.finemoe.request_state import GlobalFrequencies, RequestState, use
from finemoe.policy.finemoe.search import CONSTANTS, Constants, begin_search, extend_search
from finemoe.policy.top_k import TopKEstimator
from finemoe.types import DECODE, PREFILL, Recorded, Routed, Step

STORE_BYTES = 128 << 20  # of a store's columns, unless told otherwise
_MOST_ROWS = 1 << 17  # a search takes time in proportion


class FinemoePolicy(Policy):
    """What followed iterations like this one will follow it.

    Source: the idea of fMoE (arXiv 2502.05370), that the iteration under way resembles stored ones, token by token and
    layer by layer; the rest is ours. In short (the kernels have the formulas):

    - A row of the store is a finished iteration: what it used in each layer, by the root of the gate, so that no layer
      of two rows overlaps by more than 1. A request's own iterations enter at once (`history`).
    - A row's score is its overlap with the layers known so far, what the row before it had of the iteration before,
      and a bonus for the same input token. The best rows say what is needed in the layers to come; the rows after
      them, what the next tokens need. Both are shrunk towards the request's frequencies (`neighbours`).
    - An expert is worth the discounted chance of its next use, and wanted by the same (`outlook`). So one scale decides
      what goes, what comes, and whether a prefetch is worth its victim. It knows neither link nor budget.

    Readings, where the study behind it left room, and what was measured here:

    - Rows are linked instead of contiguous, so that several requests can grow in one ring.
    - Neighbours whose j-th successor is not known have no say in `p_j`.
    - Of several tokens' gates, as of a prompt, only the mean is known: it counts for the frequencies, as so many
      tokens; prompts are no rows. During one, every expert in use is expected in each layer to come: `1 - (1 - f)^T`.
    - A request's frequencies start as those of requests with prompts like its own (`PromptPrior`; without embeddings,
      as the global ones), which count for one token more. So the first layers of a prompt are known before any gate has
      run. As long as nothing is known of a layer, its experts are all alike: a first prompt needs most of them.
    - Several running requests: each has its own search; `1 - prod(1 - p)` over them. Of what they needed, each used
      its K likeliest; without gates that can't be told, and only frequencies are left.
    - `switch` compares whole transfers. To compare with what is left of the one under way, as the study did, changes
      the time per layer by less than 0.1% at every link that was tried.
    - The input token stands for the semantics of a decoded token; embeddings are only looked at for prompts.
    - Where the next layer's gate was asked, it moves the chances of that layer, as far as it was right so far
      (`Lookahead`).

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `S`; by default as many rows as `STORE_BYTES` of columns hold, and `_MOST_ROWS` at most.
        active: K; by default learned from what layers need.
        lookahead: for how many layers ahead gates are asked.
        constants: what the formulas leave open.
        without: parts to leave out, to see what they are good for. `prefetch`: eviction alone. `own`: a request's
            iterations enter the store when it ends. `neighbours`: the nearest row alone. `successors`: nothing said of
            the next tokens but frequencies. `context`, `tokens`: nothing of the iteration before, or the input token.
            `lookahead`, `prompts`: gates ahead, and prompts' embeddings, are not looked at. `pause`: goes on with
            prefetches that do not pay.
        jit: compiles the search.
    """

    uses = frozenset({"gates", "lookahead"})
    prefetches = True
    predicts_requests = True
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
            self.prefetch_priority = self.retention_priority  # one scale
        self.throttles_prefetch = "pause" not in without
        self.lookahead = lookahead
        self.capacity = capacity or max(1, min(_MOST_ROWS, STORE_BYTES // (layers * experts)))
        self.active = TopKEstimator(active)
        self.constants = constants._replace(  # noqa: SLF001 - a named tuple's way
            neighbours=1 if "neighbours" in without else constants.neighbours,
            horizon=0 if "successors" in without else constants.horizon,
            context=0.0 if "context" in without else constants.context,
            same_token=0.0 if "tokens" in without else constants.same_token,
        )
        self.number = 0  # iterations that were ever taken in
        self.history: History | None = None  # made when K is known
        self._weights: Scores = make_weights(self.lookahead)  # of lookahead
        self.prompt_prior = PromptPrior(layers, experts)
        self._usual = GlobalFrequencies(np.full((layers, experts), 1.0 / experts), np.zeros(layers))
        self._running: dict[int, RequestState] = {}
        self._steps: tuple[Step, ...] = ()
        self._use, self._begin_search, self._extend_search = jit(use), jit(begin_search), jit(extend_search)
        self._look_ahead, self._appraise = jit(look_ahead), jit(appraise)
        self._append, self._imprint_all = jit(append), jit(encode_layers)
        self._hear_alone = jit(decode_step_kernel)
        self._unsaid = np.zeros(experts, np.float32)  # instead of gates that nobody told
        self._unasked = np.zeros((0, experts), np.float32)  # and of those ahead

    @property
    def size(self) -> int:
        """How many rows there are."""
        return min(self.number, self.capacity)

    @property
    def num_updates(self) -> int:
        return self.number

    def state_dict(self) -> StateDict:
        """The `HistoryRows` by name, and what is known of all iterations.

        `usual` `[L, E]`, of how many `iterations` `[L]`; `number` `[1]` of rows ever taken in; `active` `[1]`, K;
        `lookahead` `[3 n]`, how far the gates 1 to n layers ahead are trusted; `openings` and `opened`, of prompts,
        where these have embeddings.
        """
        if self.history is None:
            return {}
        rows = rows_of(self.history, self.number)
        return {
            "ids": rows.ids,
            "weights": rows.weights,
            "tokens": rows.tokens,
            "before": rows.before,
            "usual": self._usual.share.copy(),
            "iterations": self._usual.iterations.copy(),
            "number": np.array([self.number]),
            "active": np.array([self.active.count]),
            "lookahead": self._weights.flatten(),
        } | self.prompt_prior.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        if not state_dict:
            return
        rows = HistoryRows(state_dict["ids"], state_dict["weights"], state_dict["tokens"], state_dict["before"])
        # a full ring goes on where it was, so that rows of equal scores keep their order
        self.number = int(state_dict["number"][0]) if len(rows.tokens) >= self.capacity else len(rows.tokens)
        self.history = history_of(rows, self.experts, self.capacity, self.number)
        self._usual.share[:], self._usual.iterations[:] = state_dict["usual"], state_dict["iterations"]
        self.active.see(int(state_dict["active"][0]))
        trusted = state_dict["lookahead"].reshape(-1, 3)[: self.lookahead]
        self._weights[: len(trusted)] = trusted
        self.prompt_prior.load_state_dict(state_dict)
        self._running, self._steps = {}, ()

    def learn(self, recorded: Recorded) -> None:
        decode = recorded.phases == DECODE
        executed = recorded.executed[decode]
        self.active.see(int(executed.sum(axis=2).min(initial=self.experts)))
        global_frequencies = self._usual
        global_frequencies.iterations[:] += len(executed)
        seen = np.maximum(1, global_frequencies.iterations)[:, None]
        global_frequencies.share[:] += (executed.sum(axis=0) - len(executed) * global_frequencies.share) / seen
        self._remember(recorded.token_ids[decode], recorded.gates[decode], executed, NO_ROW)
        if recorded.embeddings is not None and len(executed) < len(decode) and not decode[0]:
            self.prompt_prior.add(
                recorded.embeddings[0], executed.mean(axis=0) if len(executed) else global_frequencies.share
            )

    def begin(self, steps: Sequence[Step]) -> None:
        before = self._running
        self._steps, self._running = tuple(steps), {}
        for step in steps:
            running = before.pop(step.request, None)
            if running is None:
                opening = step.embedding if step.phase == PREFILL and "prompts" not in self.without else None
                running = RequestState(
                    self.capacity, self.constants, self._usual, opening, self.prompt_prior, self.lookahead
                )
            self._running[step.request] = running
            running.known = 0
            running.named.experts[:] = False
        for ended in before.values():
            if ended.opening is not None and ended.tokens:
                self.prompt_prior.add(ended.opening, ended.frequencies.used / ended.tokens)
            if ended.kept_back:
                tokens, gates, executed = zip(*ended.kept_back, strict=True)
                self._remember(np.array(tokens, np.int32), np.stack(gates), np.stack(executed), NO_ROW)
        for step, running in self._each():
            if _decodes(step) and self.history is not None:
                token = int(step.token_ids[0])
                self._begin_search(self.history, self.size, token, self.constants, running.search, int(self.lagging))
            else:
                running.expect_by_frequency(-1, len(step.token_ids))
        self._value(-1)

    def routed(self, event: Routed) -> None:
        self.active.hear(event)
        if len(self._steps) == 1 and self._routed_alone(event):
            return
        layer, running = event.layer, list(self._running.values())
        gates = event.gates if event.gates is not None and len(event.gates) == len(running) else None
        needed = np.zeros(self.experts, np.bool_)
        needed[np.asarray(event.experts, np.int64)] = True
        for b, (step, request) in enumerate(self._each()):
            own = None if gates is None else gates[b]
            executed = self._executed(needed, own, step)
            self._take_note(layer, request, step, needed, own, executed)
            if executed is not None and _decodes(step) and request.known == layer:
                request.known += 1
                request.iteration.executed[layer] = executed
                request.iteration.gates[layer] = 0.0 if own is None else own
            if request.known == layer + 1 and self.history is not None:
                iteration, search, late = request.iteration, request.search, int(self.lagging)
                self._extend_search(self.history, self.size, layer, iteration, self.constants, search, late)
            else:
                request.expect_by_frequency(layer, len(step.token_ids))
            if event.lookahead is not None and len(event.lookahead) == len(running) and _decodes(step):
                self._hear_ahead(layer, request, executed, event.lookahead[b])
        self._value(layer)

    def end(self) -> None:
        for step, running in self._each():
            if running.known < self.layers:
                continue
            token = int(step.token_ids[0])
            if "own" not in self.without:
                token_ids = np.array([token], np.int32)
                self._remember(token_ids, running.iteration.gates[None], running.iteration.executed[None], running.last)
                running.last = self.number - 1
            else:
                running.kept_back.append((token, running.iteration.gates.copy(), running.iteration.executed.copy()))

    def expected(self, layer: int) -> Scores | None:
        chances = [running.search.chances[0, layer] for running in self._running.values()]
        return 1.0 - np.prod([1.0 - own for own in chances], axis=0) if chances else None

    def predict_request(self, embedding: Floats) -> Scores | None:
        told = None if "prompts" in self.without else self.prompt_prior.expect(embedding)
        return None if told is None else np.asarray(told[1] * told[0] + (1.0 - told[1]) * self._usual.share)

    def _routed_alone(self, event: Routed) -> bool:
        """Hears of the one request that runs, if it decodes and no layer was left out. Returns whether it did."""
        (step,), (running,), layer = self._steps, self._running.values(), event.layer
        if self.history is None or running.known != layer or not _decodes(step):
            return False
        gates = event.gates[0] if event.gates is not None and len(event.gates) == 1 else self._unsaid
        told = self._unasked
        if event.lookahead is not None and len(event.lookahead) == 1 and not self.lagging:
            told = told if "lookahead" in self.without else event.lookahead[0]
        self._hear_alone(
            self._usual, self.history, self.size, running.state, self._weights, layer,
            np.array(event.experts, np.int64), gates, told, self.active.count, self.constants, self.retention_priority,
            int(self.lagging),
        )  # fmt: skip
        running.known += 1
        running.tokens += layer == self.layers - 1
        return True

    def _each(self) -> list[tuple[Step, RequestState]]:
        return list(zip(self._steps, self._running.values(), strict=True))

    def _executed(self, needed: Flags, gates: Floats | None, step: Step) -> Flags | None:
        """`[E]`: what one request used of what all of them needed; `None` if that can't be told."""
        if len(self._running) == 1:
            return needed
        if gates is None or not _decodes(step):
            return None
        order = np.argsort(np.where(needed, -gates, np.inf), kind="stable")[: self.active.count]
        executed = np.zeros(self.experts, np.bool_)
        executed[order] = True
        return executed & needed & (gates > 0)

    def _take_note(
        self, layer: int, running: RequestState, step: Step, needed: Flags, gates: Floats | None, executed: Flags | None
    ) -> None:
        """Brings frequencies up to date: a request's own, and the usual ones."""
        tokens, alone = len(step.token_ids), executed is not None and _decodes(step)
        if executed is not None and alone:
            share = executed.astype(np.float64)
        elif gates is not None and gates.any():
            share = np.minimum(1.0, self.active.count * gates.astype(np.float64) / gates.sum())
        else:
            share = needed.astype(np.float64)
        self._use(running.frequencies, self._usual, layer, share, tokens, self.constants.fade, int(alone))
        if layer == self.layers - 1:
            running.tokens += tokens

    def _hear_ahead(self, layer: int, running: RequestState, executed: Flags | None, ahead: Floats) -> None:
        """Fuses what the next layers' gates say of this layer's hidden states, `[n, E]`, into their chances."""
        if "lookahead" in self.without:
            return
        known = np.zeros(self.experts, np.bool_) if executed is None else executed
        told = ahead[:0] if self.lagging else ahead
        chances = running.search.chances[0]
        self._look_ahead(self._weights, running.named, layer, known, told, self.active.count, chances)

    def _value(self, now: int) -> None:
        """Brings the scores up to date. Of several requests, any may need an expert."""
        running = [request.search for request in self._running.values()]
        if not running or self.lagging:
            return
        chances, frequency = running[0].chances, running[0].frequency
        if len(running) > 1:
            chances = 1.0 - np.prod([1.0 - search.chances for search in running], axis=0)
            frequency = 1.0 - np.prod([1.0 - search.frequency for search in running], axis=0)
        self._appraise(now, self.constants.discount, chances, frequency, self.retention_priority)

    def _remember(self, tokens: npt.NDArray[np.int32], gates: Floats, executed: Flags, previous: int) -> None:
        """Takes in successive iterations `[n]` of a request; `previous` is the number of the one before them."""
        if self.history is None:
            active = int(executed.sum(axis=2).max(initial=1))
            self.history = make_history(self.layers, self.experts, active, self.capacity)
        shape = (len(tokens), *self.history.ids.shape[1:])
        ids, weights = np.empty(shape, self.history.ids.dtype), np.empty(shape, np.uint8)
        self._imprint_all(gates, executed, ids, weights)
        self._append(self.history, self.number, tokens, ids, weights, previous)
        rows = np.arange(self.number, self.number + len(tokens)) % self.capacity
        for running in self._running.values():
            running.search.scores[rows] = 0.0
        self.number += len(tokens)


def _decodes(step: Step) -> bool:
    return step.phase == DECODE and len(step.token_ids) == 1
