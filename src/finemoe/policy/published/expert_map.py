"""Expert maps: the gate's distributions of past iterations, searched by meaning and by trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import Jit, interpreted, kernel
from finemoe.policy.base import Policy, StateDict
from finemoe.policy.cache_state import Scores
from finemoe.policy.published.expert_map_store import Floats, MapStore
from finemoe.policy.published.lru_prefetch import KEPT
from finemoe.policy.top_k import TopKEstimator
from finemoe.types import Recorded, Routed, Step

_FLOOR = 1e-6  # instead of a probability of 0
_DISTANCES = ((8, 3), (16, 4))  # the paper's: for 32 layers of 8 experts 3, 32 of 16 4, 24 of 60 6


class MapSearch(NamedTuple):
    """The running requests' places in the store."""

    products: Floats  # [B, S], each request's layers so far, flattened, with those of each stored map
    energy: Scores  # [B], with themselves
    matches: npt.NDArray[np.int64]  # [B], the row of the best match
    scores: Scores  # [B], its cosine; 0 or less: no match


class Scored(NamedTuple):
    """What priorities follow from, and the priorities. All `[L, E]`."""

    p: Scores  # the probabilities of the last match
    frequency: Scores  # visits
    chosen: Scores  # p of what is to be prefetched, 0 of the rest
    retention_priority: Scores
    prefetch_priority: Scores


@kernel
def follow(columns: Floats, inverse_norms: Floats, size: int, layer: int, gates: Floats, search: MapSearch) -> None:
    """Trajectory search: `gates` `[B, E]` of one more layer are known, after all before it. Brings `search` up to date.

    The rest is the store's: `columns` `[L, E, S]`, `inverse_norms` `[L, S]`, its size.
    """
    products, energy, matches, scores = search
    for b in range(len(gates)):
        so_far = products[b, :size]
        for expert in range(gates.shape[1]):
            p = gates[b, expert]
            if p != 0:
                so_far += p * columns[layer, expert, :size]
                energy[b] += p * p
        similarity = so_far * inverse_norms[layer, :size]
        matches[b] = similarity.argmax()
        scores[b] = similarity[matches[b]] / np.sqrt(energy[b]) if energy[b] > 0 else 0.0


@kernel
def select(p: Scores, delta: float, count: int, chosen: Scores) -> None:
    """The smallest set in descending order of `p` `[E]` with a sum of `delta` and `count` experts, or all above 0.

    `chosen` `[E]` becomes their probability, and 0 for the others.
    """
    chosen[:] = 0.0
    rest = p.copy()
    total, size = 0.0, 0
    while size < len(p) and (size < count or total < delta):
        best = rest.argmax()
        if not rest[best] > 0:
            break
        chosen[best] = p[best]
        total += p[best]
        size += 1
        rest[best] = 0.0


@kernel
def predict(columns: Floats, layer: int, search: MapSearch, count: int, scores: Scored) -> None:
    """What the matched maps say of `layer`: a row of `p` and of `chosen`, over all requests.

    If no request has a match, nothing is chosen, and `p` stays as it was.
    """
    p, chosen = scores.p, scores.chosen
    anything = False
    missed, unchosen = np.ones(p.shape[1]), np.ones(p.shape[1])
    one = np.zeros(p.shape[1])
    for b in range(len(search.matches)):
        score = search.scores[b]
        if score > 0:
            anything = True
            matched = columns[layer, :, search.matches[b]].astype(np.float64)
            select(matched, min(max(1.0 - score, 0.0), 1.0), count, one)
            missed *= 1.0 - matched
            unchosen *= 1.0 - one
    chosen[layer] = 1.0 - unchosen
    if anything:
        p[layer] = 1.0 - missed


@kernel
def appraise(now: int, first: int, distance: int, scores: Scored) -> None:
    """Priorities of the layers from `first` to `now + distance`, once layer `now` is known (-1: none yet)."""
    p, frequency, chosen, retention_priority, prefetch_priority = scores
    last = min(now + distance + 1, len(p))
    ahead = np.arange(first, last) - now
    nearness = np.where(ahead > 0, 1.0 / np.maximum(ahead, 1), 0.0)
    wanted = chosen[first:last] * nearness.reshape(-1, 1)
    prefetch_priority[first:last] = wanted
    retention_priority[first:last] = np.where(
        wanted > 0, KEPT + wanted, np.maximum(p[first:last], _FLOOR) * frequency[first:last]
    )


class ExpertMapPolicy(Policy):
    """The policy of the paper, to its formulas.

    Source: "fMoE: Fine-Grained Expert Offloading for Large Mixture-of-Experts Serving" (arXiv 2502.05370; FineMoE at
    EuroSys'26), the sections on expert maps, their search, their store, and expert prefetching and caching. With one
    map per iteration, `P_l` the gate's distribution over the experts of layer l:

    - layers 1 to d: the stored map whose key is most like the iteration's embedding-layer output, by cosine;
    - layer l beyond d, once layer l - d is known: the map whose `P_1 .. P_{l-d}` are most like the observed ones, by
      the cosine of the flattened vectors;
    - of the match's `P_l`, the smallest set in descending order with a sum of at least `clip(1 - score, 0, 1)` and at
      least K experts is prefetched, by priority `p / (l - l_now)`;
    - eviction priority is `1 / (p * freq)`: what goes first has the lowest `p * freq`, `freq` counting visits;
    - finished iterations enter the store (`MapStore`).

    Deviations and readings, where the paper is silent:

    - A prompt's map is the mean over its tokens.
    - `p` of a layer without a prediction is the last one it had. `_FLOOR` stands for a probability of 0, as traces
      that recorded only selected gates are full of it: among those, the frequency decides.
    - What is prefetched has few visits yet, and would be the next victim: it is kept until its layer has run.
    - A prefetch only displaces what is wanted less itself; experts of probability 0 are never chosen.
    - Several running requests: each searches on its own; `1 - prod(1 - p)` over them.
    - Without embeddings, the key is the input token: the same token scores 1, the most recent such map wins, and
      otherwise the first d layers are not predicted (`substitutes`).

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `S`; the paper's is 1000.
        distance: `d`; by default the paper's for layers of so many experts: 3 up to 8, 4 up to 16, 6 beyond.
        active: K; by default learned from what layers need.
        jit: compiles the search.
    """

    prefetches = True
    is_persistent = True
    compiles = True
    runs_async = True
    settings = ("distance", "capacity")
    needs = frozenset({"gates"})
    substitutes = MappingProxyType({"embeddings": "the same input token id"})

    def __init__(
        self,
        layers: int,
        experts: int,
        capacity: int = 1000,
        distance: int | None = None,
        active: int | None = None,
        *,
        jit: Jit[Any] = interpreted,
    ) -> None:
        super().__init__(layers, experts)
        self.distance = distance or next((d for most, d in _DISTANCES if experts <= most), 6)
        self.store = MapStore(layers, experts, capacity, self.distance)
        self.active = TopKEstimator(active)
        p, frequency, chosen = np.zeros((3, layers, experts))
        self.scores = Scored(p, frequency, chosen, self.retention_priority, self.prefetch_priority)
        self._follow, self._predict, self._appraise = jit(follow), jit(predict), jit(appraise)
        self.begin(())

    @property
    def num_updates(self) -> int:
        return self.store.births

    def state_dict(self) -> StateDict:
        """The store's `contents`; `p` and `visits` `[L, E]`, which evictions go by; `active` `[1]`, K."""
        if not self.store.size:
            return {}
        return self.store.contents() | {
            "p": self.scores.p.copy(),
            "visits": self.scores.frequency.copy(),
            "active": np.array([self.active.count]),
        }

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        if not state_dict:
            return
        self.store.refill(state_dict)
        self.scores.p[:], self.scores.frequency[:] = state_dict["p"], state_dict["visits"]
        self.active.see(int(state_dict["active"][0]))
        self.begin(())

    def learn(self, recorded: Recorded) -> None:
        self.active.see(int(recorded.executed.sum(axis=2).min(initial=self.experts)))
        self.store.add(recorded.gates, recorded.token_ids, recorded.embeddings)

    def begin(self, steps: Sequence[Step]) -> None:
        running = len(steps)
        self._steps = steps
        self._known = 0  # layers of this iteration that are known, none left out
        self._maps: Floats = np.zeros((running, self.layers, self.experts), np.float32)
        self._search = MapSearch(
            np.zeros((running, self.store.columns.shape[2]), np.float32),
            np.zeros(running),
            np.zeros(running, np.int64),
            np.zeros(running),
        )
        for b, step in enumerate(steps):
            self._search.matches[b], self._search.scores[b] = self.store.closest(_key(step), step.embedding)
        self.scores.chosen[:] = 0.0
        for layer in range(min(self.distance, self.layers)):
            self._foresee(layer)
        self._previous = -1
        self._appraise(-1, 0, self.layers, self.scores)

    def routed(self, event: Routed) -> None:
        layer, gates = event.layer, event.gates
        self.active.hear(event)
        self.scores.frequency[layer, np.asarray(event.experts, np.int64)] += 1.0
        if layer == self._known and gates is not None and len(gates) == len(self._steps):
            self._known += 1
            self._maps[:, layer] = gates
            store = self.store
            if store.size:
                self._follow(store.columns, store.inverse_norms, store.size, layer, gates, self._search)
                if layer + self.distance < self.layers:
                    self._foresee(layer + self.distance)
        if layer != self._previous + 1:  # not in order: wants may lie anywhere
            self.scores.chosen[:] = 0.0
            self._appraise(layer, 0, self.layers, self.scores)
        else:
            self._appraise(layer, layer, self.distance, self.scores)
        self._previous = layer

    def end(self) -> None:
        if self._known == self.layers and self._steps:
            keys = [step.embedding for step in self._steps if step.embedding is not None]
            tokens = np.array([_key(step) for step in self._steps])
            embeddings = np.stack(keys) if len(keys) == len(tokens) else None
            self.store.add(self._maps, tokens, embeddings, self._search.products)

    def expected(self, layer: int) -> Scores | None:
        return np.array(self.scores.p[layer])

    def _foresee(self, layer: int) -> None:
        self._predict(self.store.columns, layer, self._search, self.active.count, self.scores)


def _key(step: Step) -> int:
    return int(step.token_ids[-1]) if len(step.token_ids) else -1
