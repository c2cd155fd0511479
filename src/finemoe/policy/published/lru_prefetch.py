"""LRU cache plus prefetch of the layers just ahead: the `deepspeed` and `mixtral-offloading` baselines.

`LRUPrefetchPolicy` is the common base, also of `promoe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finemoe.jit import Jit, interpreted, kernel
from finemoe.policy.base import Policy
from finemoe.policy.cache_state import Scores
from finemoe.policy.lru_lfu import RECENCY, make_ranking, visit
from finemoe.policy.top_k import TopKEstimator, top_k_union
from finemoe.types import Routed

PROTECTED = float(1 << 40)  # above any recency; added to the retention priority of experts predicted for a layer ahead
_NO_NEXT_USE = np.empty(0, np.int64)


@kernel
def protect(
    layer: int, priority: Scores, recency: Scores, retention_priority: Scores, prefetch_priority: Scores
) -> None:
    """Sets the scores of `layer` from the prefetch `priority` `[E]` of its experts; arrays `[L, E]`.

    An expert of positive priority is prefetched by it, and retained above all others; the rest are retained by recency.
    """
    prefetch_priority[layer] = priority
    retention_priority[layer] = np.where(priority > 0, PROTECTED + priority, recency[layer])


class LRUPrefetchPolicy(Policy):
    """LRU eviction, except that experts predicted for a layer just ahead are protected until that layer has run.

    A prefetch does not count as a use. A prefetched expert that was not used falls back to its earlier recency, so it
    is among the first to be evicted, as if it had been loaded into a separate buffer. The two scores are not comparable
    (`margin` is `-inf`): recency and probability have no common unit.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        jit: compiles the kernels.

    Attributes:
        stride: how many layers ahead are prefetched at most; the next iteration's first follow the last layer.
        recency: the LRU ranking.
    """

    prefetches = True
    compiles = True
    stride: int = 1

    def __init__(self, layers: int, experts: int, *, jit: Jit[Any] = interpreted) -> None:
        super().__init__(layers, experts)
        self.recency = make_ranking(layers, experts, -1.0)
        self.retention_priority[:] = self.recency.retention_priority
        self._visit, self._protect = jit(visit), jit(protect)
        self._no_priority = np.zeros(experts)
        self._prefetched_layers: list[int] = []  # layers whose experts have prefetch priorities

    def record_use(self, layer: int, experts: Sequence[int]) -> None:
        """Records an access event, and resets the priorities of this layer and of layers that are no longer ahead."""
        self._visit(RECENCY, 1.0, self.recency, layer, np.asarray(experts, np.int64), _NO_NEXT_USE)
        self.retention_priority[layer] = self.recency.retention_priority[layer]
        for ahead in tuple(self._prefetched_layers):
            if ahead == layer or (ahead - layer - 1) % self.layers >= self.stride:
                self._prefetched_layers.remove(ahead)
                self._protect(
                    ahead,
                    self._no_priority,
                    self.recency.retention_priority,
                    self.retention_priority,
                    self.prefetch_priority,
                )

    def prefetch_layer(self, layer: int, priority: Scores) -> None:
        """Prefetch the experts of a layer ahead by this priority `[E]`; those at 0 are not prefetched."""
        self._protect(layer, priority, self.recency.retention_priority, self.retention_priority, self.prefetch_priority)
        if layer not in self._prefetched_layers:
            self._prefetched_layers.append(layer)


class DeepSpeedPolicy(LRUPrefetchPolicy):
    """LRU cache; prefetches all experts of the next layer in index order, whatever the routing.

    Source: DeepSpeed-Inference (Aminabadi et al., arXiv 2207.00032): its ZeRO-Inference streams the parameters of whole
    layers in order, the next layer while the current one computes. After the last layer comes the first of the next
    iteration.

    Deviation: the original has no expert cache and streams every layer. The cache is what published comparisons add
    to it (among them arXiv 2502.05370); demand loads of the current layer go before the prefetches.
    """

    def __init__(self, layers: int, experts: int, *, jit: Jit[Any] = interpreted) -> None:
        super().__init__(layers, experts, jit=jit)
        self._in_index_order = np.arange(experts, 0, -1, dtype=np.float64)

    def routed(self, event: Routed) -> None:
        self.record_use(event.layer, event.experts)
        self.prefetch_layer((event.layer + 1) % self.layers, self._in_index_order)


class MixtralOffloadingPolicy(LRUPrefetchPolicy):
    """LRU cache; prefetches the experts that the next layer's gate selects on the current layer's hidden states.

    Source: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading" (arXiv
    2312.17238), sections 3.1 (LRU cache) and 3.2 (speculative loading: once a layer's experts are loaded, the one or
    two likeliest experts of the next layer, for a model with two active per token).

    Deviations:

    - One pool for all layers; the paper gives each layer k slots.
    - The paper loads speculatively into separate buffers, and an expert enters the cache only when it is used. Here it
      takes the least recently used expert's slot, and is itself evicted next if it was not used (`LRUPrefetchPolicy`).
    - Of several tokens, the mean of their gates is used.
    - If the next layer's gate was not recorded, this is plain LRU.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        fetch: how many experts to prefetch per request; by default as many as a token activates, the most that the
            paper uses.
        jit: compiles the kernels.
    """

    needs = frozenset({"lookahead"})

    def __init__(self, layers: int, experts: int, fetch: int | None = None, *, jit: Jit[Any] = interpreted) -> None:
        super().__init__(layers, experts, jit=jit)
        self._top_k_union = jit(top_k_union)
        self.active = TopKEstimator(fetch)

    def routed(self, event: Routed) -> None:
        self.record_use(event.layer, event.experts)
        self.active.observe(event)
        lookahead, next_layer = event.lookahead, event.layer + 1
        if lookahead is None or not lookahead.shape[0] or not lookahead.shape[1] or next_layer == self.layers:
            return
        self.prefetch_layer(next_layer, self._top_k_union(lookahead[:, 0], self.active.count))
