"""Activation-aware prefetching and caching: which experts a whole request used, and requests like it."""

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


class Collection:
    """Activation matrices of `P` requests at most: how often each expert of each layer was active in them.

    Source: arXiv 2401.14361, "Expert Activation Matrix Collection". The distance of two matrices is one less the mean,
    over the layers, of the cosine between their rows. K-means in that distance makes `P` clusters, and the matrix
    nearest each centroid is kept.

    Deviations: the paper clusters a data set beforehand and once more when predictions get worse; here the first `P`
    requests are all kept, and whenever as many new ones have come as are kept, the old and the new are clustered.
    Where a cluster ends up empty, fewer than `P` are kept until others come.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `P`.

    Attributes:
        size: how many are kept; the arrays are valid up to there.
        columns: `[L, E, P]`, rows scaled to length 1, so that a dot product with a row gives its cosine.
        shares: `[P, L, E]`, rows scaled to a sum of 1: the share of a layer's activations that fell to an expert.
    """

    def __init__(self, layers: int, experts: int, capacity: int) -> None:
        self.size = 0
        self.columns: Floats = np.zeros((layers, experts, capacity), np.float32)
        self.shares: Scores = np.zeros((capacity, layers, experts))
        self._waiting: list[Scores] = []

    def add(self, matrix: npt.NDArray[np.floating]) -> None:
        """Takes in a finished request's matrix `[L, E]`."""
        sums = matrix.sum(axis=1, keepdims=True)
        share = np.divide(matrix, sums, out=np.zeros(matrix.shape), where=sums > 0)
        if self.size < len(self.shares):
            self._keep(self.size, share)
            self.size += 1
            return
        self._waiting.append(share)
        if len(self._waiting) == len(self.shares):
            everything = np.concatenate([self.shares, np.stack(self._waiting)])
            self._waiting.clear()
            chosen = representatives(unit_rows(everything), len(self.shares))
            self.size = len(chosen)
            for place, index in enumerate(chosen):
                self._keep(place, everything[index])

    def _keep(self, place: int, share: Scores) -> None:
        self.shares[place] = share
        self.columns[:, :, place] = unit_rows(share)


def unit_rows(matrices: npt.NDArray[np.floating]) -> Floats:
    """Rows scaled to length 1; zero stays zero."""
    norms = np.linalg.norm(matrices, axis=-1, keepdims=True)
    return np.asarray(matrices / np.where(norms > 0, norms, 1), np.float32)


def representatives(matrices: Floats, count: int) -> list[int]:
    """K-means of `[n, L, E]`, rows of length 1, around `count` centroids that start spread over the sequence.

    Returns:
        For each cluster that has members, the index of the one nearest its centroid, ascending.
    """
    flat = matrices.reshape(len(matrices), -1)
    centroids = flat[np.arange(count) * len(flat) // count]
    for _ in range(_ROUNDS):
        nearest = (flat @ centroids.T).argmax(axis=1)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, flat)
        moved = unit_rows(sums.reshape(count, *matrices.shape[1:])).reshape(count, -1)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    alike = flat @ centroids.T
    nearest = alike.argmax(axis=1)
    chosen = []
    for cluster in np.unique(nearest):
        members = np.flatnonzero(nearest == cluster)
        chosen.append(int(members[alike[members, cluster].argmax()]))
    return sorted(chosen)


_EPSILON = 1e-8  # the paper's: an expert that was never active still has an order by its layer


class ActivationState(NamedTuple):
    """The activation matrices of the running requests, and their places in the collection."""

    counts: Floats  # [B, L, E]
    products: Floats  # [B, L, P], each row of counts with the stored rows of its layer
    alike: Scores  # [B, P], the sum of the cosines of the layers known so far
    matches: npt.NDArray[np.int64]  # [B], the stored matrix that is most alike


@kernel
def observe(columns: Floats, size: int, layer: int, activity: Floats, running: ActivationState) -> None:
    """Adds `activity` `[B, E]` to a layer of the matrices, and finds the stored ones that are most like them."""
    counts, products, alike, matches = running
    for b in range(len(activity)):
        row, dot, total = counts[b, layer], products[b, layer, :size], alike[b, :size]
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
def prioritise(
    shares: Scores,
    size: int,
    layer: int,
    running: ActivationState,
    current: Scores,
    retention_priority: Scores,
    prefetch_priority: Scores,
) -> None:
    """Priorities once `layer` is known; `current`, `retention_priority` and `prefetch_priority` are `[L, E]`.

    `current` is the running requests' own activation ratio, of which one row is brought up to date.
    """
    layers, experts = prefetch_priority.shape
    missed = np.ones(experts)
    for b in range(len(running.counts)):
        row = running.counts[b, layer].astype(np.float64)
        total = row.sum()
        if total > 0:
            missed *= 1.0 - row / total
    current[layer] = 1.0 - missed
    depth = np.arange(layers)
    retention_priority[:] = (current + _EPSILON) * (1.0 - depth / layers).reshape(-1, 1)
    prefetch_priority[:] = 0.0
    if size > 0 and len(running.matches) > 0 and layer + 1 < layers:
        rest = np.ones((layers - layer - 1, experts))
        for b in range(len(running.matches)):
            rest *= 1.0 - shares[running.matches[b], layer + 1 :]
        nearness = 1.0 - (depth[layer + 1 :] - layer) / layers
        prefetch_priority[layer + 1 :] = (1.0 - rest) * nearness.reshape(-1, 1)
        retention_priority[layer + 1 :] = np.maximum(retention_priority[layer + 1 :], prefetch_priority[layer + 1 :])


class MoEInfinityPolicy(Policy):
    """Requests resemble earlier requests: prefetch and keep what is active in them.

    Source: MoE-Infinity (Xue et al., arXiv 2401.14361, versions 1 and 2): a request's expert activation matrix counts,
    from its prompt on, how many tokens went to each expert of each layer. After every layer

    - the most similar matrix of the collection is looked up (`Collection` has the distance), and the experts of all
      later layers are prefetched by the priority `ratio * (1 - (l - l_now) / L)`, the ratio being the expert's share
      of the activations of its layer in that matrix;
    - of the cached experts the one with the lowest `(ratio + epsilon) * (1 - l / L)` goes first, the ratio being that
      of the request itself: prefetching comes too late for the first layers, so they are kept.

    Finished requests enter the collection. Deviations and readings, where the paper leaves room:

    - The distance is over the layers that are known; the others of a new request have no row to compare.
    - Both priorities are activation ratios weighted by depth, so they are compared: a prefetch must be worth more than
      its victim, and is worth its prefetch priority until its layer has run. The paper lets it displace whatever goes
      first, and also queues what was never active in the match, at epsilon, which would keep an idle link busy with
      experts that nobody is expected to need.
    - A prompt counts as one iteration, spread over the experts by gate weight: no recording has its tokens' counts.
    - Several running requests: each has its own matrix and match; `1 - prod(1 - ratio)` over them. Who activated what
      is read off each request's gates; without gates all that the batch needed counts for each.
    - A request that is not in an iteration has ended.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `P`; 1000 is the published code's default.
        active: K; by default learned from what layers need.
        jit: compiles the search.
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
        self.collection = Collection(layers, experts, capacity)
        self.active = TopKEstimator(active)
        self._current: Scores = np.zeros((layers, experts))
        self._observe, self._prioritise = jit(observe), jit(prioritise)
        self._steps: tuple[Step, ...] = ()
        self._running = self._locate(np.zeros((0, layers, experts), np.float32))

    def learn(self, recorded: Recorded) -> None:
        self.active.see(int(recorded.executed.sum(axis=2).min(initial=self.experts)))
        decode = recorded.phases == DECODE
        prompts = [self._spread(gates) for gates in recorded.gates[~decode]]
        self.collection.add(recorded.executed[decode].sum(axis=0) + np.sum(prompts, axis=0))

    def begin(self, steps: Sequence[Step]) -> None:
        self.prefetch_priority[:] = 0.0
        before = {step.request: b for b, step in enumerate(self._steps)}
        self._steps = tuple(steps)
        if [step.request for step in steps] == list(before):
            return
        counts = np.zeros((len(steps), self.layers, self.experts), np.float32)
        for b, step in enumerate(steps):
            if step.request in before:
                counts[b] = self._running.counts[before.pop(step.request)]
        for ended in before.values():
            if self._running.counts[ended].any():
                self.collection.add(self._running.counts[ended])
        self._running = self._locate(counts)
        totals = counts.sum(axis=2, keepdims=True, dtype=np.float64)
        self._current[:] = 1.0 - np.prod(1.0 - counts / np.where(totals > 0, totals, 1.0), axis=0)

    def routed(self, event: Routed) -> None:
        self.active.hear(event)
        collection = self.collection
        self._observe(collection.columns, collection.size, event.layer, self._activity(event), self._running)
        self._prioritise(
            collection.shares,
            collection.size,
            event.layer,
            self._running,
            self._current,
            self.retention_priority,
            self.prefetch_priority,
        )

    def _activity(self, event: Routed) -> Floats:
        """`[B, E]`: how often each request activated each expert."""
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
                likeliest = needed[np.argsort(-gates[b, needed], kind="stable")[: self.active.count]]
                activity[b, likeliest] = gates[b, likeliest] > 0
        return activity

    def _spread(self, gates: Floats) -> Floats:
        """A prompt's gates `[.., E]`, scaled to a sum of K."""
        totals = gates.sum(axis=-1, keepdims=True)
        return np.asarray(self.active.count * gates / np.where(totals > 0, totals, 1), np.float32)

    def _locate(self, counts: Floats) -> ActivationState:
        """The places of matrices `[B, L, E]` in the collection as it is now."""
        columns = self.collection.columns
        products = np.stack([counts[:, layer] @ columns[layer] for layer in range(self.layers)], axis=1)
        lengths = np.linalg.norm(counts, axis=2, keepdims=True)
        cosines = products / np.where(lengths > 0, lengths, np.float32(1))
        alike = cosines.sum(axis=1, dtype=np.float64)
        return ActivationState(counts, np.ascontiguousarray(products), alike, alike.argmax(axis=1))
