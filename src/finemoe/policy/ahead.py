"""LRU with a window of layers ahead: what prefetching baselines with a recency cache have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finemoe.policy.base import Policy
from finemoe.policy.book import Scores
from finemoe.policy.cache import RECENCY, make_ranking, visit
from finemoe.policy.kernel import Jit, interpreted, kernel

KEPT = float(1 << 40)  # worth more than any use; what is wanted for a layer ahead is worth that and its want
_NO_FUTURE = np.empty(0, np.int64)


@kernel
def keep(layer: int, wanted: Scores, recency: Scores, worth: Scores, want: Scores) -> None:
    """The experts of `layer` with `wanted` `[E]` above 0 are wanted, and worth keeping; the others are as recent."""
    want[layer] = wanted
    worth[layer] = np.where(wanted > 0, KEPT + wanted, recency[layer])


class Ahead(Policy):
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
        self.worth[:] = self.recency.worth
        self._visit, self._keep = jit(visit), jit(keep)
        self._nothing = np.zeros(experts)
        self._wanted: list[int] = []  # layers with wants

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Books an access event, and drops the wants for layers that it leaves behind."""
        self._visit(RECENCY, 1.0, self.recency, layer, np.asarray(experts, np.int64), _NO_FUTURE)
        self.worth[layer] = self.recency.worth[layer]
        for wanted in tuple(self._wanted):
            if wanted == layer or (wanted - layer - 1) % self.layers >= self.stride:
                self._wanted.remove(wanted)
                self._keep(wanted, self._nothing, self.recency.worth, self.worth, self.want)

    def anticipate(self, layer: int, wanted: Scores) -> None:
        """These `[E]` of a layer ahead are wanted; its other experts are not."""
        self._keep(layer, wanted, self.recency.worth, self.worth, self.want)
        if layer not in self._wanted:
            self._wanted.append(layer)
