"""The policy of the fMoE paper: expert maps of past iterations, found by semantic and trajectory search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import Jit, interpreted, kernel
from finemoe.policy.base import Policy, StateDict
from finemoe.policy.cache_state import Scores
from finemoe.policy.published.expert_map_store import ExpertMapStore, Floats
from finemoe.policy.published.lru_prefetch import PROTECTED
from finemoe.policy.top_k import TopKEstimator
from finemoe.types import Recorded, Routed, Step

_FLOOR = 1e-6  # replaces a probability of 0
_DISTANCES = ((8, 3), (16, 4))  # (most experts per layer, d)
_LARGEST_DISTANCE = 6  # the paper's d: 3 for 32 layers of 8 experts, 4 for 32 of 16, 6 for 24 of 60


class MapSearch(NamedTuple):
    """Search state of the running requests."""

    products: Floats  # [B, S], dot product of each request's layers so far, flattened, with those of each stored map
    squared_norms: Scores  # [B], of each request's layers so far
    matches: npt.NDArray[np.int64]  # [B], row of the best match
    scores: Scores  # [B], its cosine; 0 or less: no match


class MapPriorities(NamedTuple):
    """The priorities, and what they are computed from. All `[L, E]`."""

    p: Scores  # probabilities in the last match
    frequency: Scores  # number of visits
    selected: Scores  # p of the experts selected for prefetch, 0 for the others
    retention_priority: Scores
    prefetch_priority: Scores


@kernel
def trajectory_search(
    columns: Floats, inverse_norms: Floats, size: int, layer: int, gates: Floats, search: MapSearch
) -> None:
    """Extends each request's trajectory by one layer, and updates its best match.

    Args:
        columns: `[L, E, S]`, see `ExpertMapStore`.
        inverse_norms: `[L, S]`, see `ExpertMapStore`.
        size: number of stored maps.
        layer: the new layer; all layers before it were added.
        gates: `[B, E]`, of that layer.
        search: is updated.
    """
    products, squared_norms, matches, scores = search
    for b in range(len(gates)):
        so_far = products[b, :size]
        for expert in range(gates.shape[1]):
            p = gates[b, expert]
            if p != 0:
                so_far += p * columns[layer, expert, :size]
                squared_norms[b] += p * p
        similarity = so_far * inverse_norms[layer, :size]
        matches[b] = similarity.argmax()
        scores[b] = similarity[matches[b]] / np.sqrt(squared_norms[b]) if squared_norms[b] > 0 else 0.0


@kernel
def select_experts(p: Scores, delta: float, count: int, selected: Scores) -> None:
    """Selects the likeliest experts: the fewest with a probability sum of `delta` and at least `count` of them.

    If there are not enough, all with a probability above 0.

    Args:
        p: `[E]`.
        delta: least sum of probabilities.
        count: least number of experts.
        selected: `[E]`, filled in: p of the selected experts, 0 for the others.
    """
    selected[:] = 0.0
    rest = p.copy()
    total, size = 0.0, 0
    while size < len(p) and (size < count or total < delta):
        best = rest.argmax()
        if not rest[best] > 0:
            break
        selected[best] = p[best]
        total += p[best]
        size += 1
        rest[best] = 0.0


@kernel
def predict(columns: Floats, layer: int, search: MapSearch, count: int, priorities: MapPriorities) -> None:
    """Predicts `layer` from the matched maps: its rows of `p` and `selected`, combined over all requests.

    If no request has a match, nothing is selected, and `p` stays as it was.
    """
    p, selected = priorities.p, priorities.selected
    matched_any = False
    missed, not_selected = np.ones(p.shape[1]), np.ones(p.shape[1])
    own = np.zeros(p.shape[1])
    for b in range(len(search.matches)):
        score = search.scores[b]
        if score > 0:
            matched_any = True
            matched = columns[layer, :, search.matches[b]].astype(np.float64)
            select_experts(matched, min(max(1.0 - score, 0.0), 1.0), count, own)
            missed *= 1.0 - matched
            not_selected *= 1.0 - own
    selected[layer] = 1.0 - not_selected
    if matched_any:
        p[layer] = 1.0 - missed


@kernel
def update_priorities(now: int, first: int, distance: int, priorities: MapPriorities) -> None:
    """Both priorities of the layers `first` to `now + distance`, once layer `now` is routed (-1: none yet)."""
    p, frequency, selected, retention_priority, prefetch_priority = priorities
    last = min(now + distance + 1, len(p))
    ahead = np.arange(first, last) - now
    nearness = np.where(ahead > 0, 1.0 / np.maximum(ahead, 1), 0.0)
    priority = selected[first:last] * nearness.reshape(-1, 1)
    prefetch_priority[first:last] = priority
    retention_priority[first:last] = np.where(
        priority > 0, PROTECTED + priority, np.maximum(p[first:last], _FLOOR) * frequency[first:last]
    )


class ExpertMapPolicy(Policy):
    """The policy of the fMoE paper, by its formulas.

    Source: "fMoE: Fine-Grained Expert Offloading for Large Mixture-of-Experts Serving" (arXiv 2502.05370; FineMoE at
    EuroSys'26), the sections on expert maps, their search, their store, and expert prefetching and caching. With one
    map per iteration, `P_l` the gate's distribution over the experts of layer l:

    - Semantic search, layers 1 to d: the stored map whose key has the highest cosine with the iteration's
      embedding-layer output.
    - Trajectory search, layer l beyond d, once layer l - d is routed: the stored map whose flattened `P_1 .. P_{l-d}`
      has the highest cosine with the observed ones.
    - Selection: of the match's `P_l`, the smallest set in descending order with a sum of at least
      `delta_l = clip(1 - score, 0, 1)` and at least K experts is prefetched.
    - Prefetch priority: `p / (l - l_now)`.
    - Eviction priority: `1 / (p * freq)`, highest first, with `freq` the number of visits; as a retention priority,
      `p * freq`.
    - Finished iterations enter the store (`ExpertMapStore`).

    Deviations and readings, where the paper is silent:

    - A prompt's map is the mean over its tokens.
    - For a layer without a prediction, `p` is the last one predicted. A probability of 0 counts as `_FLOOR`: traces
      that recorded only the selected gates are full of zeros, and among those the frequency should decide.
    - A prefetched expert has few visits yet and would be the next victim: it is protected until its layer has run.
    - A prefetch only evicts experts of lower prefetch priority; experts of probability 0 are never selected.
    - Several running requests: each has its own search; `1 - prod(1 - p)` over them.
    - Without embeddings, the key is the input token id: the newest map with the same token matches with score 1; if
      there is none, the first d layers are not predicted (`substitutes`).

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `S`; the paper's is 1000.
        distance: `d`; by default the paper's for the number of experts per layer: 3 up to 8, 4 up to 16, 6 beyond.
        active: K; by default estimated from events.
        jit: compiles the kernels.
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
        self.distance = distance or next((d for most, d in _DISTANCES if experts <= most), _LARGEST_DISTANCE)
        self.store = ExpertMapStore(layers, experts, capacity, self.distance)
        self.active = TopKEstimator(active)
        p, frequency, selected = np.zeros((3, layers, experts))
        self.priorities = MapPriorities(p, frequency, selected, self.retention_priority, self.prefetch_priority)
        self._trajectory_search, self._predict, self._update_priorities = (
            jit(trajectory_search),
            jit(predict),
            jit(update_priorities),
        )
        self.begin(())

    @property
    def num_updates(self) -> int:
        return self.store.num_added

    def state_dict(self) -> StateDict:
        """That of the store; `p` and `visits` `[L, E]`, which determine evictions; `active` `[1]`, K."""
        if not self.store.size:
            return {}
        return self.store.state_dict() | {
            "p": self.priorities.p.copy(),
            "visits": self.priorities.frequency.copy(),
            "active": np.array([self.active.count]),
        }

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        if not state_dict:
            return
        self.store.load_state_dict(state_dict)
        self.priorities.p[:], self.priorities.frequency[:] = state_dict["p"], state_dict["visits"]
        self.active.observe_count(int(state_dict["active"][0]))
        self.begin(())

    def learn(self, recorded: Recorded) -> None:
        self.active.observe_count(int(recorded.executed.sum(axis=2).min(initial=self.experts)))
        self.store.add(recorded.gates, recorded.token_ids, recorded.embeddings)

    def begin(self, steps: Sequence[Step]) -> None:
        running = len(steps)
        self._steps = steps
        self._num_routed = 0  # layers of this iteration routed so far, none left out
        self._maps: Floats = np.zeros((running, self.layers, self.experts), np.float32)
        self._search = MapSearch(
            np.zeros((running, self.store.columns.shape[2]), np.float32),
            np.zeros(running),
            np.zeros(running, np.int64),
            np.zeros(running),
        )
        for b, step in enumerate(steps):
            self._search.matches[b], self._search.scores[b] = self.store.semantic_search(_key(step), step.embedding)
        self.priorities.selected[:] = 0.0
        for layer in range(min(self.distance, self.layers)):
            self._predict_layer(layer)
        self._previous = -1
        self._update_priorities(-1, 0, self.layers, self.priorities)

    def routed(self, event: Routed) -> None:
        layer, gates = event.layer, event.gates
        self.active.observe(event)
        self.priorities.frequency[layer, np.asarray(event.experts, np.int64)] += 1.0
        if layer == self._num_routed and gates is not None and len(gates) == len(self._steps):
            self._num_routed += 1
            self._maps[:, layer] = gates
            store = self.store
            if store.size:
                self._trajectory_search(store.columns, store.inverse_norms, store.size, layer, gates, self._search)
                if layer + self.distance < self.layers:
                    self._predict_layer(layer + self.distance)
        if layer != self._previous + 1:  # out of order: any layer may have priorities to reset
            self.priorities.selected[:] = 0.0
            self._update_priorities(layer, 0, self.layers, self.priorities)
        else:
            self._update_priorities(layer, layer, self.distance, self.priorities)
        self._previous = layer

    def end(self) -> None:
        if self._num_routed == self.layers and self._steps:
            keys = [step.embedding for step in self._steps if step.embedding is not None]
            tokens = np.array([_key(step) for step in self._steps])
            embeddings = np.stack(keys) if len(keys) == len(tokens) else None
            self.store.add(self._maps, tokens, embeddings, self._search.products)

    def expected(self, layer: int) -> Scores | None:
        return np.array(self.priorities.p[layer])

    def _predict_layer(self, layer: int) -> None:
        self._predict(self.store.columns, layer, self._search, self.active.count, self.priorities)


def _key(step: Step) -> int:
    return int(step.token_ids[-1]) if len(step.token_ids) else -1
