"""MoE-Infinity: request-level activation matrices, matched against those of earlier requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import Jit, interpreted, kernel
from finemoe.policy.base import Policy
from finemoe.policy.cache_state import Scores
from finemoe.policy.top_k import TopKEstimator
from finemoe.types import DECODE, Recorded, Routed, Step

Floats = npt.NDArray[np.float32]

_ROUNDS = 10  # of k-means
_EPSILON = 1e-8  # the paper's: orders experts that were never active by their layer


class ActivationState(NamedTuple):
    """Activation matrices of the running requests, and their similarity to the `P` stored ones."""

    counts: Floats  # [B, L, E], activations so far
    products: Floats  # [B, L, P], dot products of each row of `counts` with the stored unit rows of its layer
    similarity: Scores  # [B, P], sum over layers of the cosines
    matches: npt.NDArray[np.int64]  # [B], the most similar stored matrix


@kernel
def update_matches(columns: Floats, size: int, layer: int, activity: Floats, state: ActivationState) -> None:
    """Adds the activations of one layer to the requests' matrices, and updates similarities and matches.

    Args:
        columns: `[L, E, P]`, see `ActivationCollection`.
        size: number of stored matrices.
        layer: that has run.
        activity: `[B, E]`, how often each request activated each expert.
        state: is updated.
    """
    counts, products, similarity, matches = state
    for b in range(len(activity)):
        row, dot, total = counts[b, layer], products[b, layer, :size], similarity[b, :size]
        length = np.sqrt((row * row).sum())
        if length > 0:
            total -= dot / length
        for expert in range(len(row)):
            times = activity[b, expert]
            if times > 0:
                row[expert] += times
                dot += times * columns[layer, expert, :size]
        length = np.sqrt((row * row).sum())
        if length > 0:
            total += dot / length
        if size > 0:
            matches[b] = total.argmax()


@kernel
def update_priorities(
    shares: Scores,
    size: int,
    layer: int,
    state: ActivationState,
    current: Scores,
    retention_priority: Scores,
    prefetch_priority: Scores,
) -> None:
    """Both priorities after `layer` has run; the formulas are in `MoEInfinityPolicy`.

    Args:
        shares: `[P, L, E]`, see `ActivationCollection`.
        size: number of stored matrices.
        layer: that has run.
        state: of the running requests.
        current: `[L, E]`, activation ratios of the running requests; the row of `layer` is updated.
        retention_priority: `[L, E]`, filled in.
        prefetch_priority: `[L, E]`, filled in.
    """
    layers, experts = prefetch_priority.shape
    missed = np.ones(experts)
    for b in range(len(state.counts)):
        row = state.counts[b, layer].astype(np.float64)
        total = row.sum()
        if total > 0:
            missed *= 1.0 - row / total
    current[layer] = 1.0 - missed
    depth = np.arange(layers)
    retention_priority[:] = (current + _EPSILON) * (1.0 - depth / layers).reshape(-1, 1)
    prefetch_priority[:] = 0.0
    if size > 0 and len(state.matches) > 0 and layer + 1 < layers:
        rest = np.ones((layers - layer - 1, experts))
        for b in range(len(state.matches)):
            rest *= 1.0 - shares[state.matches[b], layer + 1 :]
        nearness = 1.0 - (depth[layer + 1 :] - layer) / layers
        prefetch_priority[layer + 1 :] = (1.0 - rest) * nearness.reshape(-1, 1)
        retention_priority[layer + 1 :] = np.maximum(retention_priority[layer + 1 :], prefetch_priority[layer + 1 :])


class MoEInfinityPolicy(Policy):
    """Prefetches and retains the experts that were active in the most similar earlier request.

    Source: MoE-Infinity (Xue et al., arXiv 2401.14361, versions 1 and 2). A request's expert activation matrix counts,
    from its prompt on, how many tokens went to each expert of each layer. After every layer

    - the most similar matrix of the collection is looked up (`ActivationCollection` defines the distance), and the
      experts of all later layers are prefetched by priority `ratio * (1 - (l - l_now) / L)`, with `ratio` the expert's
      share of its layer's activations in that matrix;
    - the cached expert with the lowest `(ratio + epsilon) * (1 - l / L)` is evicted first, with `ratio` that of the
      running request: early layers are retained, because prefetching comes too late for them.

    Finished requests enter the collection. Deviations and readings, where the paper leaves room:

    - The distance is over the layers known so far; the other rows of a new request's matrix are zero.
    - Both priorities are activation ratios weighted by depth, so they are compared: a prefetch needs a higher priority
      than its victim, and until its layer has run, the prefetched expert's retention priority is at least its prefetch
      priority. In the paper a prefetch may evict any expert, and experts that were never active in the match are
      queued too, at epsilon; that would keep an idle link busy with experts that no match predicts.
    - A prompt counts as one iteration, spread over the experts by gate weight: recordings have no counts per token.
    - Several running requests: each has its own matrix and match; `ratio` is then `1 - prod(1 - ratio)` over them.
      Which request activated what is taken from its gates; without gates, every expert that the batch needed counts
      for each request.
    - A request that is not part of an iteration has ended.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `P`; 1000 is the published code's default.
        active: K; by default estimated from events.
        jit: compiles the kernels.
    """

    uses = frozenset({"gates"})
    prefetches = True
    compiles = True
    runs_async = True
    margin = 0.0

    def __init__(
        self, layers: int, experts: int, capacity: int = 1000, active: int | None = None, *, jit: Jit[Any] = interpreted
    ) -> None:
        super().__init__(layers, experts)
        self.collection = ActivationCollection(layers, experts, capacity)
        self.active = TopKEstimator(active)
        self._current: Scores = np.zeros((layers, experts))
        self._update_matches, self._update_priorities = jit(update_matches), jit(update_priorities)
        self._steps: tuple[Step, ...] = ()
        self._state = self._match(np.zeros((0, layers, experts), np.float32))

    def learn(self, recorded: Recorded) -> None:
        self.active.observe_count(int(recorded.executed.sum(axis=2).min(initial=self.experts)))
        decode = recorded.phases == DECODE
        prompts = [self._spread(gates) for gates in recorded.gates[~decode]]
        self.collection.add(recorded.executed[decode].sum(axis=0) + np.sum(prompts, axis=0))

    def begin(self, steps: Sequence[Step]) -> None:
        self.prefetch_priority[:] = 0.0
        previous = {step.request: b for b, step in enumerate(self._steps)}
        self._steps = tuple(steps)
        if [step.request for step in steps] == list(previous):
            return
        counts = np.zeros((len(steps), self.layers, self.experts), np.float32)
        for b, step in enumerate(steps):
            if step.request in previous:
                counts[b] = self._state.counts[previous.pop(step.request)]
        for ended in previous.values():
            if self._state.counts[ended].any():
                self.collection.add(self._state.counts[ended])
        self._state = self._match(counts)
        totals = counts.sum(axis=2, keepdims=True, dtype=np.float64)
        self._current[:] = 1.0 - np.prod(1.0 - counts / np.where(totals > 0, totals, 1.0), axis=0)

    def routed(self, event: Routed) -> None:
        self.active.observe(event)
        collection = self.collection
        self._update_matches(collection.columns, collection.size, event.layer, self._activity(event), self._state)
        self._update_priorities(
            collection.shares,
            collection.size,
            event.layer,
            self._state,
            self._current,
            self.retention_priority,
            self.prefetch_priority,
        )

    def _activity(self, event: Routed) -> Floats:
        """`[B, E]`: how often each request activated each expert of the layer."""
        activity = np.zeros((len(self._steps), self.experts), np.float32)
        needed = np.asarray(event.experts, np.int64)
        gates = event.gates
        if gates is None or len(gates) != len(activity):
            activity[:, needed] = 1.0
            return activity
        for b, step in enumerate(self._steps):
            if step.phase != DECODE:
                activity[b, needed] = self._spread(gates[b])[needed]
            elif len(activity) == 1:
                activity[0, needed] = 1.0
            else:
                top_k = needed[np.argsort(-gates[b, needed], kind="stable")[: self.active.count]]
                activity[b, top_k] = gates[b, top_k] > 0
        return activity

    def _spread(self, gates: Floats) -> Floats:
        """A prompt's gates `[.., E]`, scaled to sum to K over the experts."""
        totals = gates.sum(axis=-1, keepdims=True)
        return np.asarray(self.active.count * gates / np.where(totals > 0, totals, 1), np.float32)

    def _match(self, counts: Floats) -> ActivationState:
        """The state of requests with these matrices `[B, L, E]`, matched against the current collection."""
        columns = self.collection.columns
        products = np.stack([counts[:, layer] @ columns[layer] for layer in range(self.layers)], axis=1)
        lengths = np.linalg.norm(counts, axis=2, keepdims=True)
        cosines = products / np.where(lengths > 0, lengths, np.float32(1))
        similarity = cosines.sum(axis=1, dtype=np.float64)
        return ActivationState(counts, np.ascontiguousarray(products), similarity, similarity.argmax(axis=1))


class ActivationCollection:
    """Activation matrices of at most `P` requests: how often each expert of each layer was active in them.

    Source: arXiv 2401.14361, "Expert Activation Matrix Collection". The distance of two matrices is one minus the mean,
    over layers, of the cosine of their rows. K-means with that distance forms `P` clusters, and of each cluster the
    matrix nearest its centroid is kept.

    Deviations: the paper clusters a data set in advance, and again when predictions get worse. Here the first `P`
    requests are all kept, and whenever another `P` have arrived, old and new ones are clustered together. If clusters
    end up empty, fewer than `P` are kept until more requests finish.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `P`.

    Attributes:
        size: how many matrices are stored; the arrays are valid up to there.
        columns: `[L, E, P]`, rows scaled to length 1, so that a row's dot product with them is proportional to cosines.
        shares: `[P, L, E]`, rows scaled to sum 1: the expert's share of its layer's activations.
    """

    def __init__(self, layers: int, experts: int, capacity: int) -> None:
        self.size = 0
        self.columns: Floats = np.zeros((layers, experts, capacity), np.float32)
        self.shares: Scores = np.zeros((capacity, layers, experts))
        self._pending: list[Scores] = []  # shares of new requests, not clustered yet

    def add(self, matrix: npt.NDArray[np.floating]) -> None:
        """Adds a finished request's matrix `[L, E]`."""
        sums = matrix.sum(axis=1, keepdims=True)
        share = np.divide(matrix, sums, out=np.zeros(matrix.shape), where=sums > 0)
        if self.size < len(self.shares):
            self._store(self.size, share)
            self.size += 1
            return
        self._pending.append(share)
        if len(self._pending) == len(self.shares):
            candidates = np.concatenate([self.shares, np.stack(self._pending)])
            self._pending.clear()
            chosen = cluster_medoids(normalize_rows(candidates), len(self.shares))
            self.size = len(chosen)
            for place, index in enumerate(chosen):
                self._store(place, candidates[index])

    def _store(self, place: int, share: Scores) -> None:
        self.shares[place] = share
        self.columns[:, :, place] = normalize_rows(share)


def normalize_rows(matrices: npt.NDArray[np.floating]) -> Floats:
    """Scales vectors along the last axis to length 1; zero stays zero."""
    norms = np.linalg.norm(matrices, axis=-1, keepdims=True)
    return np.asarray(matrices / np.where(norms > 0, norms, 1), np.float32)


def cluster_medoids(matrices: Floats, count: int) -> list[int]:
    """K-means of `[n, L, E]`, rows of length 1, with `count` initial centroids spread evenly over the sequence.

    Returns:
        For each cluster that has members, the index of the member nearest its centroid, ascending.
    """
    flat = matrices.reshape(len(matrices), -1)
    centroids = flat[np.arange(count) * len(flat) // count]
    for _ in range(_ROUNDS):
        nearest = (flat @ centroids.T).argmax(axis=1)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, flat)
        moved = normalize_rows(sums.reshape(count, *matrices.shape[1:])).reshape(count, -1)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    similarity = flat @ centroids.T
    nearest = similarity.argmax(axis=1)
    chosen = []
    for cluster in np.unique(nearest):
        members = np.flatnonzero(nearest == cluster)
        chosen.append(int(members[similarity[members, cluster].argmax()]))
    return sorted(chosen)
