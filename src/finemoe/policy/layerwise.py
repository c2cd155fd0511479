"""Prefetching a whole layer ahead, whatever the router does."""

from __future__ import annotations

from typing import Any

import numpy as np

from finemoe.policy.ahead import Ahead
from finemoe.policy.kernel import Jit, interpreted
from finemoe.types import Routed


class Layerwise(Ahead):
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
