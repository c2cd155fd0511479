"""LRU with a window of layers ahead: what prefetching baselines with a recency cache have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finemoe.jit import Jit, interpreted, kernel
from finemoe.policy.base import Policy
from finemoe.policy.cache_state import Scores
from finemoe.policy.eviction import RECENCY, make_ranking, visit
from finemoe.policy.top_k import TopKEstimator, likeliest
from finemoe.types import Routed

KEPT = float(1 << 40)  # worth more than any use; what is wanted for a layer ahead is worth that and its want
_NO_FUTURE = np.empty(0, np.int64)


@kernel
def keep(layer: int, wanted: Scores, recency: Scores, retention_priority: Scores, prefetch_priority: Scores) -> None:
    """The experts of `layer` with `wanted` `[E]` above 0 are wanted, and worth keeping; the others are as recent."""
    prefetch_priority[layer] = wanted
    retention_priority[layer] = np.where(wanted > 0, KEPT + wanted, recency[layer])


class LayerPrefetch(Policy):
    """Least recently used goes first, except that what is wanted for a layer just ahead stays until that layer ran.

    A prefetch is not a use. One that proves useless falls back to the recency that it had, and so is among the first
    to go, as if it had come into a buffer of its own. The scores are not comparable (`margin`): recency has no unit in
    common with a probability.
    """

    prefetches = True
    compiles = True
    stride: int = 1  # how many layers ahead are wanted at most, counted over the end of the iteration

    def __init__(self, layers: int, experts: int, *, jit: Jit[Any] = interpreted) -> None:
        super().__init__(layers, experts)
        self.recency = make_ranking(layers, experts, -1.0)
        self.retention_priority[:] = self.recency.retention_priority
        self._visit, self._keep = jit(visit), jit(keep)
        self._nothing = np.zeros(experts)
        self._wanted: list[int] = []  # layers with wants

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Books an access event, and drops the wants for layers that it leaves behind."""
        self._visit(RECENCY, 1.0, self.recency, layer, np.asarray(experts, np.int64), _NO_FUTURE)
        self.retention_priority[layer] = self.recency.retention_priority[layer]
        for wanted in tuple(self._wanted):
            if wanted == layer or (wanted - layer - 1) % self.layers >= self.stride:
                self._wanted.remove(wanted)
                self._keep(
                    wanted,
                    self._nothing,
                    self.recency.retention_priority,
                    self.retention_priority,
                    self.prefetch_priority,
                )

    def anticipate(self, layer: int, wanted: Scores) -> None:
        """These `[E]` of a layer ahead are wanted; its other experts are not."""
        self._keep(layer, wanted, self.recency.retention_priority, self.retention_priority, self.prefetch_priority)
        if layer not in self._wanted:
            self._wanted.append(layer)


class DeepSpeedPolicy(LayerPrefetch):
    """Expert-agnostic: missing experts on demand, and all of the next layer in index order; an LRU cache.

    Source: DeepSpeed-Inference (Aminabadi et al., arXiv 2207.00032), whose ZeRO-Inference streams the parameters of
    whole layers in their order, the next one while this one computes. After the last layer comes the first of the next
    iteration.

    Deviations: the original has no cache of experts, every layer is streamed anew. The cache is what comparisons add to
    it (arXiv 2502.05370 among them); what the current layer is missing goes first.
    """

    def __init__(self, layers: int, experts: int, *, jit: Jit[Any] = interpreted) -> None:
        super().__init__(layers, experts, jit=jit)
        self._in_index_order = np.arange(experts, 0, -1, dtype=np.float64)

    def routed(self, event: Routed) -> None:
        self.used(event.layer, event.experts)
        self.anticipate((event.layer + 1) % self.layers, self._in_index_order)


class MixtralOffloadingPolicy(LayerPrefetch):
    """An LRU cache, and the experts that the next layer's gate would choose by the current hidden states.

    Source: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading" (arXiv
    2312.17238), sections 3.1 (LRU cache) and 3.2 (speculative loading): once the layer's own experts are loaded, the
    one or two likeliest experts of the next layer, for a model with two active per token.

    Deviations: one pool for all layers, where the paper gives each layer k slots. It loads speculatively into buffers
    apart, from which an expert enters the cache only when used; here it takes the least recent expert's slot, and if
    it was not used it is itself the next to go (`LayerPrefetch`). For several tokens the mean of their gates counts.
    Where the gates of the next layer were not recorded, this is plain LRU.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        fetch: how many experts to speculate on per request; by default as many as a token activates, the upper end of
            what the paper uses.
        jit: compiles the bookkeeping.
    """

    needs = frozenset({"lookahead"})

    def __init__(self, layers: int, experts: int, fetch: int | None = None, *, jit: Jit[Any] = interpreted) -> None:
        super().__init__(layers, experts, jit=jit)
        self._likeliest = jit(likeliest)
        self.active = TopKEstimator(fetch)

    def routed(self, event: Routed) -> None:
        self.used(event.layer, event.experts)
        self.active.hear(event)
        ahead, after = event.lookahead, event.layer + 1
        if ahead is None or not ahead.shape[0] or not ahead.shape[1] or after == self.layers:
            return
        self.anticipate(after, self._likeliest(ahead[:, 0], self.active.count))
