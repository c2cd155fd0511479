"""Speculation: the next layer's gate, applied to this layer's hidden states."""

from __future__ import annotations

from typing import Any

from finemoe.policy.active import Active, likeliest
from finemoe.policy.ahead import Ahead
from finemoe.policy.kernel import Jit, interpreted
from finemoe.types import Routed


class Speculative(Ahead):
    """An LRU cache, and the experts that the next layer's gate would choose by the current hidden states.

    Source: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading" (arXiv
    2312.17238), sections 3.1 (LRU cache) and 3.2 (speculative loading): once the layer's own experts are loaded, the
    one or two likeliest experts of the next layer, for a model with two active per token.

    Deviations: one pool for all layers, where the paper gives each layer k slots. It loads speculatively into buffers
    apart, from which an expert enters the cache only when used; here it takes the least recent expert's slot, and if
    it was not used it is itself the next to go (`Ahead`). For several tokens the mean of their gates counts. Where the
    gates of the next layer were not recorded, this is plain LRU.

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
        self.active = Active(fetch)

    def routed(self, event: Routed) -> None:
        self.used(event.layer, event.experts)
        self.active.hear(event)
        ahead, after = event.lookahead, event.layer + 1
        if ahead is None or not ahead.shape[0] or not ahead.shape[1] or after == self.layers:
            return
        self.anticipate(after, self._likeliest(ahead[:, 0], self.active.count))
